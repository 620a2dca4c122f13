"""Images of every mode, examples that cannot be used, and augmentation."""

import io
import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.data import grey, write_csv, write_parquet
from transformers import BertConfig

from pdiff_hf.networks.prefix_cache import PrefixCache
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.snapshots import load_snapshots, parameter_matrix
from pdiff_hf.tasks.image_classification import ImageClassificationTask
from pdiff_hf.tasks.image_generation import ImageGenerationTask
from pdiff_hf.tasks.images import AUGMENTATIONS, to_8_bits
from pdiff_hf.tasks.text_classification import TextClassificationTask

GREY = np.array([[20, 20], [120, 120]], dtype=np.uint8)
COLOUR = np.stack([GREY, GREY + 10, GREY + 20], axis=-1)


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(128)
    return image


def palette_with_alpha() -> Image.Image:
    image = Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = bytes([0, 255])
    return image


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.fromarray(GREY), "png", GREY),
        (Image.fromarray(GREY.astype("<u2") * 257), "png", GREY),
        (Image.fromarray(GREY.astype("<u2") * 257), "tiff", GREY),
        (Image.fromarray(GREY.astype(">u2") * 257), "tiff", GREY),
        (Image.fromarray(GREY.astype("i4")), "tiff", GREY),
        (Image.fromarray(GREY > 50), "png", 255 * (GREY > 50)),
        (Image.fromarray(COLOUR), "png", COLOUR),
        (with_alpha(Image.fromarray(COLOUR)), "png", COLOUR),
        (with_alpha(Image.fromarray(GREY)), "png", GREY),  # LA
        (palette_with_alpha(), "png", COLOUR),
        (Image.fromarray(COLOUR).convert("CMYK"), "tiff", COLOUR),
    ],
)
@pytest.mark.parametrize("mode", [None, "L"])  # of the column, which is not to clip what is stored with more bits
def test_every_mode_keeps_its_brightness(image, kind, expected, mode, tmp_path):
    file = io.BytesIO()
    image.save(file, kind)
    stored, label = {"bytes": file.getvalue(), "path": None}, datasets.Value("int64")
    columns = {"image": [stored] * 20, "label": [0, 1] * 10}
    write_parquet(tmp_path / "train.parquet", columns, {"image": datasets.Image(mode=mode), "label": label})
    split = ImageClassificationTask("test_resnet", str(tmp_path), image_size=2).load_split("test")
    mean, std = (
        255 * torch.tensor(values).view(-1, 1, 1) for values in (split.preparation.mean, split.preparation.std)
    )
    pixels = (split.__getitems__([0])["pixel_values"] * std + mean)[0].round()
    expected = np.stack([expected] * 3) if expected.ndim == 2 else np.moveaxis(expected, -1, 0)
    assert torch.equal(pixels, torch.as_tensor(expected).float())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GREY.astype("i4") * 257, "32-bit integers from 5140 to 30840, of unknown range"),
        (-GREY.astype("i4"), "32-bit integers from -120 to -20"),
        (GREY.astype("f4") / 255, "floats from 0.07.* of unknown range; save it with 8 or 16 bits"),
    ],
)
def test_numbers_of_unknown_range_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_8_bits(Image.fromarray(values))
    image = Image.fromarray(values)
    write_parquet(
        tmp_path / "train.parquet", {"image": [image] * 20, "label": [0, 1] * 10}, {"label": datasets.Value("int64")}
    )
    with pytest.raises(ValueError, match=f"split train, column image, row .*: it holds {message}"):
        ImageClassificationTask("test_resnet", str(tmp_path), image_size=8).load_split("train")


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_bad_images(path):
    """`unsorted`, `damaged` and `text` in folders of files, `empty` in a table: each has one thing that is wrong."""
    whole = jpeg()
    for name, bad in {"damaged": whole[: len(whole) // 2], "text": b"not an image"}.items():
        for c in "ab":
            (path / name / "train" / c).mkdir(parents=True)
            for i in range(20):
                (path / name / "train" / c / f"{i:02}.jpg").write_bytes(bad if (c, i) == ("b", 7) else whole)
    for split in ("unsorted/train", "unsorted_too/train", "unsorted_too/test"):
        (path / split).mkdir(parents=True)
        for i in range(20):
            (path / split / f"{i}.jpg").write_bytes(whole)
    labels = {"label": datasets.ClassLabel(names=["a", "b"])}
    write_parquet(path / "empty" / "train.parquet", {"image": [None] + [grey()] * 39, "label": [0, 1] * 20}, labels)
    columns = {"image": [grey()] * 40, "label": [0, 1] * 19 + [None, -1]}
    write_parquet(path / "unlabelled" / "train.parquet", columns, labels)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "split train, column image, row 0: it is empty; fix it, or leave it out with skip_bad_examples"),
        ("damaged", r"split train, column image, row 27 \(file '.*b/07.jpg'\): it cannot be read \(.*truncated"),
        ("text", r"split train, column image, row 27 \(file '.*b/07.jpg'\): it cannot be read \(.*cannot identify"),
        ("unlabelled", r"split train, column label, row 38: it is empty \(and 1 more rows\)"),
        ("unsorted", "has images and no label column; images in a folder get their classes from its sub-folders"),
        (
            "unsorted_too",
            "split train, column label, row 0: it is empty, and no other .* from its sub-folders",
        ),
    ],
)
def test_images_that_cannot_be_used_are_named_or_left_out(name, message, tmp_path, caplog):
    write_bad_images(tmp_path)
    arguments = {"model": "test_resnet", "dataset": str(tmp_path / name), "image_size": 8}

    def load(**changes):
        task = ImageClassificationTask(**arguments | changes)
        return [len(task.load_split(split)) for split in ("train", "validation", "test")]

    with pytest.raises(ValueError, match=f"dataset '{tmp_path / name}'.*{message}") as caught:
        load()
    assert len(str(caught.value).splitlines()) == 1
    if "unsorted" not in name:
        caplog.set_level(logging.WARNING)
        left = 38 if name == "unlabelled" else 39
        assert sum(load(skip_bad_examples=True)) == left
        assert f"{40 - left} of 40 examples are left out, the first is dataset" in caplog.text
    else:
        with pytest.raises(ValueError, match=message):
            load(skip_bad_examples=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x y", ""), "column label, row 4: it is empty"),
        (("", "a"), "column text, row 4: it is empty"),
        (("  ", "a"), "column text, row 4: it is empty"),
    ],
)
def test_texts_that_cannot_be_used_are_named_or_left_out(row, message, tmp_path):
    BertConfig(vocab_size=20, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "model")
    good = [("x y", "a"), ("y z", "b")]
    write_csv(tmp_path / "data" / "train.csv", [*good * 2, row, *good * 8])
    write_csv(tmp_path / "data" / "test.csv", good)
    arguments = (str(tmp_path / "model"), str(tmp_path / "data"))
    with pytest.raises(ValueError, match=f"dataset '{tmp_path / 'data'}', split train, {message}"):
        TextClassificationTask(*arguments)
    task = TextClassificationTask(*arguments, skip_bad_examples=True)
    assert len(task.load_split("train")) + len(task.load_split("validation")) == 20
    assert task.class_names == ["a", "b"]


def test_a_test_split_without_labels_is_none(tmp_path):
    BertConfig(vocab_size=20, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "model")
    rows = [("x y", "a"), ("y z", "b")] * 20
    write_csv(tmp_path / "data" / "train.csv", rows)
    write_csv(tmp_path / "data" / "validation.csv", rows[:6])
    write_csv(tmp_path / "data" / "test.csv", [(text, "") for text, _ in rows[:10]])
    task = TextClassificationTask(str(tmp_path / "model"), str(tmp_path / "data"))
    assert [len(task.load_split(split)) for split in ("train", "validation", "test")] == [32, 8, 6]


def test_the_fingerprint_follows_the_examples_and_not_their_place(tmp_path):
    labels = {"label": datasets.ClassLabel(names=["a", "b"])}
    for name, first in (("one", 0), ("two", 0), ("other", 1)):
        columns = {"image": [grey(first), *(grey(i) for i in range(39))], "label": [0, 1] * 20}
        write_parquet(tmp_path / name / "train.parquet", columns, labels)
        write_parquet(tmp_path / name / "test.parquet", columns, labels)
    one, two, other, small = (
        ImageClassificationTask("test_resnet", str(tmp_path / name), image_size=size).fingerprint("test")
        for name, size in (("one", 8), ("two", 8), ("other", 8), ("one", 9))
    )
    assert one == two and len({one, other, small}) == 3


def test_augmentation(tmp_path):
    tasks = {name: ImageClassificationTask("test_resnet", image_size=8, augmentation=name) for name in AUGMENTATIONS}
    batch = tasks["none"].load_split("train").__getitems__(range(32))
    assert tasks["none"].augment(batch) is batch
    before = batch["pixel_values"].clone()
    results = {}
    for name in ("flip", "crop_flip"):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            results.setdefault(name, []).append(tasks[name].augment(batch)["pixel_values"])
        first, again, another = results[name]
        assert torch.equal(first, again) and not torch.equal(first, another)
        assert first.shape == before.shape and torch.equal(batch["pixel_values"], before)
        assert torch.equal(tasks[name].augment(batch)["labels"], batch["labels"])
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(results["flip"][0], before, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(results["flip"][0], before, strict=True)]
    assert 4 < sum(mirrored) < 28 and all(a or b for a, b in zip(mirrored, kept, strict=True))
    # Each image is cut in its own way.
    parts = (results["crop_flip"][0] - before).flatten(1).norm(dim=1)
    assert len(parts.unique()) == 32
    unet = {"in_channels": 1, "out_channels": 1, "block_out_channels": [4], "norm_num_groups": 2, "layers_per_block": 1}
    unet |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "mid_block_type": None}
    tasks["none"].save_base_model(tasks["none"].load_base_model(), tmp_path)
    generation = ImageGenerationTask(
        image_size=8, model_args=unet, fid_features=str(tmp_path), augmentation="flip", max_eval_samples=4
    )
    batch = generation.collate(generation.load_split("train").__getitems__(range(16)))
    changed = generation.augment(batch)
    assert torch.equal(changed["noise"], batch["noise"])
    assert not torch.equal(changed["pixel_values"], batch["pixel_values"])


def test_training_and_collection_augment_and_nothing_else_does(tmp_path, monkeypatch):
    """The snapshots differ, and the same run gives the same ones; what is scored are the images as they are."""
    monkeypatch.setattr(PrefixCache, "build", lambda *args: pytest.fail("what changes by chance was kept"))

    def run(name, augmentation):
        recipe = PDiffConfig(
            output_dir=str(tmp_path / name),
            stages=["base", "collect"],
            model="test_resnet",
            task_args={"augmentation": augmentation},
            max_train_samples=60,
            max_eval_samples=40,
            base_epochs=1,
            num_snapshots=4,
            collect_batch_size=30,
            latent_dim=8,
        )
        run = prepare(recipe)
        execute(run)
        weight = run.base_model.state_dict()["timm_model.fc.weight"]
        return run.task, weight, parameter_matrix(*load_snapshots(tmp_path / name / "snapshots"))

    task, weight, snapshots = run("flip", "flip")
    _, weight_again, again = run("again", "flip")
    assert torch.equal(weight, weight_again) and torch.equal(snapshots, again)
    monkeypatch.undo()
    plain, weight_plain, _ = run("plain", "none")
    assert not torch.equal(weight, weight_plain)
    for split in ("train", "validation", "test"):
        batches = [each.load_split(split).__getitems__(range(20))["pixel_values"] for each in (task, plain)]
        assert torch.equal(*batches) and task.fingerprint(split) == plain.fingerprint(split)
