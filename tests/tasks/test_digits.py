"""The digits that need no download: whose scans are in which split, and the same images on every processor."""

import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pdiff_hf.tasks import digits


def images_of(split):
    return np.stack([np.asarray(image) for image in split["image"]])


def test_moving_digits_are_the_same_bits_everywhere():
    splits = digits.load_moving_digits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 5744, "validation": 1440, "test": 4495}
    digests = {}
    for name, split in splits.items():
        images = images_of(split)
        assert images.dtype == np.uint8 and images.shape[1:] == (16, 16)
        share = np.bincount(split["label"], minlength=10) / len(split)
        assert (share > 0.08).all() and (share < 0.12).all()
        digests[name] = hashlib.blake2b(images.tobytes(), digest_size=8).hexdigest()
    assert digests == {"train": "4998dc010d6a3f50", "validation": "2764d451f9fe3390", "test": "b64104249c47b51c"}


def test_no_two_splits_share_a_scan(monkeypatch):
    for name in ("MAX_ANGLE", "MAX_SHIFT", "NOISE"):
        monkeypatch.setattr(digits, name, 0)  # so that all images of a scan are the same
    found = {name: set(map(bytes, images_of(split))) for name, split in digits.load_moving_digits.__wrapped__().items()}
    assert {name: len(images) for name, images in found.items()} == {"train": 718, "validation": 180, "test": 899}
    assert len(set.union(*found.values())) == 1797


@pytest.mark.parametrize("max_shift", [0, 1.0])
def test_moving_is_bilinear_interpolation(monkeypatch, max_shift):
    monkeypatch.setattr(digits, "NOISE", 0)
    monkeypatch.setattr(digits, "MAX_SHIFT", max_shift)
    scans = images_of(digits.load_scans()["train"].select(range(50)))
    moved = digits.move(scans, np.random.RandomState(3))
    rng = np.random.RandomState(3)
    angles = np.deg2rad(rng.randint(2 * digits.MAX_ANGLE + 1, size=50) - digits.MAX_ANGLE)
    shift = rng.randint(-round(256 * max_shift), round(256 * max_shift) + 1, size=(2, 50)) / 256  # rows, columns
    turns = torch.tensor(
        [
            [[math.cos(a), -math.sin(a), right], [math.sin(a), math.cos(a), down]]
            for a, down, right in zip(angles, shift[0] / 4, shift[1] / 4, strict=True)
        ]
    )
    turns[:, :, :2] *= 16 * digits.ZOOM / 8  # half an image to half a scan
    grid = F.affine_grid(turns, [50, 1, 16, 16], align_corners=False)
    expected = F.grid_sample(torch.tensor(scans)[:, None].to(grid), grid, align_corners=False)[:, 0].numpy()
    error = np.abs(moved - expected)
    assert error.max() < 10 and error.mean() < 1  # positions are rounded to 1/256 pixels at each step of half a pixel
