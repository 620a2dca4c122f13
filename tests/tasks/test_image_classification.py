"""The image-classification task: splits, preprocessing, models through one door, and what it refuses."""

import json

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from transformers import AutoImageProcessor, ConvNextConfig, ConvNextImageProcessor, ViTConfig, ViTImageProcessor

from pdiff_hf.tasks import ImageClassificationTask, images as module


def all_of(split):
    return split.__getitems__(list(range(len(split))))


def make_folder(path, sizes, mode="RGB", label_feature=None):
    """A local data set folder of random images; returns the images of each split."""
    rng = np.random.default_rng(0)
    made = {}
    for name, size in sizes.items():
        shape = (12, 10, 3) if mode == "RGB" else (12, 10)
        images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(size)]
        labels = [i % 3 for i in range(size)]
        features = datasets.Features(
            img=datasets.Image(), label=label_feature or datasets.ClassLabel(names=["a", "b", "c"])
        )
        made[name] = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
        (path / "data").mkdir(parents=True, exist_ok=True)
        made[name].to_parquet(path / "data" / f"{name}-0.parquet")
    return made


def test_digits_are_split_once_and_for_all():
    first, second = (ImageClassificationTask("test_resnet", image_size=8) for _ in range(2))
    sizes = {name: len(first.load_split(name)) for name in ("train", "validation", "test")}
    assert sizes == {"train": 718, "validation": 180, "test": 899} and sum(sizes.values()) == 1797
    images = {}
    for name in sizes:
        batch, again = all_of(first.load_split(name)), all_of(second.load_split(name))
        assert torch.equal(batch["pixel_values"], again["pixel_values"])
        assert torch.equal(batch["labels"], again["labels"])
        share = batch["labels"].bincount() / len(batch["labels"])
        assert (share > 0.08).all() and (share < 0.12).all()  # stratified
        images[name] = {row.numpy().tobytes() for row in batch["pixel_values"]}
    assert not images["train"] & images["test"] and not images["validation"] & images["test"]
    assert first.fingerprint("test") == second.fingerprint("test") != first.fingerprint("train")
    assert first.fingerprint("test") != ImageClassificationTask("test_resnet", image_size=9).fingerprint("test")


def test_timm_preprocessing_is_that_of_the_model_and_saved_with_it(tmp_path):
    task = ImageClassificationTask("test_resnet", image_size=24)
    batch = all_of(task.load_split("test"))
    assert batch["pixel_values"].shape == (899, 3, 24, 24)
    task.load_base_model().save_pretrained(tmp_path)
    raw = task.raw_examples("test")[0][5].convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(raw)["pixel_values"][0]
    torch.testing.assert_close(batch["pixel_values"][5], pixels, atol=1e-5, rtol=1e-5)
    again = ImageClassificationTask(str(tmp_path))
    assert torch.equal(all_of(again.load_split("test"))["pixel_values"], batch["pixel_values"])


def test_grey_images_reach_networks_of_one_and_of_three_channels():
    for channels in (1, 3):
        task = ImageClassificationTask("test_resnet", image_size=16, model_args={"in_chans": channels})
        batch = task.load_split("validation").__getitems__([0, 1])
        assert batch["pixel_values"].shape == (2, channels, 16, 16)
        assert task.predict(task.load_base_model().eval(), batch).shape == (2, 10)


def test_a_network_with_fixed_positions_is_built_for_the_image_size(tmp_path):
    task = ImageClassificationTask("test_vit", image_size=32)
    batch = task.load_split("validation").__getitems__([0, 1])
    model = task.load_base_model().eval()
    task.save_base_model(model, tmp_path)
    with torch.no_grad():
        logits = task.predict(model, batch)
        assert torch.equal(task.predict(task.load_saved(tmp_path).eval(), batch), logits)
    assert logits.shape == (2, 10)


def test_a_network_that_newer_releases_of_timm_saved(tmp_path):
    """They save the number of classes with the other arguments."""
    saved = timm.create_model("test_vit", img_size=32, num_classes=10)
    save_for_hf(saved, tmp_path, model_config=None, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["num_classes"] == 10
    task = ImageClassificationTask(str(tmp_path))
    model = task.load_base_model()
    assert torch.equal(model.timm_model.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)
    task.save_base_model(model, tmp_path / "again")
    assert torch.equal(task.load_saved(tmp_path / "again").timm_model.head.weight, model.timm_model.head.weight)


def test_images_beyond_the_memory_budget_are_the_same(monkeypatch):
    in_memory = ImageClassificationTask("test_resnet", image_size=8).load_split("test")
    monkeypatch.setattr(module, "MEMORY_BUDGET", 0)
    on_demand = ImageClassificationTask("test_resnet", image_size=8).load_split("test")
    assert torch.is_tensor(in_memory.images) and not torch.is_tensor(on_demand.images)
    batch = on_demand.__getitems__([3, 1])
    assert torch.equal(batch["pixel_values"], in_memory.__getitems__([3, 1])["pixel_values"])


def test_fresh_timm_networks_keep_the_initialization_of_timm():
    import timm

    torch.manual_seed(5)
    task = ImageClassificationTask("test_resnet", image_size=16)
    weight = task.load_base_model().timm_model.state_dict()["layer1.0.conv1.weight"]
    expected = timm.create_model("test_resnet", num_classes=10).state_dict()["layer1.0.conv1.weight"]
    assert weight.std().item() == pytest.approx(expected.std().item(), rel=0.2)


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_transformers_models_fresh_and_saved(name, tmp_path):
    if name == "vit":
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
        processor = ViTImageProcessor(size={"height": 16, "width": 16})
    else:
        config = ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], num_stages=4)
        processor = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0)
    config.save_pretrained(tmp_path / "config")
    processor.save_pretrained(tmp_path / "config")
    task = ImageClassificationTask(str(tmp_path / "config"))
    model = task.load_base_model().eval()
    batch = task.load_split("test").__getitems__([0, 1, 2])
    assert task.predict(model, batch).shape == (3, 10)
    raw = task.raw_examples("test")[0][1].convert("RGB")
    pixels = processor(raw, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(batch["pixel_values"][1], pixels, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded = ImageClassificationTask(str(tmp_path / "saved"))
    assert torch.equal(task.predict(loaded.load_base_model().eval(), batch), task.predict(model, batch))


def test_local_folders_with_and_without_a_validation_or_test_split(tmp_path):
    make_folder(tmp_path / "all", {"train": 60, "validation": 9, "test": 12})
    task = ImageClassificationTask("test_resnet", str(tmp_path / "all"), image_size=8)
    assert [len(task.load_split(s)) for s in ("train", "validation", "test")] == [60, 9, 12]
    assert task.class_names == ["a", "b", "c"]
    make_folder(tmp_path / "two", {"train": 60, "test": 12})
    task = ImageClassificationTask("test_resnet", str(tmp_path / "two"), image_size=8, validation_fraction=0.25)
    assert [len(task.load_split(s)) for s in ("train", "validation", "test")] == [45, 15, 12]
    # A validation split alone is what is reported, and another one is made to select on.
    make_folder(tmp_path / "one", {"train": 60, "validation": 9})
    task = ImageClassificationTask("test_resnet", str(tmp_path / "one"), image_size=8)
    assert [len(task.load_split(s)) for s in ("train", "validation", "test")] == [48, 12, 9]


def test_labels_that_are_plain_numbers_and_limits(tmp_path):
    make_folder(tmp_path, {"train": 60, "test": 30}, label_feature=datasets.Value("int64"))
    task = ImageClassificationTask("test_resnet", str(tmp_path), image_size=8, max_train_samples=10, max_eval_samples=7)
    assert task.class_names == ["0", "1", "2"]
    assert [len(task.load_split(s)) for s in ("train", "validation", "test")] == [10, 7, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet81"}, "'resnet81' is not a timm architecture.*timm has resnet"),
        ({"model": "some/where/nothing"}, "neither a folder .* nor a Hub id"),
        ({"model_args": {"depths": 3}}, "does not take the model_args"),
        (
            {"model": "vit_tiny_patch16_224", "model_args": {"img_size": 64}, "image_size": 32},
            "takes no images of 3×32×32",
        ),
        ({"model": "vgg11", "image_size": 8}, "'vgg11' takes no images of 3×8×8 .*set by image_size and model_args"),
        ({"dataset": "no_such_data_set"}, "neither 'digits', .*a local data set folder nor a Hub id"),
        ({"validation_fraction": 0.7}, "validation_fraction must lie between 0 and 0.5, got 0.7"),
        ({"image_size": -1}, "image_size must be at least 1, got -1"),
        ({"augmentation": "crop"}, "augmentation must be one of none, flip, crop_flip, got 'crop'"),
        ({"max_eval_samples": 0}, "max_eval_samples must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        ImageClassificationTask(**{"model": "test_resnet"} | arguments)


def test_data_sets_that_do_not_fit(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.csv").write_text("words,label\nhello,0\nbye,1\n")
    with pytest.raises(ValueError, match="has no image column; its columns are words, label"):
        ImageClassificationTask("test_resnet", str(tmp_path / "text"))
    make_folder(tmp_path / "tiny", {"train": 4, "test": 3})
    with pytest.raises(ValueError, match="too small to hold out 20% of its 4"):
        ImageClassificationTask("test_resnet", str(tmp_path / "tiny"))
    make_folder(tmp_path / "untrained", {"test": 3})
    with pytest.raises(ValueError, match=r"needs a split named train, got \['test'\]"):
        ImageClassificationTask("test_resnet", str(tmp_path / "untrained"))
