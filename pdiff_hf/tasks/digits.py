"""Data sets that need no download: scikit-learn's 1,797 scans of digits, and the same rotated, shifted and noisy."""

import math
from collections.abc import Mapping
from functools import cache

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

# Scans lie in the file by writer, so that those of a later range are by people whom training has not seen.
SCANS = {"train": slice(0, 718), "validation": slice(718, 898), "test": slice(898, 1797)}
COPIES = {"train": 8, "validation": 8, "test": 5}  # images made from each scan
MAX_ANGLE = 20  # degrees, either way
MAX_SHIFT = 1.0  # pixels of a scan, which has 8 × 8, either way
NOISE = 32  # of 255, either way, twice
SIZE = 16  # pixels a side
ZOOM = 2 / 3  # pixels of a scan to a pixel
# Positions are whole numbers of 1/256 pixels, and chance comes from NumPy's frozen generator, so that the images are
# the same on every processor and with every release.
BITS = 8


@cache
def load_scans() -> Mapping[str, datasets.Dataset]:
    """`digits`: the 8 × 8 scans as they are, 898 to train on and 899 to test on."""
    images, labels = _read()
    half = SCANS["test"].start
    return {"train": _dataset(images[:half], labels[:half]), "test": _dataset(images[half:], labels[half:])}


@cache
def load_all_scans() -> Mapping[str, datasets.Dataset]:
    """`all_digits`: the 8 × 8 scans in one split, for tasks that hold some out by chance."""
    return {"train": _dataset(*_read())}


@cache
def load_moving_digits() -> Mapping[str, datasets.Dataset]:
    """
    `moving_digits`: 16 × 16 images, several of each scan, each with a rotation, a shift and noise of its own. No two
    splits share a scan. The images of one scan are not independent of each other.
    """
    images, labels = _read()
    splits = {}
    for seed, (name, scans) in enumerate(SCANS.items()):
        moved = move(images[scans].repeat(COPIES[name], 0), np.random.RandomState(seed))
        splits[name] = _dataset(moved, labels[scans].repeat(COPIES[name]))
    return splits


def move(scans: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Rotates, shifts and enlarges each of the scans (N, 8, 8) by chance, and adds noise; (N, 16, 16), both uint8."""
    count, side, _ = scans.shape
    one = 1 << BITS
    angles = [math.radians(degrees) for degrees in range(-MAX_ANGLE, MAX_ANGLE + 1)]
    # Fixed-point steps in the scan for half a pixel of the image.
    turns = np.array([[round(f(angle) * ZOOM * one / 2) for f in (math.cos, math.sin)] for angle in angles])
    cos, sin = turns[rng.randint(len(angles), size=count)].T[:, :, None, None]  # (N, 1, 1)
    reach = round(MAX_SHIFT * one)
    shift = rng.randint(-reach, reach + 1, size=(2, count, 1, 1))
    y, x = np.mgrid[1 - SIZE : SIZE : 2, 1 - SIZE : SIZE : 2]  # in half pixels from the centre
    centre = one * (side - 1) // 2
    rows, row_weights = _neighbours(cos * y + sin * x + shift[0] + centre, side)
    columns, column_weights = _neighbours(cos * x - sin * y + shift[1] + centre, side)
    framed = np.pad(scans, ((0, 0), (1, 1), (1, 1))).astype(np.int64)
    index = np.arange(count)[:, None, None]
    moved = np.zeros((count, SIZE, SIZE), dtype=np.int64)
    for row, row_weight in zip(rows, row_weights, strict=True):
        for column, column_weight in zip(columns, column_weights, strict=True):
            moved += framed[index, row, column] * row_weight * column_weight
    noise = rng.randint(-NOISE, NOISE + 1, size=(2, *moved.shape)).sum(0)
    return np.clip((moved >> 2 * BITS) + noise, 0, 255).astype(np.uint8)


def _neighbours(position: np.ndarray, side: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The two pixels of a framed scan around each fixed-point position, and their weights, which add up to 2^BITS."""
    before, fraction = position >> BITS, position & ((1 << BITS) - 1)
    pixels = tuple(np.clip(pixel + 1, 0, side + 1) for pixel in (before, before + 1))
    return pixels, ((1 << BITS) - fraction, fraction)


def _read() -> tuple[np.ndarray, np.ndarray]:
    """The scans, uint8 of shape (1797, 8, 8), and their labels, (1797,)."""
    scans = load_digits()
    return (scans.images * (255 / 16)).round().astype(np.uint8), scans.target


def _dataset(images: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
    classes = datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    features = datasets.Features(image=datasets.Image(), label=classes)
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in images], "label": labels}, features=features
    )


EMBEDDED = {"digits": load_scans, "all_digits": load_all_scans, "moving_digits": load_moving_digits}
