"""Tasks by name: registered ones, and those in modules and files of others."""

import importlib
from pathlib import Path

import pytest
import support.file_task

from pdiff_hf import tasks
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.tasks import make_task, registry, task_class, task_names
from pdiff_hf.tasks.image_classification import ImageClassificationTask

FILE = Path(support.file_task.__file__)


def test_registered_tasks_have_names():
    assert {"image_classification", "object_detection", "image_generation"} <= set(task_names())
    assert task_class("image_classification") is ImageClassificationTask is tasks.ImageClassificationTask


def test_a_class_of_yours_takes_the_place_of_one_of_the_package_whichever_comes_first(tmp_path, monkeypatch):
    code = "from pdiff_hf.tasks.registry import register_task\n@register_task('odd')\nclass Theirs: pass"
    (tmp_path / "odd_task.py").write_text(code)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    monkeypatch.setitem(registry.MODULES["task"], "odd", ("odd_task",))
    monkeypatch.setitem(registry._registered["task"], "odd", [])
    registry.register_task("odd")(ImageClassificationTask)
    assert task_class("odd") is ImageClassificationTask


def test_settings_go_to_the_arguments_of_the_same_names():
    config = PDiffConfig(model="test_resnet", image_size=0, max_eval_samples=7, model_args={"in_chans": 1})
    task = config.changed(num_snapshots=3).make_task()
    assert isinstance(task, ImageClassificationTask) and task.dataset == "digits" and task.model_args == {"in_chans": 1}
    assert task.image_size is None and len(task.load_split("test")) == 7
    for name in (f"{FILE}:Clouds", "support.file_task:Clouds"):
        task = PDiffConfig(task=name, max_eval_samples=5, task_args={"distance": 2.0}).make_task()
        assert (task.max_eval_samples, task.distance) == (5, 2.0) and len(task.load_split("test")) == 5
    assert task_class(f"{FILE}:Clouds") is task_class(f"{FILE}:Clouds")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "image_clasification",
            "'image_clasification' is neither one of image_classification.*nor a class of your",
        ),
        ("nowhere:Clouds", "'nowhere' cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("nowhere.py:Clouds", "'nowhere.py' cannot be imported: FileNotFoundError: there is no file '.*nowhere.py'"),
        (f"{FILE}:Points", "has no such task; it has Unfinished, Clouds"),
        (f"{FILE}:dataclass", "has no such task"),
        (f"{FILE}:Unfinished", "lacks the methods fingerprint, load_split, loss"),
    ],
)
def test_what_is_no_task_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        task_class(name)


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not take the task_args size; it takes max_eval_samples, distance"):
        make_task(f"{FILE}:Clouds", {"size": 3})
    with pytest.raises(ValueError, match="model=resnet34 has no effect: task .* does not take it"):
        PDiffConfig(task=f"{FILE}:Clouds", model="resnet34").make_task()
    with pytest.raises(ValueError, match="'text_classification' needs model, dataset"):
        make_task("text_classification", {})
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(ValueError, match="broken.py' cannot be imported: ModuleNotFoundError"):
        task_class(f"{tmp_path / 'broken.py'}:Clouds")


def test_the_names_that_are_listed_are_those_that_are_registered():
    for name in registry.TASKS:
        assert task_class(name).__module__ == f"pdiff_hf.tasks.{name}"
    for name, modules in registry.MODULES["family"].items():
        for module in modules:
            importlib.import_module(f"pdiff_hf.tasks.{module}")
        assert {kind.__module__.rpartition(".")[2] for kind in registry._registered["family"][name]} == set(modules)


def test_a_family_says_which_task_it_takes():
    clouds = make_task(f"{FILE}:Clouds", {})
    message = "family 'grouped' is over .* ImageClassificationTask or TextClassificationTask, got Clouds"
    with pytest.raises(ValueError, match=message):
        tasks.make_family("grouped", clouds)
