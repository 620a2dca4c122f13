"""Batches go to a device whole; to a GPU without waiting for it."""

import pytest
import torch
from accelerate.utils import recursively_apply

from pdiff_hf.utils.devices import to_device

BATCH = {"pixel_values": torch.arange(6.0).view(2, 3), "targets": [{"labels": torch.tensor([1])}], "name": "train"}


def test_all_tensors_of_a_batch_are_moved():
    moved = to_device(BATCH, torch.device("meta"))
    assert moved["pixel_values"].shape == (2, 3) and moved["pixel_values"].device.type == "meta"
    assert moved["targets"][0]["labels"].device.type == "meta" and moved["name"] == "train"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_values():
    moved = recursively_apply(torch.Tensor.cpu, to_device(BATCH, torch.device("cuda")))
    assert torch.equal(moved["pixel_values"], BATCH["pixel_values"])
    assert torch.equal(moved["targets"][0]["labels"], BATCH["targets"][0]["labels"])
