"""Generators that people ask for and that are not there, too new, too old, or need what is not installed."""

import json

import pytest
from support.pipelines import make_network, make_pipeline
from support.scripts import run_script
from transformers import TimmWrapperForImageClassification

from pdiff_hf import PDiffPipeline
from pdiff_hf.scripts import explore


@pytest.fixture
def saved(tmp_path):
    make_pipeline(make_network()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def set_version(folder, version) -> None:
    config = folder / "autoencoder" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(values | {"format_version": version}), encoding="utf-8")


@pytest.mark.parametrize("inside", ["nothing", "a network", "snapshots"])
def test_a_folder_without_a_generator(inside, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    if inside == "a network":
        make_network().save_pretrained(folder)
    if inside == "snapshots":
        (folder / "snapshots").mkdir()
    with pytest.raises(SystemExit, match=f"error: '{folder}' is neither the folder of a finished run") as end:
        run_script(monkeypatch, "generate.py", folder, "--output_dir", tmp_path / "out")
    assert "\n" not in end.value.code and not (tmp_path / "out").exists()
    with pytest.raises((ValueError, OSError), match="is neither the folder of a finished run"):
        explore.load_source(str(folder))


@pytest.mark.parametrize("name", ["outputs/digitz/pipeline", "digits/pipeline/tuned", "~/pipeline", "a b"])
def test_a_folder_that_is_misspelled(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        SystemExit, match="error: '.*' is neither the folder of a finished run .*nor the id of one"
    ) as end:
        run_script(monkeypatch, "generate.py", name)
    assert "\n" not in end.value.code


def test_a_generator_of_a_newer_release(saved, tmp_path, monkeypatch):
    set_version(saved, 99)
    with pytest.raises(SystemExit, match="error: .*saved in format 99.*upgrade pdiff_hf") as end:
        run_script(monkeypatch, "generate.py", saved, "--output_dir", tmp_path / "out")
    assert "\n" not in end.value.code


def test_a_base_model_whose_package_is_not_installed(saved, tmp_path, monkeypatch):
    def requires_timm(*args, **kwargs):
        raise ImportError("TimmWrapperForImageClassification requires the timm library\nbut it was not found")

    monkeypatch.setattr(TimmWrapperForImageClassification, "from_pretrained", requires_timm)
    message = "needs a package that is not installed: .*requires the timm library"
    with pytest.raises(SystemExit, match=f"error: .*{message}") as end:
        run_script(monkeypatch, "generate.py", saved, "--output_dir", tmp_path / "out")
    assert "\n" not in end.value.code
    with pytest.raises(ValueError, match=message):
        PDiffPipeline.from_pretrained(saved)


@pytest.mark.parametrize("name", ["", "   "])
def test_no_name_at_all(name):
    with pytest.raises(ValueError, match="name a generator"):
        explore.load_source(name.strip())
