"""Two hosts, which are network namespaces of this machine, carry out a run as one process does, also after one died."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run.test_processes import SETTINGS, assert_same_tensors, flags_of
from support.run_server import ROOT

FLAGS = flags_of(SETTINGS | {"denoiser_steps": 40})
FLAGS += ["--stages", "base", "collect", "autoencoder", "denoiser"]
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces with a cable between them, `cable0` in the first and `cable1` in the second."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (of iproute2)")
    names = [f"pdiff{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for i, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"cable{i}")
            ip("-n", name, "link", "set", f"cable{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(hosts: list[str], tmp_path: Path, output_dir: str, *flags: str) -> list[subprocess.Popen]:
    """One process of `scripts/train.py` a host, each with a working folder of its own; what it says is in `log`."""
    processes = []
    for i, host in enumerate(hosts):
        home = tmp_path / f"host{i}"
        home.mkdir(exist_ok=True)
        launch = [f"--nnodes={len(hosts)}", f"--node_rank={i}", f"--master_addr={ADDRESSES[0]}", "--master_port=29511"]
        program = [str(ROOT / "scripts/train.py"), f"--output_dir={output_dir}", *FLAGS, *flags]
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": f"cable{i}",
            "HF_HOME": str(home / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with (home / "log").open("w") as log:
            command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", *launch, *program]
            processes.append(subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log))
    return processes


def outputs(tmp_path: Path, processes: list[subprocess.Popen]) -> list[str]:
    for process in processes:
        process.wait(timeout=2000)
    return [(tmp_path / f"host{i}" / "log").read_text() for i in range(len(processes))]


@pytest.mark.slow
def test_hosts_without_a_folder_in_common_are_told(hosts, tmp_path):
    processes = start(hosts, tmp_path, "out")  # in the working folder of each
    for text in outputs(tmp_path, processes):
        assert "does not see what the main process writes to 'out': output_dir has to be one folder" in text
    assert all(process.returncode for process in processes)


@pytest.mark.slow
def test_a_host_that_dies_is_told_and_the_run_goes_on(hosts, run_server, tmp_path):
    one = run_server.run(tmp_path / "one", *FLAGS, "--gradient_accumulation_steps=2")
    assert one.status == 0, one.errors
    shared = tmp_path / "two"
    processes, checkpoints = start(hosts, tmp_path, str(shared)), shared / "checkpoints" / "denoiser"
    while all(process.poll() is None for process in processes) and not list(checkpoints.glob("checkpoint-*")):
        time.sleep(0.01)
    assert all(process.poll() is None for process in processes), outputs(tmp_path, processes)
    on_second = subprocess.run(["ip", "netns", "pids", hosts[1]], capture_output=True, text=True, check=True)
    subprocess.run(["kill", "-KILL", *on_second.stdout.split()], check=True)
    first, _ = outputs(tmp_path, processes)
    line = next(line for line in first.splitlines() if line.startswith("error: "))
    assert line.startswith("error: another process of this run has ended or cannot be reached any more")
    assert line.endswith("start all processes again with --resume_from_checkpoint latest")
    assert (shared / "stages" / "autoencoder.json").is_file() and not (shared / "stages" / "denoiser.json").exists()

    processes = start(hosts, tmp_path, str(shared), "--resume_from_checkpoint=latest")
    texts = outputs(tmp_path, processes)
    assert [process.returncode for process in processes] == [0, 0], texts
    assert "[3/4] autoencoder: already finished; reusing" in texts[0]
    assert_same_tensors(tmp_path / "one", shared)
