"""
Runs the scripts again and again, and does something to `scripts/train.py` at a moment that a test chooses.

Most of the time of a short run is spent on imports. So a server process imports what the scripts do and nothing else,
and forks for every run; the fork becomes the script, with its own arguments, output and signals.

A moment is a stage and a number n: when the stage is the first that is not finished, and the run is about to make its
n-th operation on a file in its output folder. What is on the disk changes at such operations and at no other time. Or
it is the end of a path that is about to be renamed or removed.
"""

import ctypes
import hashlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = ("base", "collect", "autoencoder", "denoiser", "evaluate")
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
    "autoencoder_args": {"warmup_steps": 3},
    "denoiser_steps": 30,
    "denoiser_batch_size": 8,
    "num_models": 6,
    "num_inference_steps": 4,
    "baseline_models": 2,
    "checkpointing_steps": 7,
}
FLAGS = [f"--{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in RECIPE.items()]
RESUME = [*FLAGS, "--resume_from_checkpoint=latest"]
MOST_SECONDS = 3600  # of a script


def files(folder: Path) -> dict[str, str]:
    """A digest of every file of a run but for `recipe.yaml`, which says whether it was resumed, and where it is."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "recipe.yaml"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")


@dataclass
class Result:
    """
    Args:
        status (`int`): Exit status, or minus the number of the signal that ended it.
        output, errors (`str`): What it wrote.
        operations (`dict[str, int]`): Operations on files in each stage, of a run that nothing was done to.
        reached (`bool`): Whether it came to the moment.
    """

    status: int
    output: str
    errors: str
    operations: dict[str, int]
    reached: bool


class RunServer:
    """A context manager; `run` runs a script, `program` some code."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "RunServer":
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background has them ignore Ctrl-C, and new processes would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(
        self,
        output_dir: Path,
        *arguments: str,
        at: tuple[str, int] | str | None = None,
        action: str = "kill",
        delay: float = 0.0,
        script: str = "train",
        environment: dict[str, str] | None = None,
        namespace: str = "",
        cwd: Path | str = ".",
    ) -> Result:
        """
        Runs a script with `--output_dir`.

        Args:
            at (`tuple[str, int]` or `str`, *optional*): The moment: a stage and a number from 1, or the end of a path.
            action (`str`): `kill` and `interrupt` send SIGKILL and SIGINT; `fill` fills the file system that the output
                folder is on, with a file `ballast` beside it; `limit` allows no file above 4 KiB any more.
            delay (`float`): Seconds from the moment to the signal.
            script (`str`): Name of the script.
            environment (`dict[str, str]`, *optional*): More variables.
            namespace (`str`): Name of the network that it sees, as `ip netns` gives it.
            cwd (`Path` or `str`): Its working folder.
        """
        return self._send(
            path=str(ROOT / "scripts" / f"{script}.py"),
            output_dir=str(output_dir),
            arguments=[*map(str, arguments), f"--output_dir={output_dir}"],
            at=at,
            action=action,
            delay=delay,
            environment=environment or {},
            namespace=namespace,
            cwd=str(cwd),
        )

    def program(self, code: str, *arguments: object, environment: dict[str, str] | None = None) -> Result:
        """Runs some code, with arguments in `sys.argv[1:]`."""
        path = self.folder / "program.py"
        path.write_text(code, encoding="utf-8")
        return self._send(path=str(path), arguments=list(map(str, arguments)), environment=environment or {})

    def kill(self) -> None:
        """Ends what runs now."""
        pid = self._process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)

    def _send(self, **job: object) -> Result:
        nothing = {"output_dir": "/nowhere", "at": None, "action": "kill", "delay": 0.0, "environment": {}}
        job = nothing | {"namespace": "", "cwd": "."} | job | {"folder": str(self.folder)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        texts = {name: (self.folder / name).read_bytes().decode(errors="replace") for name in ("output", "errors")}
        return Result(**answer, **texts)


def together(
    servers: Sequence[RunServer], start: Callable[[RunServer, dict[str, str]], Result], hosts: Sequence[str] = ()
) -> list[Result]:
    """
    Starts one process of a run on each server, with the variables that a launcher gives to them.

    Args:
        start: Takes the server and these variables.
        hosts: Addresses, where each process has one of its own.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    main = {"MASTER_ADDR": hosts[0] if hosts else "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(servers))}
    ranks = [main | {"RANK": str(i), "LOCAL_RANK": "0" if hosts else str(i)} for i in range(len(servers))]
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(start, servers, ranks))


def serve() -> None:
    from PIL import Image

    import pdiff_hf.run.export
    import pdiff_hf.run.trainer
    import pdiff_hf.scripts.costs
    import pdiff_hf.scripts.opponents
    import pdiff_hf.scripts.saved
    import pdiff_hf.scripts.tuned_baselines  # noqa: F401
    from pdiff_hf.evaluation import plots

    Image.init()
    plots.draw_figures = lambda *args, **kwargs: None  # which take longer than all else

    for line in sys.stdin:
        job = json.loads(line)
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            _become_the_script(job, write_end)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            # The script says that the moment has come, or how many operations there were, or just ends.
            said = pipe.readline().strip()
            if said == "now" and job["action"] in ("kill", "interrupt"):
                time.sleep(job["delay"])
                os.kill(child, signal.SIGKILL if job["action"] == "kill" else signal.SIGINT)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        operations = json.loads(said) if said.startswith("{") else {}
        print(json.dumps({"status": status, "operations": operations, "reached": said == "now"}), flush=True)


def _become_the_script(job: dict, pipe: int) -> None:
    folder = Path(job["folder"])
    for descriptor, name in ((1, "output"), (2, "errors")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, descriptor)
    signal.alarm(MOST_SECONDS)
    if job["namespace"]:
        with open(f"/run/netns/{job['namespace']}") as network:
            assert ctypes.CDLL(None).setns(network.fileno(), 0) == 0
    os.chdir(job["cwd"])
    os.environ |= job["environment"]
    sys.argv = [job["path"], *job["arguments"]]
    sys.path.insert(0, os.path.dirname(job["path"]))  # as for a script that Python starts
    sys.addaudithook(_watch(job, pipe))
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        status = error.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if job["at"] is None:
        os.write(pipe, json.dumps(_counts).encode())
    os._exit(status)


_counts: Counter[str] = Counter()


def _watch(job: dict, pipe: int):
    output_dir = job["output_dir"]
    state = {"inside": False, "done": job["at"] is None}

    def hook(event: str, arguments: tuple) -> None:
        if event not in EVENTS or state["inside"] or not str(arguments[0]).startswith(output_dir + "/"):
            return
        if str(arguments[0]).endswith(".lock"):
            return
        state["inside"] = True
        finished = [stage for stage in STAGES if os.path.exists(f"{output_dir}/stages/{stage}.json")]
        stage = next((stage for stage in STAGES if stage not in finished), "finished")
        _counts[stage] += 1
        if isinstance(job["at"], str):
            now = event in ("os.rename", "os.remove") and str(arguments[0]).endswith(job["at"])
        else:
            now = not state["done"] and stage == job["at"][0] and _counts[stage] >= job["at"][1]
        if now and not state["done"]:
            state["done"] = True
            if job["action"] == "limit":
                os.ftruncate(2, 0)  # what it writes now must be seen, and the limit is for all files
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            os.write(pipe, b"now\n")
            if job["action"] in ("kill", "interrupt") and not job["delay"]:
                time.sleep(60)  # the signal comes before the operation
        if state["done"] and job["action"] == "fill":
            _fill(Path(output_dir).parent / "ballast")  # again and again, because what is removed makes space
        state["inside"] = False

    return hook


def _fill(ballast: Path) -> None:
    with open(ballast, "ab", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


if __name__ == "__main__":
    serve()
