"""Two hosts, which are network namespaces of this machine, carry out a run as one process does, also after one died."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from run.test_processes import SETTINGS, assert_same_tensors, flags_of
from support.run_server import Result, RunServer, together

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


def start(servers, hosts: list[str], tmp_path: Path, output_dir: str, *flags: str) -> list[Result]:
    """One process of `scripts/train.py` a host, each with a working folder of its own."""

    def run(server: RunServer, ranks: dict[str, str]) -> Result:
        i = int(ranks["RANK"])
        (tmp_path / f"host{i}").mkdir(exist_ok=True)
        environment = ranks | {"GLOO_SOCKET_IFNAME": f"cable{i}"}
        options = {"environment": environment, "namespace": hosts[i], "cwd": tmp_path / f"host{i}"}
        return server.run(output_dir, *FLAGS, *flags, **options)

    return together(servers, run, ADDRESSES)


@pytest.mark.slow
def test_hosts_without_a_folder_in_common_are_told(hosts, two_servers, tmp_path):
    for process in start(two_servers, hosts, tmp_path, "out"):  # in the working folder of each
        message = "does not see what the main process writes to 'out': output_dir has to be one folder"
        assert process.status == 1 and message in process.errors


@pytest.mark.slow
def test_a_host_that_dies_is_told_and_the_run_goes_on(hosts, two_servers, tmp_path):
    one = two_servers[0].run(tmp_path / "one", *FLAGS, "--gradient_accumulation_steps=2")
    assert one.status == 0, one.errors
    shared = tmp_path / "two"
    checkpoints = shared / "checkpoints" / "denoiser"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(start, two_servers, hosts, tmp_path, str(shared))
        while not running.done() and not list(checkpoints.glob("checkpoint-*")):
            time.sleep(0.01)
        assert not running.done(), running.result()
        two_servers[1].kill()
    first, second = running.result()
    assert (first.status, second.status) == (1, -signal.SIGKILL)
    line = next(line for line in first.errors.splitlines() if line.startswith("error: "))
    assert line.startswith("error: another process of this run has ended or cannot be reached any more")
    assert line.endswith("start all processes again with --resume_from_checkpoint latest")
    assert (shared / "stages" / "autoencoder.json").is_file() and not (shared / "stages" / "denoiser.json").exists()

    again = start(two_servers, hosts, tmp_path, str(shared), "--resume_from_checkpoint=latest")
    assert [process.status for process in again] == [0, 0], again
    assert "[3/4] autoencoder: already finished; reusing" in again[0].errors
    assert_same_tensors(tmp_path / "one", shared)
