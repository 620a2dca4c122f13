"""
The Hub of all tests is a server on loopback: no test can reach the real one, and none uses its user's token or cache.

The libraries read these variables when they are imported, so they are set before any test module is; processes that
tests start inherit them.
"""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from support.hub_server import HubServer, User
from support.run_server import FLAGS, STAGES, RunServer

assert "huggingface_hub" not in sys.modules, "imported before its settings could be made"
USERS = {
    "alice-token": User("alice", organizations=("lab",)),
    "reader-token": User("alice", can_write=False),
    "bob-token": User("bob"),
}
SERVER = HubServer(USERS)
CACHE = tempfile.TemporaryDirectory(prefix="pdiff-tests-")
os.environ |= {
    "HF_ENDPOINT": SERVER.url,
    "HF_HOME": CACHE.name,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_TOKEN": "alice-token",
    # The networks of the tests are small, and bits are only the same between processes with as many threads.
    "OMP_NUM_THREADS": "1",
}


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the long forms of the tests of reliability")


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether the long forms of the tests of reliability were asked for."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session", autouse=True)
def hub_server():
    """For all tests: whoever asks for a repository that does not exist is told so, and at once."""
    with SERVER:
        yield


@pytest.fixture
def hub(monkeypatch):
    """The server, empty."""
    SERVER.reset()
    if Version(version("huggingface_hub")) < Version("1"):  # asks the real Hub about a card, whatever HF_ENDPOINT says
        monkeypatch.setattr("huggingface_hub.RepoCard.validate", lambda *args, **kwargs: None)
    return SERVER


@pytest.fixture(scope="session")
def run_server(tmp_path_factory):
    """Runs scripts and programs in forks of one process that has imported what they need."""
    with RunServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def two_servers(run_server, tmp_path_factory):
    """For what two processes do together."""
    with RunServer(tmp_path_factory.mktemp("second")) as second:
        yield run_server, second


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A run on digits, finished with all figures; who changes its folder copies it."""
    from support.recipes import TINY
    from support.runs import finish_in

    return finish_in(tmp_path_factory.mktemp("digits") / "out", TINY)


@pytest.fixture(scope="session")
def family_run(tmp_path_factory):
    """As `digits_run`, for a family of tasks."""
    from support.recipes import TINY_FAMILY
    from support.runs import finish_in

    return finish_in(tmp_path_factory.mktemp("family") / "out", TINY_FAMILY)


@pytest.fixture(scope="session")
def quick_classifier():
    """The classifier whose features sets of data are compared in takes most of an evaluation: a tenth of its steps."""
    from pdiff_hf.evaluation import placing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "CLASSIFIER", dataclasses.replace(placing.CLASSIFIER, num_steps=50))
        yield


@pytest.fixture(scope="session")
def data_run(tmp_path_factory, quick_classifier):
    """As `digits_run`, of networks that are data."""
    from support.recipes import TINY_DATA
    from support.runs import finish_in

    return finish_in(tmp_path_factory.mktemp("data") / "out", TINY_DATA)


@pytest.fixture(scope="session")
def whole_run(run_server, tmp_path_factory):
    """The folder of a run that nothing happened to, and how many operations on files each of its stages made."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = run_server.run(folder, *FLAGS)
    assert result.status == 0, result.errors
    assert set(result.operations) >= set(STAGES)
    return folder, result.operations


@pytest.fixture
def without_figures(monkeypatch):
    """Figures take longer than everything else."""
    monkeypatch.setattr("pdiff_hf.evaluation.plots.draw_figures", lambda *args, **kwargs: None)


@pytest.fixture
def room(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder in which a test works. Nothing may appear beside it, and no file may call itself `canary`."""
    (tmp_path / "room").mkdir()
    monkeypatch.chdir(tmp_path / "room")
    yield tmp_path / "room"
    assert [path.name for path in tmp_path.iterdir()] == ["room"]
    assert not list(tmp_path.rglob("canary*")) and not Path("/tmp/canary").exists()


@pytest.fixture
def quiet() -> Iterator[None]:
    """diffusers and transformers have a lot to say about odd files."""
    import diffusers
    import transformers

    levels = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(50)
        library.utils.logging.disable_progress_bar()
    yield
    for library, level in zip((diffusers, transformers), levels, strict=True):
        library.utils.logging.set_verbosity(level)
        library.utils.logging.enable_progress_bar()
