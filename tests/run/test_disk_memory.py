"""A full disk and too little memory, both real: what is said, what is kept, and how it goes on."""

import random
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from support.run_server import FLAGS, RECIPE, RESUME, STAGES, files

from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.trainer import prepare
from pdiff_hf.utils.errors import ResourceError


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 MB, which takes the rights to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["fill", "limit"])
def test_a_full_disk_in_every_stage(run_server, whole_run, full, tmp_path, request, action):
    """The file system is full from a random moment of a stage on; or, which needs no rights, files cannot grow."""
    parent = request.getfixturevalue("small_disk") if action == "fill" else tmp_path
    expected, operations = whole_run
    folder, ballast = parent / "out", parent / "ballast"
    chance = random.Random(action)
    for stage in STAGES:
        for _ in range(3 if full else 1):
            # Not in the second half, so that something is still to be written in this stage.
            at = chance.randint(1, operations[stage] // 2)
            before = finished(folder)
            result = run_server.run(folder, *RESUME, at=(stage, at), action=action)
            assert result.reached and result.status == 1, (stage, at, result)
            errors = [line for line in result.errors.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and f"'{folder}' could not be written whole" in errors[0], result.errors
            where = errors[0].split(": ")[1]
            assert where in ("recipe.yaml", f"stage {stage}")
            assert errors[0].endswith("go on with --resume_from_checkpoint latest")
            assert "Traceback" not in result.errors
            assert finished(folder) == before | finished(folder)
            assert not list(folder.rglob("*.part")) and not list(folder.rglob("part-*"))
            ballast.unlink(missing_ok=True)
    result = run_server.run(folder, *RESUME)
    assert result.status == 0, result.errors
    assert files(folder) == files(expected)


@pytest.mark.slow
def test_a_full_disk_in_other_scripts(run_server, whole_run, tmp_path):
    run, few = whole_run[0], ["--num_models=6", "--num_inference_steps=4", "--baseline_models=1"]
    sources = [run / "pipeline", f"--snapshots={run / 'snapshots'}", "--dataset=digits", "--max_eval_samples=60", *few]
    # No file can grow from the third operation on, when the scores are written.
    result = run_server.run(tmp_path / "report", *sources, script="evaluate", at=("base", 3), action="limit")
    assert result.status == 1 and "error: evaluation: a file in" in result.errors, result.errors
    assert "could not be written whole" in result.errors and "Traceback" not in result.errors

    networks, folder = tmp_path / "networks", tmp_path / "out"
    arguments = [run / "pipeline", "--num_models=20", "--only_generated"]
    assert run_server.run(networks, *arguments, script="generate").status == 0
    shutil.copytree(run / "base_model", folder / "base_model")
    (folder / "stages").mkdir()
    shutil.copy(run / "stages" / "base.json", folder / "stages")
    arguments = [*FLAGS, "--import", networks]
    result = run_server.run(folder, *arguments, script="collect", at=("collect", 3), action="limit")
    assert result.status == 1 and "error: import: a file in" in result.errors, result.errors
    assert not (folder / "snapshots").exists() and not list(folder.rglob("*.part"))


def finished(folder) -> dict[str, str]:
    """Digests of what finished stages have written."""
    return {
        name: digest
        for name, digest in files(folder).items()
        if not name.startswith(("checkpoints", ".", "scores")) and "/." not in name
    }


def test_memory_that_runs_out_in_training_is_told_in_one_line(tmp_path):
    run = prepare(PDiffConfig(**RECIPE | {"output_dir": str(tmp_path / "out")}))
    with pytest.raises(ResourceError) as caught, run.resource_errors("stage base"):
        torch.empty(2**50)
    message = str(caught.value)
    assert message.startswith("stage base: out of memory (") and "can't allocate memory" in message
    assert "--gradient_accumulation_steps" in message and "\n" not in message


def with_little_memory(run_server, program: str, *arguments) -> str:
    """
    Runs a program in a process of its own; what it logs. It calls `limit(MB)` to get that much more memory than it has
    taken so far and no more, and `no_limit()`.
    """
    start = """
import logging, resource, sys, torch
logging.basicConfig(level=logging.WARNING, format="%(message)s")


def limit(megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def no_limit():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    result = run_server.program(start + program, *arguments)
    assert result.status == 0, result.errors
    return result.errors


@pytest.mark.slow
def test_sampling_goes_on_with_fewer_networks_at_once(run_server, tmp_path):
    """
    A block of 8 networks of 200,000 parameters takes some 150 MB. The code that oneDNN compiles for a shape is there
    before memory is short: when there is none left for that, oneDNN may crash.
    """
    program = """
from safetensors.torch import save_file
from pdiff_hf import LatentDenoiser, ParameterAutoencoder, ParameterLayout, PDiffPipeline
from pdiff_hf.training import make_sampling_scheduler
from pdiff_hf.training import make_training_scheduler

torch.manual_seed(0)
layout = ParameterLayout(["weight"], [(200_000,)], ["float32"])
autoencoder = ParameterAutoencoder(layout.to_dict(), latent_dim=4, block_out_channels=(8, 16, 32, 64, 32)).eval()
denoiser = LatentDenoiser(4, block_out_channels=(2, 2)).eval()
pipe = PDiffPipeline(autoencoder, denoiser, make_sampling_scheduler(make_training_scheduler()))
pipe.set_progress_bar_config(disable=True)


def sample():
    return pipe(3, 2, torch.Generator().manual_seed(0), output_type="pt").parameters


with torch.no_grad():
    for size in (8, 4, 2, 1):
        autoencoder.decode(torch.zeros(size, 4))
limit(60)
few = sample()
no_limit()
save_file({"few": few, "many": sample()}, sys.argv[1])
"""
    warnings = with_little_memory(run_server, program, tmp_path / "result.safetensors")
    assert "out of memory with 8 networks at once: going on with 4" in warnings
    result = load_file(tmp_path / "result.safetensors")
    assert result["few"].std() > 0
    torch.testing.assert_close(result["few"], result["many"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_scoring_goes_on_with_fewer_networks_and_examples_at_once(run_server, tmp_path):
    program = """
from safetensors.torch import save_file
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.selection import select_parameters
from pdiff_hf.tasks import ImageClassificationTask


def make_task(num_examples):
    return ImageClassificationTask("mlp_mini", image_size=64, max_train_samples=50, max_eval_samples=num_examples)


torch.manual_seed(0)
model = make_task(2).load_base_model().eval()
layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, "norm"))
networks = layout.flatten(model.state_dict()) + 0.3 * torch.randn(500, layout.num_parameters)
task = make_task(300)
Scorer(make_task(2), model, layout).score("test", networks[:3])  # what is made once, however much is scored
task.load_split("test")
limit(12)
few = Scorer(task, model, layout).score("test", networks)
no_limit()
many = Scorer(task, model, layout).score("test", networks)
save_file({"few": few.log_probs, "many": many.log_probs, "same": few.predictions == many.predictions}, sys.argv[1])
"""
    warnings = with_little_memory(run_server, program, tmp_path / "result.safetensors")
    assert "networks at once: going on with" in warnings and "examples at once: going on with" in warnings
    result = load_file(tmp_path / "result.safetensors")
    assert result["same"].float().mean() > 0.9999
    torch.testing.assert_close(result["few"], result["many"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("num_rows", "num_parameters"), [(60, 300_003), (300, 100_001)])
def test_snapshots_stay_in_their_file(run_server, tmp_path, num_rows, num_parameters):
    """Long rows lie in the file each for itself; of short ones, more than 64 MB lie in several pieces."""
    program = """
from pathlib import Path
from pdiff_hf.snapshots import SnapshotWriter, load_snapshots, parameter_matrix
from pdiff_hf.layout import ParameterLayout

folder, num_rows, num_parameters = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
layout = ParameterLayout(["weight"], [(num_parameters,)], ["float32"])


def row(i):
    return torch.arange(num_parameters, dtype=torch.float32) + i / 7


with SnapshotWriter(folder, layout) as writer:
    for i in range(num_rows):
        writer.write(row(i), step=i, seed=0)
file = folder / "data" / "snapshots.arrow"
before = file.stat().st_mtime_ns


def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


warm = parameter_matrix(load_snapshots(folder)[0].select(range(2)), layout)
first = anonymous()
matrix = parameter_matrix(*load_snapshots(folder))
taken = anonymous() - first
assert matrix.shape == (num_rows, num_parameters)
assert all(torch.equal(matrix[i], row(i)) for i in range(num_rows))
matrix[1] += 1  # a copy of its pages
assert torch.equal(parameter_matrix(*load_snapshots(folder))[1], row(1)) and file.stat().st_mtime_ns == before
some = parameter_matrix(load_snapshots(folder)[0].select([3, 1]), layout)
assert torch.equal(some, torch.stack([row(3), row(1)]))
logging.warning(taken)
"""
    taken = int(with_little_memory(run_server, program, tmp_path / "snapshots", num_rows, num_parameters).split()[-1])
    total = 4 * num_rows * num_parameters
    assert taken < (0.1 if num_parameters > 300_000 else 1.2) * total
