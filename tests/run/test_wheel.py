"""The commands of an installed package: `python -m pdiff_hf train`, under `accelerate launch` too."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.run_server import FLAGS, ROOT

import pdiff_hf
from pdiff_hf.__main__ import COMMANDS


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The unpacked wheel."""
    version = importlib.metadata.version("setuptools")
    if int(version.partition(".")[0]) < 77:
        pytest.skip(f"a wheel needs setuptools >= 77, here is {version}")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because a build leaves files behind
    for name in ("pdiff_hf", "pipelines", "scripts"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith(f"pdiff_hf-{pdiff_hf.__version__}-")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def call(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed), "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_command_is_there(installed, tmp_path):
    assert not (installed / "pdiff_hf" / "scripts" / "benchmarks").exists()
    for command in COMMANDS:
        if command == "app":
            pytest.importorskip("gradio", reason="the page needs the extra `app`")
        result = call(installed, tmp_path, "-m", "pdiff_hf", command, "--help")
        assert result.returncode == 0 and f"usage: python -m pdiff_hf {command}" in result.stdout, result.stderr
    result = call(installed, tmp_path, "-m", "pdiff_hf", "bake")
    assert result.returncode == 2 and "{train,collect,generate,evaluate,push,app}" in result.stderr


@pytest.mark.slow
def test_training_under_the_launcher_with_a_recipe_of_the_package(installed, tmp_path):
    arguments = ["mlp_mini.yaml", "--dataset=digits", *FLAGS, "--stages", "base", "--output_dir=out"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--mixed_precision=bf16", "-m", "pdiff_hf", "train"]
    result = call(installed, tmp_path, *launch, *arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "base_model" / "model.safetensors").is_file()
    assert "mixed_precision: bf16" in (tmp_path / "out" / "recipe.yaml").read_text()
