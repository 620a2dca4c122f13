"""Every command and every Python block of the README runs, in the README's order, in one folder, at a small size."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.recipes import TINY, TINY_FAMILY
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)

# Not run here: the installation, and the command that runs this test.
SKIPPED = ("pip install", "python -m pytest")
# The Hub of the tests knows this user; and these many steps would take too long.
REPLACED = {"user/": "alice/", "first_step=500": "first_step=5"}
SAMPLING = {"num_models": 2, "num_inference_steps": 2}
SMALL = {
    "train": TINY | {"baseline_models": 0, "tune_steps": 2, "tune_models": 4, "tune_batch_size": 4},
    "collect": TINY | {"baseline_models": 0},
    "generate": SAMPLING,
    "evaluate": SAMPLING | {"max_eval_samples": 50, "baseline_models": 0},
    "reproduce": TINY | {"baseline_models": None, "dataset": "digits"},
}
# Of its tasks and its network, what the recipe says.
ON_DEMAND = {key: value for key, value in TINY_FAMILY.items() if key not in ("family", "family_args", "select")}
MORE = {"scripts/reproduce.py table3a": ["--rows", "none"], "fashion_mnist.yaml": ["--dataset", "digits"]}
MORE["digits.yaml"] = ['--collect_args={"num_runs": 2}']


def small_flags(line: str, arguments: list[str]) -> list[str]:
    """What makes a command small: settings that it does not give itself."""
    script = Path(arguments[0]).stem
    if "--list" in arguments or script not in SMALL:
        return []
    settings = ON_DEMAND if "on_demand" in line or arguments == ["scripts/train.py"] else SMALL[script]
    settings = {key: value for key, value in settings.items() if value is not None and f"--{key}" not in arguments}
    # What has no effect is refused.
    without = {"model", "image_size"} if {"--model", "--task"} & set(arguments) else set()
    if "digits.yaml" in line or len(arguments) == 1:
        without |= {"model", "model_args", "image_size", "autoencoder_steps", "autoencoder_batch_size"}
    without |= {"max_train_samples", "max_eval_samples"} if "--task" in arguments else set()
    if script == "train" and ("--snapshots" in arguments or "outputs/imported" in arguments):
        without |= {"num_snapshots", "collect_batch_size"}
    flags = [
        f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"
        for key, value in settings.items()
        if key not in without
    ]
    return flags + [flag for part, more in MORE.items() if part in line for flag in more]


def run_command(line: str, monkeypatch) -> None:
    """A command of the README, in this process; launchers add nothing at this size."""
    arguments = shlex.split(line, comments=True)
    assert arguments[:2] == ["accelerate", "launch"] or arguments[0] == "python", line
    arguments = arguments[2 if arguments[0] == "accelerate" else 1 :]
    monkeypatch.setattr(sys, "argv", arguments + small_flags(line, arguments))
    runpy.run_path(arguments[0], run_name="__main__")


def digits(start: int, stop: int) -> list[tuple[np.ndarray, int]]:
    images, labels = load_digits(return_X_y=True)
    pixels = (images[start:stop].reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    return list(zip(np.repeat(pixels, 3, axis=3), labels[start:stop].tolist(), strict=True))


def write_user_files(folder: Path) -> Trainer:
    """What a reader of the README has: a folder of images, and a `Trainer` for a network of their own."""
    for split, (start, stop) in {"train": (0, 300), "test": (300, 400)}.items():
        for i, (image, label) in enumerate(digits(start, stop)):
            path = folder / "my_images" / split / f"class-{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=10)
    config.id2label = {i: f"class-{i}" for i in range(10)}
    config.label2id = {name: i for i, name in config.id2label.items()}
    torch.manual_seed(0)
    return Trainer(
        AutoModelForImageClassification.from_config(config),
        TrainingArguments(
            str(folder / "my_checkpoints"), max_steps=20, per_device_train_batch_size=32, save_steps=4,
            save_total_limit=None, learning_rate=1e-3, report_to="none", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=[processor(image) | {"labels": label} for image, label in digits(0, 200)],
        data_collator=lambda rows: {
            "pixel_values": torch.tensor(np.stack([row["pixel_values"][0] for row in rows])),
            "labels": torch.tensor([row["labels"] for row in rows]),
        },
        processing_class=processor,
    )  # fmt: skip


def test_everything_in_the_readme_runs(tmp_path, monkeypatch, hub, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    names = {"trainer": write_user_files(tmp_path)}
    for language, block in BLOCKS:
        for old, new in REPLACED.items():
            block = block.replace(old, new)
        if language == "python":
            exec(compile(block, block.partition("\n")[0], "exec"), names)
            for class_name, file in {"Clouds": "my_task.py", "Darker": "my_family.py"}.items():
                if f"class {class_name}" in block:
                    (tmp_path / file).write_text(f"import torch\n{block}")
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith(SKIPPED):
                run_command(line, monkeypatch)

    # What the commands promise is there, and what the blocks name is what it should be.
    for folder in ("digits", "on_demand", "darker", "mine", "imported", "clouds"):
        assert (tmp_path / "outputs" / folder / "evaluation" / "report.md").is_file(), folder
    report = json.loads((tmp_path / "outputs" / "clouds" / "evaluation" / "report.json").read_text())
    assert report["num_parameters"] == 32  # scale and shift of the layer of 16
    assert len(list((tmp_path / "outputs" / "my_networks").iterdir())) == 2
    assert "77.5" in capsys.readouterr().out  # the paper's number in table 3a
    assert len(names["networks"]) == 8 and len(names["posterior"].parameters) <= 64
    assert len(names["snapshots"]) == TINY["num_snapshots"]
    assert type(names["pipe"]).__name__ == "PDiffPipeline"


def test_the_example_of_a_task_is_the_one_that_is_tested():
    example = (ROOT / "tests" / "support" / "own_task.py").read_text().partition("\n")[2].strip()
    assert example in README


def test_what_the_readme_links_to_is_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"`(pdiff_hf/[\w./]+|pipelines/)`", README):
        assert (ROOT / path).exists(), path


def test_the_readme_is_one_page():
    assert len(README.split()) <= 1300
