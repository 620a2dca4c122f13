"""The main job is killed at random moments of all its stages, or stopped, and ends as if nothing had happened."""

import hashlib
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_server import ROOT, STAGES, RunServer

RECIPE = {
    "model": "mlp_mini",
    "image_size": 64,
    "max_train_samples": 300,
    "max_eval_samples": 60,
    "base_epochs": 4,
    "base_batch_size": 32,
    "num_snapshots": 16,
    "collect_batch_size": 32,
    "latent_dim": 8,
    "autoencoder_steps": 20,
    "autoencoder_batch_size": 8,
    "autoencoder_warmup_steps": 3,
    "denoiser_steps": 30,
    "denoiser_batch_size": 8,
    "num_models": 6,
    "num_inference_steps": 4,
    "baseline_models": 2,
    "checkpointing_steps": 7,
}
FLAGS = [f"--{key}={value}" for key, value in RECIPE.items()]
RESUME = [*FLAGS, "--resume_from_checkpoint=latest"]


def files(folder: Path) -> dict[str, str]:
    """A digest of every file of a run but for `recipe.yaml`, which says whether it was resumed, and where it is."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "recipe.yaml"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RunServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A run that nothing happened to, and how many operations on files each of its stages made."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = server.run(folder, *FLAGS)
    assert result.status == 0, result.errors
    assert set(result.operations) >= set(STAGES)
    return folder, result.operations


@pytest.mark.slow
def test_killed_at_random_moments_of_all_stages_it_ends_with_the_same_bits(server, whole, full, tmp_path):
    """With `--full` 24 times, otherwise 12 times. The last run is that of the command itself."""
    expected, operations = whole
    chance = random.Random(0)
    times = 4 if full else 2
    folder = tmp_path / "out"
    killed = []
    for stage in STAGES:
        for _ in range(times):
            # Such that the stage is not finished before it was killed so many times.
            at = chance.randint(1, operations[stage] // times)
            # At once, which is just before the operation, or a little after, which may be in the middle of it.
            delay = chance.choice([0.0, chance.uniform(0.0, 0.02)])
            result = server.run(folder, *RESUME, at=(stage, at), delay=delay)
            assert result.reached and result.status == -signal.SIGKILL, (stage, at, result)
            killed.append((stage, at, delay))
    print("killed at", killed)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", ROOT / "scripts/train.py"]
    last = subprocess.run([*command, f"--output_dir={folder}", *RESUME], capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert files(folder) == files(expected)


@pytest.mark.slow
def test_stopped_in_every_stage_it_says_how_to_go_on_and_does(server, whole, tmp_path):
    expected, operations = whole
    chance = random.Random(1)
    folder = tmp_path / "out"
    for stage in STAGES:
        # Not among the last operations, so that the stop comes within the stage.
        at = chance.randint(1, operations[stage] * 3 // 4)
        result = server.run(folder, *RESUME, at=(stage, at), action="interrupt")
        assert result.reached and result.status == 1, (stage, at, result)
        last_line = result.errors.strip().splitlines()[-1]
        assert last_line.startswith("stopped; go on with: accelerate launch ")
        assert last_line.endswith(" --resume_from_checkpoint latest") and f"--output_dir={folder}" in last_line
        assert "Traceback" not in result.errors
        assert not [path for path in folder.rglob("*.part") if path.name != ".snapshots.part"]
    result = server.run(folder, *RESUME)
    assert result.status == 0, result.errors
    assert files(folder) == files(expected)
