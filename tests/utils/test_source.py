"""Digests of the source of a class: its file, what it derives from, and what lies beside it and is imported."""

import sys

import pytest

from pdiff_hf.tasks import task_class
from pdiff_hf.tasks.image_classification import ImageClassificationTask
from pdiff_hf.utils.source import source_digests

FILES = {
    "mine.py": "import helper\nfrom parts import first\nfrom support.file_task import Clouds\n\n\nclass Mine(Clouds):\n"
    "    pass\n",
    "helper.py": "def later():\n    import deeper\n\n    return deeper\n",
    "deeper.py": "import torch\n",
    "other.py": "1\n",
    "parts/__init__.py": "",
    "parts/first.py": "from . import second\n",
    "parts/second.py": "",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "parts").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    yield tmp_path
    for name in ("helper", "deeper", "parts", "parts.first", "parts.second"):
        sys.modules.pop(name, None)


def test_the_files_that_a_class_follows_from(folder):
    name = f"{folder / 'mine.py'}:Mine"
    before = source_digests(task_class(name))
    own = {"deeper.py", "first.py", "helper.py", "mine.py", "parts/__init__.py", "second.py"}
    assert set(before) == own | {"file_task.py"}  # and what it derives from
    for edited in ("helper.py", "deeper.py", "parts/second.py"):
        (folder / edited).write_text(FILES[edited] + "# edited\n")
        after = source_digests(task_class(name))
        assert {file for file in after if after[file] != before[file]} == {edited.rpartition("/")[2]}
        (folder / edited).write_text(FILES[edited])
    (folder / "other.py").write_text("2\n")
    assert source_digests(task_class(name)) == before


def test_an_edited_file_is_loaded_again(folder):
    name = f"{folder / 'mine.py'}:Mine"
    first = task_class(name)
    assert task_class(name) is first
    (folder / "mine.py").write_text(FILES["mine.py"].replace("pass", "edited = True"))
    assert task_class(name).edited and not hasattr(first, "edited")


def test_classes_of_this_package_and_of_libraries_are_known_by_their_versions():
    assert source_digests(ImageClassificationTask) == {} == source_digests(dict)
