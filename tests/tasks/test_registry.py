"""Tasks by name: registered ones, and those in modules and files of others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import support.file_task

from pdiff_hf import tasks
from pdiff_hf.run.recipe import Recipe
from pdiff_hf.run.run import Run
from pdiff_hf.tasks import make_task, task_class, task_names
from pdiff_hf.tasks.image_classification import ImageClassificationTask

FILE = Path(support.file_task.__file__)


def test_registered_tasks_are_imported_when_they_are_asked_for():
    code = (
        "import sys, pdiff_hf.tasks as tasks\n"
        "names = tasks.task_names()\n"
        "assert len(names) >= 5 and not set(names.values()) & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"image_classification", "object_detection", "image_generation"} <= set(task_names())
    assert task_class("image_classification") is ImageClassificationTask is tasks.ImageClassificationTask


def test_settings_go_to_the_arguments_of_the_same_names():
    settings = {"task": "image_classification", "model": "test_resnet", "image_size": 0, "max_eval_samples": 7}
    task = make_task(settings | {"model_args": '{"in_chans": 1}', "dataset": None, "num_snapshots": 3})
    assert isinstance(task, ImageClassificationTask) and task.dataset == "digits" and task.model_args == {"in_chans": 1}
    assert task.image_size is None and len(task.load_split("test")) == 7
    for name in (f"{FILE}:Clouds", "support.file_task:Clouds"):
        task = make_task({"task": name, "max_eval_samples": 5, "model": "resnet18"}, {"distance": 2.0})
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
        (f"{FILE}:Unfinished", "lacks the methods collate, fingerprint, load_split, loss"),
    ],
)
def test_what_is_no_task_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        task_class(name)


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not take the task_args size; it takes max_eval_samples, distance"):
        make_task({"task": f"{FILE}:Clouds"}, {"size": 3})
    with pytest.raises(ValueError, match="'text_classification' needs model, dataset"):
        make_task({"task": "text_classification"})
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(ValueError, match="broken.py' cannot be imported: ModuleNotFoundError"):
        task_class(f"{tmp_path / 'broken.py'}:Clouds")


def test_a_run_of_a_task_in_a_file_outside_the_package(tmp_path):
    recipe = Recipe(
        output_dir=str(tmp_path),
        task=f"{FILE}:Clouds",
        max_eval_samples=200,
        base_epochs=1,
        base_batch_size=50,
        num_snapshots=12,
        collect_learning_rate=0.01,
        latent_dim=4,
        autoencoder_steps=5,
        autoencoder_batch_size=5,
        denoiser_steps=5,
        denoiser_batch_size=5,
        num_models=3,
        num_inference_steps=3,
        baseline_models=0,
    )
    Run(recipe).carry_out()
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert any(group["name"] == "generated" and group["n"] == 3 for group in report["groups"])
