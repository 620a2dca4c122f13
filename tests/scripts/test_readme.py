"""
Every command of the README runs, in its order, in one folder, at a small size; and so does every Python block of the
README and of the documentation, each as a file by itself.
"""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.docs import PAGES, README, ROOT, SNIPPETS, blocks
from support.recipes import TINY, TINY_DATA, TINY_FAMILY
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
)

import pdiff_hf
from pdiff_hf import SnapshotCallback

BLOCKS = blocks(README, "bash", "python")
TEXT = "".join(PAGES.values())

# Not run here: the installation, and the page, which waits for a browser.
SKIPPED = ("pip install", "python scripts/app.py")
# The Hub of the tests knows this user.
REPLACED = {"user/": "alice/"}
# Where commands look for the classes of a block.
FILES = {"darker": "my_family.py", "clouds": "my_task.py"}
SAMPLING = {"num_models": 2, "num_inference_steps": 2}
SMALL = {
    "train": TINY | {"baseline_models": 0, "tune_steps": 2, "tune_models": 4, "tune_batch_size": 4},
    "generate": SAMPLING,
    "evaluate": SAMPLING | {"max_eval_samples": 50, "baseline_models": 0},
    "reproduce": TINY | {"baseline_models": None, "dataset": "digits"},
}
# Of its tasks and its network, what the recipe says.
ON_DEMAND = {key: value for key, value in TINY_FAMILY.items() if key not in ("family", "family_args", "select")}
MORE = {"scripts/reproduce.py table3a": ["--rows", "none"], "digits.yaml": ['--collect_args={"num_runs": 2}']}


def small_flags(line: str, arguments: list[str]) -> list[str]:
    """What makes a command small: settings that it does not give itself."""
    script = Path(arguments[0]).stem
    if "--list" in arguments or script not in SMALL:
        return []
    if "fields.yaml" in line:
        kept = {key: value for key, value in TINY_DATA.items() if key not in ("task", "model", "select", "dataset")}
        return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in kept.items()]
    is_family = script == "train" and (len(arguments) == 1 or "on_demand" in line)
    settings = ON_DEMAND if is_family else SMALL[script]
    settings = {key: value for key, value in settings.items() if value is not None and f"--{key}" not in arguments}
    # What has no effect is refused.
    without = {"model", "image_size"} if "--model" in arguments else set()
    if "digits.yaml" in line or len(arguments) == 1:  # without a recipe's network, it would be another default
        without |= {"model", "model_args", "image_size", "autoencoder_steps", "autoencoder_batch_size"}
    if script == "train" and "--snapshots" in arguments:
        without |= {"num_snapshots", "collect_batch_size", "tune_steps"}
    flags = [
        f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"
        for key, value in settings.items()
        if key not in without
    ]
    return flags + [flag for part, more in MORE.items() if part in line for flag in more]


def run_command(line: str, monkeypatch) -> None:
    """A command of the README, in this process; launchers add nothing at this size."""
    arguments = shlex.split(line.replace("--tune_steps 200", "--tune_steps 2"), comments=True)
    assert arguments[:2] == ["accelerate", "launch"] or arguments[0] == "python", line
    arguments = arguments[2 if arguments[0] == "accelerate" else 1 :]
    monkeypatch.setattr(sys, "argv", arguments + small_flags(line, arguments))
    runpy.run_path(arguments[0], run_name="__main__")


def digits(start: int, stop: int) -> list[tuple[np.ndarray, int]]:
    images, labels = load_digits(return_X_y=True)
    pixels = (images[start:stop].reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    return list(zip(np.repeat(pixels, 3, axis=3), labels[start:stop].tolist(), strict=True))


def write_user_files(folder: Path) -> None:
    """What a reader of the README has: a folder of images, and a network trained with snapshots."""
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
    trainer = Trainer(
        AutoModelForImageClassification.from_config(config),
        TrainingArguments(
            str(folder / "my_checkpoints"), max_steps=20, per_device_train_batch_size=32, save_strategy="no",
            learning_rate=1e-3, report_to="none", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=[processor(image) | {"labels": label} for image, label in digits(0, 200)],
        data_collator=lambda rows: {
            "pixel_values": torch.tensor(np.stack([row["pixel_values"][0] for row in rows])),
            "labels": torch.tensor([row["labels"] for row in rows]),
        },
        processing_class=processor,
        callbacks=[SnapshotCallback("snapshots", select="norm[-2:]")],
    )  # fmt: skip
    trainer.train()
    trainer.save_model("my_model")


@pytest.mark.slow
def test_everything_in_the_readme_runs(without_figures, quick_classifier, tmp_path, monkeypatch, hub, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    write_user_files(tmp_path)
    for name, file in FILES.items():
        (tmp_path / file).write_text(SNIPPETS[name], encoding="utf-8")
    for language, block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines() if language == "bash" else ():
            if not line.startswith(SKIPPED):
                for old, new in REPLACED.items():
                    line = line.replace(old, new)
                run_command(line, monkeypatch)

    # What the commands promise is there.
    for folder in ("digits", "on_demand", "darker", "mine", "fields"):
        assert (tmp_path / "outputs" / folder / "evaluation" / "report.md").is_file(), folder
    assert len(list((tmp_path / "outputs" / "networks").glob("network-*"))) == 4
    assert "77.5" in capsys.readouterr().out  # the paper's number in table 3a

    # Each block as a file by itself. They find what the commands have made.
    for name, code in SNIPPETS.items():
        for old, new in REPLACED.items():
            code = code.replace(old, new)
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        made = runpy.run_path(f"{name}.py", run_name="__main__")
        if name == "quick_tour":
            assert len(made["networks"]) == 5 and made["networks"][0](torch.zeros(3, 4)).shape == (3, 2)
        if name == "record":
            assert len(made["snapshots"]) == 20 and made["layout"].num_parameters == 16


def test_blocks_are_those_of_the_documentation():
    """And each of these is on a page."""
    assert all(block in SNIPPETS.values() for language, block in BLOCKS if language == "python")
    shown = set(re.findall(r'--8<-- "(\w+)\.py"', TEXT))
    assert shown | {"hub"} == set(SNIPPETS)


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: pdiff_hf\.(\w+)$", TEXT, re.MULTILINE)
    assert sorted(shown) == sorted(pdiff_hf.__all__)


def test_what_the_readme_links_to_is_there():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path


def test_the_readme_is_one_page():
    assert len(README.split()) <= 1100
