"""What people give to generated networks and to `posterior`: raw images, arrays, texts, labels of any type."""

import logging

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.pipelines import make_network, make_pipeline
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from pdiff_hf import PDiffPipeline
from pdiff_hf.run.export import write_networks
from pdiff_hf.tasks.text_classification import TextClassificationTask

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
FEW = {"num_candidates": 6, "num_models": 4, "num_inference_steps": 2}
random = np.random.default_rng(0)
PIXELS = random.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
LABELS = torch.arange(8) % 4


def make_timm(channels: int = 3) -> nn.Module:
    """For images of 16 × 16."""
    torch.manual_seed(0)
    cfg = {"input_size": [channels, 16, 16], "mean": [0.3] * channels, "std": [0.2] * channels, "crop_pct": 1.0}
    config = AutoConfig.for_model(
        "timm_wrapper",
        architecture="test_resnet",
        num_labels=4,
        model_args={"in_chans": channels},
        pretrained_cfg=cfg,
        label2id={name: i for i, name in enumerate("abcd")},
        id2label=dict(enumerate("abcd")),
    )
    return AutoModelForImageClassification.from_config(config).eval()


@pytest.fixture(scope="module")
def pipe() -> PDiffPipeline:
    return make_pipeline(make_timm())


@pytest.fixture(scope="module")
def prepared(pipe) -> torch.Tensor:
    return (torch.tensor(PIXELS).permute(0, 3, 1, 2) / 255 - 0.3) / 0.2


HAVE = {
    "images of Pillow": [Image.fromarray(pixels) for pixels in PIXELS],
    "an array, channels last": PIXELS,
    "an array, channels first": np.moveaxis(PIXELS, -1, 1),
    "a tensor of bytes": torch.tensor(PIXELS).permute(0, 3, 1, 2),
    "a list of tensors of bytes": list(torch.tensor(PIXELS).permute(0, 3, 1, 2)),
    "a list of arrays": list(PIXELS),
    "whole numbers of 64 bits": PIXELS.astype(np.int64),
    "lists of lists": PIXELS.tolist(),
    "a column of datasets": datasets.Dataset.from_dict({"image": [Image.fromarray(p) for p in PIXELS]})["image"],
    "a Series": pd.Series([Image.fromarray(pixels) for pixels in PIXELS]),
}


@pytest.mark.parametrize("name", ["images", "image", "pixel_values"])
@pytest.mark.parametrize("kind", HAVE)
def test_images_as_they_are_kept(kind, name, pipe, prepared):
    got = pipe.prepare({name: HAVE[kind]})
    assert list(got) == ["pixel_values"] and got["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(got["pixel_values"], prepared)


@pytest.mark.parametrize("kind", ["array", "list of arrays", "float64", "tensor"])
def test_floats_are_taken_as_prepared(kind, pipe, prepared, caplog):
    values = {"tensor": prepared, "array": prepared.numpy(), "list of arrays": list(prepared.numpy())}
    values["float64"] = prepared.numpy().astype(np.float64)
    got = pipe.prepare({"pixel_values": values[kind]})["pixel_values"]
    assert torch.equal(got, prepared) and got.dtype == torch.float32 and not caplog.records


@pytest.mark.parametrize("scale", [1, 255])
def test_floats_that_are_not_prepared_are_warned_of(scale, pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe.prepare({"pixel_values": torch.tensor(PIXELS).permute(0, 3, 1, 2) / 255 * scale})
    assert f"from 0 to {scale}, and those of training lie between -1.5 and 3.5" in caplog.text


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_coloured_and_transparent_images(channels):
    pipe = make_pipeline(make_timm(channels))
    colours = [Image.fromarray(pixels) for pixels in PIXELS[:3]]
    images = [image.convert(mode) for image, mode in zip(colours, ("L", "RGB", "RGBA"), strict=True)]
    assert pipe.prepare({"images": images})["pixel_values"].shape == (3, channels, 16, 16)
    assert pipe.prepare({"images": PIXELS[..., 0]})["pixel_values"].shape == (8, channels, 16, 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (PIXELS.astype(np.int64) * 2, "whole numbers from 0 to 255, got int64 of shape .* from 0 to 510"),
        (np.zeros((8, 5), dtype=np.uint8), r"got uint8 of shape \(5,\)"),
        (PIXELS > 3, "got bool of shape"),
        (["a.png"], "open a file with Image.open: got 'a.png'"),
        ([{"bytes": b"", "path": None}], "open a file with Image.open"),
        (PIXELS[0], r"the batch first, got one of shape \(16, 16, 3\)"),
        (torch.tensor(PIXELS[0]).permute(2, 0, 1), r"the batch first, got one of shape \(3, 16, 16\)"),
        (PIXELS / 255, r"shape \(B, 3, height, width\), got \(8, 16, 16, 3\); images that are not prepared"),
        (np.zeros((8, 1, 16, 16)), r"shape \(B, 3, height, width\), got \(8, 1, 16, 16\)"),
        ([np.zeros((3, 16, side)) for side in (16, 18)], "must all have one size"),
        (np.full((8, 3, 16, 16), np.nan), "not finite"),
        (PIXELS[:0], "the batch first, got one of shape"),
        (Image.fromarray(PIXELS[0]), "images are a list"),
        ([], "images are a list"),
    ],
)
def test_what_is_no_image(values, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe.prepare({"images": values})


def test_raw_images_of_a_network_of_which_nothing_says_how_it_takes_them():
    pipe = make_pipeline(make_network())
    with pytest.raises(ValueError, match="need an image processor that says how.*processor=AutoImageProcessor"):
        pipe.posterior({"pixel_values": torch.tensor(PIXELS).permute(0, 3, 1, 2), "labels": LABELS}, **FEW)


LABEL_KINDS = {
    "list": LABELS.tolist(),
    "NumPy": LABELS.numpy(),
    "bytes": LABELS.to(torch.uint8),
    "32 bits": LABELS.to(torch.int32),
    "names": ["abcd"[i] for i in LABELS],
    "numbers of NumPy": list(LABELS.numpy()),
}


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_labels_of_any_type(kind, pipe, prepared):
    def posterior(labels):
        return pipe.posterior(
            {"pixel_values": prepared, "labels": labels}, generator=torch.Generator().manual_seed(0), **FEW
        )

    assert torch.equal(posterior(LABEL_KINDS[kind]).log_likelihoods, posterior(LABELS).log_likelihoods)
    losses = [pipe.example_loss({"pixel_values": prepared, "labels": labels}) for labels in (LABEL_KINDS[kind], LABELS)]
    rows = torch.zeros(2, pipe.autoencoder.layout.num_parameters)
    assert torch.equal(losses[0](rows), losses[1](rows))


def test_truth_values_are_two_classes(pipe):
    assert pipe.prepare({"labels": [True, False]})["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 7 + [4], "labels must lie between 0 and 3, got .0, 4."),
        (torch.full((8,), -1), "labels must lie between 0 and 3"),
        (["a"] * 7 + ["e"], "the label 'e' is none of the network's classes, a, b, c, d"),
        (torch.rand(8), "examples need labels, whole numbers"),
        ([0] * 7 + [None], "examples need labels"),
        ([0, 1], "there are 2 labels, but pixel_values has the shape"),
    ],
)
def test_labels_that_cannot_be(labels, message, pipe, prepared):
    examples = {"pixel_values": prepared, "labels": labels}
    with pytest.raises(ValueError, match=message):
        pipe.posterior(examples, **FEW)
    with pytest.raises(ValueError, match=message):
        pipe.example_loss(examples)(torch.zeros(1, pipe.autoencoder.layout.num_parameters))


def test_a_slice_of_a_data_set(pipe, prepared):
    rows = {"image": [Image.fromarray(pixels) for pixels in PIXELS], "label": LABELS.tolist()}
    got = pipe.prepare(datasets.Dataset.from_dict(rows)[:8])
    assert torch.equal(got["labels"], LABELS) and torch.allclose(got["pixel_values"], prepared, atol=1e-5)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"images": PIXELS, "pixel_values": PIXELS, "labels": LABELS}, "pixel_values and images, which say the same"),
        ({"images": PIXELS, "labels": LABELS, "label": LABELS}, "labels and label, which say the same"),
        ({"img": PIXELS, "labels": LABELS}, "need pixel_values, or what that is made of, and have img, labels"),
        ({"text": ["good"] * 8, "labels": LABELS}, "need a tokenizer"),
    ],
)
def test_examples_under_other_names(examples, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe.posterior(examples, **FEW)


def test_examples_that_are_a_pair(pipe, prepared):
    with pytest.raises(ValueError, match="examples are a mapping, such as .*, got a tuple"):
        pipe.posterior((prepared, LABELS), **FEW)


def test_statistics_of_batch_norm_from_raw_images():
    pipe = make_pipeline(make_timm(), ["conv[1]", "norm[1]"])

    def networks(batches):
        generator = torch.Generator().manual_seed(0)
        return pipe(2, 2, generator, output_type="model", batch_norm_data=batches).parameters

    raw, ready = networks([{"images": HAVE["images of Pillow"]}]), networks([pipe.prepare({"images": PIXELS})])
    for one, other in zip(raw, ready, strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])


def test_a_network_of_ones_own_gets_its_inputs_as_they_are():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(3)

        def forward(self, images):
            return self.norm(images.float().mean((1, 2)))

    pipe = make_pipeline(Own())
    images = torch.tensor(PIXELS)
    assert torch.equal(pipe.prepare({"images": images})["images"], images)
    assert len(pipe.posterior({"images": images, "labels": LABELS % 3}, **FEW).parameters)


def make_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=4, **SMALL)).eval()


def test_the_image_processor_goes_with_the_generator_and_its_networks(tmp_path):
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1] * 3, image_std=[0.3] * 3)
    make_pipeline(make_vit(), "norm", processor=processor).save_pretrained(tmp_path / "pipeline")
    pipe = PDiffPipeline.from_pretrained(tmp_path / "pipeline")
    got = pipe.prepare({"images": HAVE["images of Pillow"]})["pixel_values"]
    expected = processor(HAVE["images of Pillow"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(got, expected, atol=1.5 / 255 / 0.3, rtol=0)
    write_networks(str(tmp_path / "pipeline"), tmp_path / "out", num_models=2, seed=0, only_generated=False)
    for folder in (tmp_path / "out").glob("network-*"):
        assert AutoImageProcessor.from_pretrained(folder).size == {"height": 8, "width": 8}
    assert len(list((tmp_path / "out").glob("network-*"))) == 2


def test_the_tokenizer_goes_with_the_generator_and_its_networks(tmp_path):
    BertConfig(vocab_size=30, max_position_embeddings=6, **SMALL).save_pretrained(tmp_path / "bert")
    texts = [f"{word} film, really {word} and so on and on" for word in ("good", "bad")]
    rows = "\n".join(f'"{text}",{text.partition(" ")[0]}' for text in texts * 10)
    (tmp_path / "t.csv").write_text(f"text,label\n{rows}\n", encoding="utf-8")
    task = TextClassificationTask(model=str(tmp_path / "bert"), dataset=str(tmp_path / "t.csv"))
    network: BertForSequenceClassification = task.load_base_model().eval()
    make_pipeline(network, "norm", processor=task.processor).save_pretrained(tmp_path / "pipeline")
    pipe = PDiffPipeline.from_pretrained(tmp_path / "pipeline")
    split = task.load_split("train")
    stored = task._raw["train"]["text"][:]
    got = pipe.prepare({"text": stored, "labels": [text.partition(" ")[0] for text in stored]})
    expected = split.__getitems__(list(range(len(split))))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    assert got["input_ids"].shape[1] == 6  # cut as in training
    assert pipe.posterior({"text": texts, "labels": ["good", "bad"]}, **FEW).weights.sum() == 1
    write_networks(str(tmp_path / "pipeline"), tmp_path / "out", num_models=1, seed=0, only_generated=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "network-00000")
    assert tokenizer(texts)["input_ids"] == task.tokenizer(texts)["input_ids"]


@pytest.mark.parametrize("texts", ["good film", [1, 2]])
def test_what_is_no_list_of_texts(texts, pipe):
    with pytest.raises(ValueError, match="texts are a list of strings"):
        pipe.prepare({"text": texts})


def test_a_network_of_this_packages_architectures_says_what_to_import(tmp_path):
    config = AutoConfig.for_model("timm_wrapper", architecture="mlp_mini", num_labels=4)
    pipe = make_pipeline(AutoModelForImageClassification.from_config(config).eval(), "norm")
    pipe.save_pretrained(tmp_path / "pipeline")
    write_networks(str(tmp_path / "pipeline"), tmp_path / "out", num_models=1, seed=0, only_generated=False)
    text = (tmp_path / "out" / "network-00000" / "README.md").read_text(encoding="utf-8")
    assert "import pdiff_hf\n" in text and "`Unknown model (mlp_mini)`" in text
    make_pipeline(make_network()).save_pretrained(tmp_path / "timm")
    write_networks(str(tmp_path / "timm"), tmp_path / "others", num_models=1, seed=0, only_generated=False)
    assert not (tmp_path / "others" / "network-00000" / "README.md").exists()
