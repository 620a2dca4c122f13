"""Networks that people have collected: archives, lists in one file, several architectures, one basin or many."""

import logging
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.blobs import Blobs, Net
from torch import nn

from pdiff_hf import LayoutError, ParameterLayout
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.snapshots import SnapshotError, import_snapshots
from pdiff_hf.snapshots.barrier import check_basins

NETWORK = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
LAYOUT = ParameterLayout.from_state_dict(NETWORK.state_dict(), list(NETWORK.state_dict()))


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.safetensors", b"")


def write_tar(path):
    with tarfile.open(path, "w:gz"):
        pass


ODD = {
    "networks.zip": (write_zip, "networks.zip is an archive: unpack it, and name the folder"),
    "networks.tar.gz": (write_tar, "networks.tar.gz is an archive: unpack it"),
    "object.npz": (lambda path: np.savez(path, a=np.array([{}])), "is not a whole file of numbers of numpy.savez"),
    "zeros.npz": (lambda path: np.savez_compressed(path, a=np.zeros(10**6)), "nor those of numpy.savez"),
    "network.onnx": (lambda path: path.write_bytes(b"onnx"), "of a format that is not read"),
    "list.pt": (
        lambda path: torch.save([NETWORK.state_dict()] * 3, path),
        r"holds 3 state dicts in a list; PDiffTrainer\(snapshots=torch.load\(FILE\)\) takes them",
    ),
    "matrix.pt": (
        lambda path: torch.save(torch.zeros(5, LAYOUT.num_parameters), path),
        r"holds a tensor of shape \(5, 23\), .*PDiffTrainer",
    ),
    "module.pt": (lambda path: torch.save(NETWORK, path), "holds more than tensors, and reading it could run code"),
}


@pytest.mark.parametrize("name", ODD)
def test_networks_in_other_files(name, tmp_path):
    write, message = ODD[name]
    write(tmp_path / name)
    with pytest.raises(SnapshotError, match=message):
        import_snapshots([str(tmp_path / name)], LAYOUT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), nn.Linear(4, 2)])
def test_networks_of_several_architectures_or_widths(other, tmp_path):
    for name, network in (("a", NETWORK), ("b", other)):
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(
        LayoutError, match="b.safetensors': .*import each kind with a --model and an --output_dir of its"
    ):
        import_snapshots([str(tmp_path)], LAYOUT, tmp_path / "out")
    with pytest.raises(LayoutError) as error:  # where none fits, it is not the zoo that is at fault
        import_snapshots([str(tmp_path / "b.safetensors")], LAYOUT, tmp_path / "out")
    assert "each kind" not in str(error.value)


@pytest.fixture(scope="module")
def blobs() -> tuple[Blobs, NetworkRunner, torch.Tensor]:
    """A task, what runs networks on it, and the parameters of a trained one."""
    task, network = Blobs(), Net().eval()
    with torch.no_grad():  # the sum of the coordinates tells the clouds apart
        network.body.weight.fill_(1.0)
        network.body.bias.fill_(-2.0)
        network.head.weight.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))
        network.head.bias.zero_()
    layout = ParameterLayout.from_state_dict(network.state_dict(), ["body.weight", "body.bias", "head.weight"])
    return task, NetworkRunner(network, layout), layout.flatten(network.state_dict())


@pytest.mark.parametrize("aligned", [False, True])
def test_snapshots_from_many_initialisations(aligned, blobs, caplog):
    """With all units negated on both sides, a network is the same function in another basin."""
    task, models, parameters = blobs
    with caplog.at_level(logging.INFO):
        barrier = check_basins(task, models, torch.stack([parameters, -parameters]), [0, 1], [0, 0], aligned=aligned)
    assert barrier["barrier"] > 20 and barrier["difference"] == 0
    (message,) = (record.getMessage() for record in caplog.records if "different basins" in record.getMessage())
    assert ("--align" in message) == (not aligned) and "a generator for each basin" in message


def test_snapshots_that_hardly_differ(blobs, caplog):
    task, models, parameters = blobs
    rows = parameters + 1e-4 * torch.randn(6, len(parameters), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO):
        assert check_basins(task, models, rows, [0] * 6, range(6))["difference"] == 0
    assert "the snapshots hardly differ: of 90 validation examples" in caplog.text
    assert "a higher collect_learning_rate or collect_every makes them differ more" in caplog.text


def test_snapshots_that_differ(blobs, caplog):
    task, models, parameters = blobs
    rows = parameters + 0.5 * torch.randn(6, len(parameters), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO):
        assert check_basins(task, models, rows, [0] * 6, range(6))["difference"] > 5
    assert "hardly differ" not in caplog.text
