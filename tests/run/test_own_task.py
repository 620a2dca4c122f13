"""A task in a file outside the package, in every script that has to do with tasks: the example of the README."""

import json
import shutil

from support.run_server import ROOT

OWN = ROOT / "docs" / "snippets" / "clouds.py"
FLAGS = [
    "--select=all",
    "--base_epochs=1",
    "--num_snapshots=20",
    "--collect_learning_rate=0.01",
    "--latent_dim=32",
    "--autoencoder_steps=5",
    "--autoencoder_batch_size=5",
    "--denoiser_steps=5",
    "--denoiser_batch_size=5",
    "--num_models=4",
    "--num_inference_steps=3",
    "--baseline_models=1",
]


def test_a_task_in_a_file_of_ones_own(run_server, tmp_path):
    file = shutil.copy(OWN, tmp_path / "clouds.py")
    task = f"--task={file}:Clouds"
    listed = run_server.run(tmp_path / "nothing", task, "--select=all", "--latent_dim=32", "--list", script="collect")
    assert "* selected: 146 of 146 parameters" in listed.output, listed.errors
    folder = tmp_path / "out"
    trained = run_server.run(folder, task, *FLAGS)
    assert trained.status == 0, trained.errors
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    assert report["num_parameters"] == 146 and report["splits"] == {"validation": 500, "test": 500}

    sources = [f"--snapshots={folder / 'snapshots'}", f"--model={folder / 'base_model'}"]
    again = run_server.run(tmp_path / "again", folder / "pipeline", task, *sources, *FLAGS, script="evaluate")
    assert again.status == 0, again.errors
    groups = [
        {group["name"]: group["sets"] for group in json.loads((path / "report.json").read_text())["groups"]}
        for path in (folder / "evaluation", tmp_path / "again")
    ]
    assert groups[0]["snapshots"] == groups[1]["snapshots"]

    # Other data under the same name: what was finished is not reused.
    text = OWN.read_text().replace('f"clouds {split}"', 'f"other clouds {split}"')
    (tmp_path / "clouds.py").write_text(text)
    other = run_server.run(folder, task, *FLAGS)
    assert other.status == 1 and "train data: 'clouds train' there, 'other clouds train' asked for" in other.errors


def test_arguments_and_mistakes_of_ones_own_task(run_server, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        OWN.read_text() + "\n\nclass Sized(Clouds):\n"
        "    def __init__(self, size, dataset='mine', image_size=None):\n"
        "        raise ValueError(f'{size} {dataset} {image_size}')\n"
    )
    cases = {
        ("Sized", '--task_args={"size": 3}'): "error: 3 mine None",  # its own defaults stay
        ("Sized", '--task_args={"size": 3}', "--dataset=x", "--image_size=9"): "error: 3 x 9",
        ("Sized",): "own.py:Sized' needs size",
        ("Sized", '--task_args={"sise": 3}'): "does not take the task_args sise; it takes size, dataset, image_size",
        ("Clods",): "has no such task; it has Clouds, Sized",
    }
    for (name, *flags), message in cases.items():
        result = run_server.run(tmp_path / "out", f"--task={own}:{name}", *flags)
        assert result.status == 1 and message in result.errors and "Traceback" not in result.errors, result.errors
    assert not (tmp_path / "out").exists()
