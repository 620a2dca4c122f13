"""Where people keep what a run writes: other users, other disks, links."""

import os
import stat
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from support.pipelines import make_network, make_pipeline
from support.run_server import RECIPE

from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.folder import RunError, RunFolder
from pdiff_hf.run.stages import STAGES
from pdiff_hf.scripts import explore
from pdiff_hf.utils.files import check_writable, replacing


@pytest.fixture(params=[0o022, 0o002, 0o077], ids="umask {:03o}".format)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def test_a_colleague_reads_the_weights(umask, tmp_path):
    """A shared folder, or a server that runs as another user: every file has what the umask gives to new files."""
    make_pipeline(make_network()).save_pretrained(tmp_path / "pipeline")
    with replacing(tmp_path / "a.safetensors") as part:
        save_file({"a": torch.zeros(1)}, part)
    with replacing(tmp_path / "folder") as part:
        (part / "inside").mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, part / "inside" / "a.safetensors")
    found = modes(tmp_path)
    assert len([name for name in found if name.endswith(".safetensors")]) == 5
    for name, mode in found.items():
        expected = 0o777 if (tmp_path / name).is_dir() else 0o666
        assert mode == expected & ~umask, name


def test_a_file_that_its_owner_opened_to_others_stays_so(tmp_path):
    with replacing(tmp_path / "folder") as part:
        part.mkdir()
        (part / "script").write_text("", encoding="utf-8")
        (part / "script").chmod(0o755)
    assert modes(tmp_path)["folder/script"] == 0o755


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_downloaded_can_be_read_when_it_is_unpacked(whole, tmp_path):
    source = explore.Source(make_pipeline(make_network()))
    rows = torch.zeros(2, source.pipe.autoencoder.layout.num_parameters)
    explore.write_zip(source, rows, tmp_path / "networks.zip", whole)
    with zipfile.ZipFile(tmp_path / "networks.zip") as archive:
        assert {info.external_attr >> 16 for info in archive.infolist()} == {0o644}


@pytest.mark.parametrize("there", [True, False])
def test_results_go_to_the_larger_disk_that_a_link_leads_to(there, tmp_path):
    run, disk = RunFolder(tmp_path / "run"), tmp_path / "disk" / "snapshots"
    run.path.mkdir()
    (run / "snapshots").symlink_to(disk)
    if there:
        disk.mkdir(parents=True)
    with run.replacing(STAGES["collect"]) as folder:
        (folder / "data").write_text("new", encoding="utf-8")
    assert (run / "snapshots").is_symlink() and (disk / "data").read_text(encoding="utf-8") == "new"
    assert [path.name for path in disk.parent.iterdir()] == ["snapshots"]


def test_a_link_to_somebody_elses_snapshots_is_not_replaced(tmp_path):
    run, theirs = RunFolder(tmp_path / "run"), tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "data").write_text("theirs", encoding="utf-8")
    run.path.mkdir()
    (run / "snapshots").symlink_to(theirs)
    with pytest.raises(RunError, match=r"is a link to .*, which is not empty.*--snapshots"):  # noqa: SIM117
        with run.replacing(STAGES["collect"]):
            pass
    assert (run / "snapshots").is_symlink() and (theirs / "data").read_text(encoding="utf-8") == "theirs"


def test_such_a_link_is_refused_before_any_work(tmp_path, monkeypatch):
    from pdiff_hf.run.trainer import prepare

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "data").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "snapshots").symlink_to(tmp_path / "theirs")
    with pytest.raises(RunError, match="stage collect"):
        prepare(PDiffConfig(**RECIPE, output_dir=str(tmp_path / "run")))


def test_an_output_folder_on_a_disk_that_is_not_mounted(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for folder in (tmp_path / "out", tmp_path / "out" / "digits"):
        with pytest.raises(ValueError, match="is a link to .*disk', which does not exist; make that folder"):
            check_writable(folder)
    (tmp_path / "disk").mkdir()
    check_writable(tmp_path / "out" / "digits")
