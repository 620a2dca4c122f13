"""Which column is the label, one numbering for all splits, and the order of a fine-tuned network's outputs."""

import logging
from pathlib import Path

import datasets
import pytest
import torch
from support.data import grey, write_csv, write_parquet
from support.networks import SIZES as BERT, bert
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.trainer import prepare
from pdiff_hf.tasks import check_head
from pdiff_hf.tasks.image_classification import ImageClassificationTask
from pdiff_hf.tasks.labels import align_labels, number_labels
from pdiff_hf.tasks.text_classification import TextClassificationTask

VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VIT |= {"image_size": 8, "patch_size": 4}
ABC, ANIMALS = datasets.ClassLabel(names=["a", "b", "c"]), ["ant", "bee", "cat"]


def names_of(outputs) -> dict:
    """What a config says of outputs with these names."""
    return {
        "num_labels": len(outputs),
        "id2label": dict(enumerate(outputs)),
        "label2id": {name: i for i, name in enumerate(outputs)},
    }


def save_bert(folder: Path, **labels) -> str:
    bert(**labels).save_pretrained(folder)
    return str(folder)


def save_vit(folder: Path, **labels) -> str:
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**VIT, **labels)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def write_texts(folder: Path, labels, test=None) -> str:
    """Ten texts a class in training, which say what their label is."""
    write_csv(folder / "train.csv", [(f"is {name}", name) for name in labels for _ in range(10)])
    write_csv(folder / "test.csv", [(f"is {name}", name) for name in (labels if test is None else test)])
    return str(folder)


@pytest.mark.parametrize(
    ("outputs", "labels", "expected"),
    [
        (["positive", "negative"], ["negative", "positive"], [1, 0]),
        (["POSITIVE", "Negative"], ["negative", "positive"], [1, 0]),
        (list(map(str, range(12))), range(12), list(range(12))),  # and not 0, 1, 10, 11, 2, ...
        (["3", "1", "2"], [1, 2, 3], [1, 2, 0]),
        (["sad", "happy", "cross"], [0, 1, 2], [0, 1, 2]),  # numbers from 0 are those of the outputs
        (["LABEL_0", "LABEL_1"], ["no", "yes"], [0, 1]),
        (["ant", "bee", "cat", "dog"], ["cat", "ant"], [0, 2]),  # the data have some of its classes
    ],
)
def test_labels_follow_the_outputs_of_a_fine_tuned_network(outputs, labels, expected, tmp_path):
    model = save_bert(tmp_path / "model", **names_of(outputs))
    task = TextClassificationTask(model, write_texts(tmp_path / "data", labels))
    names = sorted(map(str, labels), key=lambda name: (len(name), name))
    texts, ids = task._raw["test"]["text"][:], task.load_split("test").labels.tolist()
    found = {text.removeprefix("is "): i for text, i in zip(texts, ids, strict=True)}
    assert [found[name] for name in names] == expected
    network = task.load_base_model()
    assert task.new_head == "" and network.num_labels == len(outputs)
    saved = BertForSequenceClassification.from_pretrained(model)
    assert torch.equal(network.classifier.weight, saved.classifier.weight)
    unnamed = outputs[0].startswith("LABEL")
    assert list(network.config.id2label.values()) == task.class_names == (list(labels) if unnamed else outputs)


def test_classes_that_nobody_can_tell_apart_are_said(tmp_path, caplog):
    """In a table they would be an error; in a data set `a` and `A` may be two letters."""
    data = write_texts(tmp_path / "data", ["cat", "Cat", "cat\u200b", "caf\u00e9", "cafe\u0301", "dog"])
    assert len(TextClassificationTask(save_bert(tmp_path / "model"), data).class_names) == 6
    assert r"the classes 'cafe\u0301' and 'caf\xe9' of dataset" in caplog.text and "(3 such pairs)" in caplog.text


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["cat"], "are of the class 'cat'"), (["inf", 1.5], "inf is no class"), ([0.5, 1.5], "row 0: 0.5 is no class")],
)
def test_what_is_not_several_classes(labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TextClassificationTask(save_bert(tmp_path / "model", num_labels=5), write_texts(tmp_path / "data", labels))


def test_a_network_of_timm_whose_config_does_not_say_how_images_are_prepared(tmp_path):
    """As `from_config` makes it of an architecture's name alone."""
    config, data = AutoConfig.for_model("timm_wrapper", architecture="test_resnet", num_labels=2), tmp_path / "data"
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    columns = {"image": [grey()] * 40, "label": [0, 1] * 20}
    write_parquet(data / "train.parquet", columns, {"label": datasets.ClassLabel(names=["a", "b"])})
    with pytest.raises(ValueError, match="has no image processor that says how its images are prepared"):
        ImageClassificationTask(str(tmp_path / "model"), str(data)).load_split("train")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    task = ImageClassificationTask(str(tmp_path / "model"), str(data))
    assert task.load_split("train").__getitems__([0])["pixel_values"].shape == (1, 3, 8, 8)
    task.save_base_model(task.load_base_model(), tmp_path / "saved")
    assert task.load_saved(tmp_path / "saved").num_labels == 2


def test_names_that_a_replaced_head_has_left_are_no_outputs():
    config = BertConfig(**BERT, id2label={0: "negative", 1: "positive"}, label2id={"a": 0, "b": 1, "c": 2})
    assert align_labels(["a", "b", "c"], config, "m", "d") is None


def test_label2id_alone_names_the_outputs_and_must_not_contradict_id2label():
    config = BertConfig(**BERT, id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"yes": 0, "no": 1})
    assert align_labels(["no", "yes"], config, "m", "d") == [1, 0]
    config = BertConfig(**BERT, id2label={0: "yes", 1: "no"}, label2id={"yes": 1, "no": 0})
    with pytest.raises(ValueError, match="id2label and label2id of m contradict each other about 'yes'"):
        align_labels(["no", "yes"], config, "m", "d")


def test_what_cannot_be_aligned_is_refused_and_what_is_guessed_is_said(tmp_path, caplog):
    data = write_texts(tmp_path / "data", ["neutral", "positive"])
    model = save_bert(tmp_path / "model", **names_of(["positive", "negative"]))
    with pytest.raises(ValueError, match=r"cannot be aligned.*\(neutral, positive\).*\(positive, negative\)"):
        TextClassificationTask(model, data)
    own = [f"class {i}" for i in range(20)]
    names = [*own[:19], "class twenty"]  # as some of ImageNet's thousand are spelled in several ways
    config = BertConfig(**BERT, **names_of(own))
    assert align_labels(names, config, "m", "d") == list(range(20)) and "taken for its outputs" in caplog.text
    with pytest.raises(ValueError, match="cannot be aligned"):
        align_labels([own[1], own[0], *names[2:]], config, "m", "d")
    assert align_labels(["0", "1", "3"], config, "m", "d") is None  # other classes: a fresh head


def test_one_numbering_for_all_splits(tmp_path):
    for split, names in (("train", ANIMALS), ("test", ["cat", "ant"])):
        columns = {"image": [grey()] * 10 * len(names), "label": [name for name in names for _ in range(10)]}
        write_parquet(tmp_path / "images" / f"{split}.parquet", columns, {"label": datasets.Value("string")})
    task = ImageClassificationTask("test_resnet", str(tmp_path / "images"), image_size=8)
    assert task.class_names == ANIMALS and task.load_split("test").labels.tolist() == [2] * 10 + [0] * 10
    config = save_bert(tmp_path / "bert")
    data = write_texts(tmp_path / "texts", ANIMALS, ["cat", "dog"])
    with pytest.raises(ValueError, match="test, column label, row 1: the class 'dog' is none of .*ant, bee, cat"):
        TextClassificationTask(config, data)


@pytest.mark.parametrize(
    ("values", "feature", "names", "ids"),
    [
        ([10, 9, -1], datasets.Value("int64"), ["-1", "9", "10"], [2, 1, 0]),
        ([1.0, 0.0, 2.0], datasets.Value("float64"), ["0", "1", "2"], [1, 0, 2]),
        ([True, False, True], datasets.Value("bool"), ["False", "True"], [1, 0, 1]),
        (["10", "9", "x"], datasets.Value("string"), ["10", "9", "x"], [0, 1, 2]),
        ([0, 1, 2], datasets.ClassLabel(names=["0", "1", "10"]), ["0", "1", "10"], [0, 1, 2]),
        ([0, 1, 2], datasets.ClassLabel(names=["1", "10", "2"]), ["1", "2", "10"], [0, 2, 1]),  # of folders
        ([0, 1, 2], datasets.ClassLabel(names=["c", "a", "b"]), ["c", "a", "b"], [0, 1, 2]),
    ],
)
def test_numbers_are_in_the_order_of_their_values(values, feature, names, ids):
    features = datasets.Features(label=feature, row=datasets.Value("int64"))
    rows = datasets.Dataset.from_dict({"label": values, "row": [0, 1, 2]}, features=features)
    found, splits = number_labels({"train": rows}, "d")
    assert found == names and splits["train"]["label"][:] == ids
    assert splits["train"].features["label"].names == names


@pytest.mark.parametrize(
    ("types", "chosen", "expected"),
    [
        ({"label": datasets.ClassLabel(names=["p", "q"]), "camera": ABC}, {}, ["p", "q"]),
        ({"label": datasets.Value("string"), "site": ABC}, {}, ["0", "1", "2"]),
        ({"labels": datasets.Value("int64"), "site": ABC}, {}, ["0", "1", "2"]),
        ({"animal": ABC, "note": datasets.Value("string")}, {}, ["a", "b", "c"]),
        ({"fine_label": ABC, "coarse_label": ABC}, {}, "fine_label and coarse_label could each .* label_column"),
        ({"label": ABC, "labels": ABC}, {}, "label and labels could each be the label column"),
        ({"fine_label": ABC, "coarse_label": ABC}, {"label_column": "coarse_label"}, ["a", "b", "c"]),
        ({"note": datasets.Value("string")}, {"label_column": "note"}, ["0", "1", "2"]),
        ({"note": datasets.Value("string")}, {}, "has no label column; its columns are image, note"),
        ({"label": ABC}, {"label_column": "kind"}, "has no column kind; its columns are image, label"),
        ({"label": datasets.List(datasets.Value("int64"))}, {}, "column label holds .*, not one class for each"),
        ({"label": ABC, "photo": datasets.Image()}, {"image_column": "photo"}, ["a", "b", "c"]),
        ({"label": ABC}, {"image_column": "label"}, "column label holds .*, not images"),
    ],
)
def test_which_column_is_the_label(types, chosen, expected, tmp_path):
    columns, numbers = {"image": [grey(n) for n in range(60)]}, [n % 2 for n in range(60)]
    for name, feature in types.items():
        values = {"labels": [n % 3 for n in range(60)], "photo": columns["image"]}
        columns[name] = values.get(name, numbers)
        if isinstance(feature, datasets.Value) and feature.dtype == "string":
            columns[name] = [str(n % 3) for n in range(60)]
        if isinstance(feature, datasets.List):
            columns[name] = [[n] for n in numbers]
    write_parquet(tmp_path / "train.parquet", columns, types)
    arguments = {"model": "test_resnet", "dataset": str(tmp_path), "image_size": 8} | chosen
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            ImageClassificationTask(**arguments)
    else:
        assert ImageClassificationTask(**arguments).class_names == expected


def test_the_column_of_texts(tmp_path):
    write_csv(tmp_path / "train.csv", [(f"t{i}", f"s{i}", i % 2) for i in range(20)], ["title", "sentence", "label"])
    model = save_bert(tmp_path / "model")
    with pytest.raises(ValueError, match="no column text of strings; its columns of strings are title, sentence"):
        TextClassificationTask(model, str(tmp_path / "train.csv"))
    task = TextClassificationTask(model, str(tmp_path / "train.csv"), text_column="sentence")
    assert all(text.startswith("s") for text in task._raw["train"]["text"])


def test_a_head_of_another_size_is_refused_or_said(tmp_path, caplog):
    def run(model, epochs):
        settings = {"stages": ["base"], "latent_dim": 4, "dataset": "digits", "image_size": 8}
        return prepare(PDiffConfig(**settings, output_dir=str(tmp_path / "out"), model=model, base_epochs=epochs))

    twelve = save_vit(tmp_path / "twelve", num_labels=12)
    message = r"classifier.bias, classifier.weight of model .*the data have 10 classes.*the network has 12 outputs"
    with pytest.raises(ValueError, match="base_epochs is 0.*" + message):
        run(twelve, 0)
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING):
        run(twelve, 1)
    assert "must be drawn anew: the data have 10 classes" in caplog.text
    run(save_vit(tmp_path / "ten", num_labels=10), 0)
    # A network that was never fine-tuned has no head at all, whatever its config says.
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    task = TextClassificationTask(str(tmp_path / "bert"), write_texts(tmp_path / "data", ["no", "yes"]))
    task.load_base_model()
    with pytest.raises(ValueError, match="classifier.bias, classifier.weight of model .* its files lack them"):
        check_head(task, is_trained=False)


def test_a_head_that_an_adapter_brings_is_not_fresh(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    network = BertForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=3)
    wrapped = peft.get_peft_model(network, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    task = TextClassificationTask(str(tmp_path / "adapter"), write_texts(tmp_path / "data", ANIMALS))
    head = task.load_base_model().get_submodule("classifier.modules_to_save.default").weight
    assert task.new_head == "" and torch.equal(head, network.classifier.modules_to_save.default.weight)


def test_other_networks_keep_their_own_order(tmp_path):
    """Such as the base model that a saved pipeline carries."""
    task = TextClassificationTask(save_bert(tmp_path / "model"), write_texts(tmp_path / "data", ["no", "yes"]))
    before, fingerprint = task.load_split("test").labels, task.fingerprint("test")
    task.align(BertConfig(**BERT, **names_of(["yes", "no"])))
    assert task.class_names == ["yes", "no"] and torch.equal(task.load_split("test").labels, 1 - before)
    assert task.fingerprint("test") != fingerprint
    with pytest.raises(ValueError, match=r"not for the classes .* 2 classes \(no, yes\).* 3 outputs \(a, b, c\)"):
        task.align(BertConfig(**BERT, **names_of(["a", "b", "c"])))


@pytest.mark.parametrize("number", [3, 1000])  # timm has names of its own for a thousand
def test_class_names_of_timm_networks_are_kept(number, tmp_path):
    names = [f"class {i}" for i in range(number)]
    columns = {"image": [grey()] * 6, "label": [0, 1, 2] * 2}
    types = {"label": datasets.ClassLabel(names=names)}
    for split in ("train", "val", "test"):
        write_parquet(tmp_path / "data" / f"{split}.parquet", columns, types)
    config = AutoConfig.for_model("timm_wrapper", architecture="test_resnet", pretrained_cfg={"input_size": [3, 8, 8]})
    config.num_labels = 1000 - number + 4  # a head of another size, whose names must not come back
    config.label_names = [f"old {i}" for i in range(config.num_labels)]
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "old")
    for source in ("test_resnet", str(tmp_path / "old")):
        task = ImageClassificationTask(source, str(tmp_path / "data"), image_size=8)
        task.save_base_model(task.load_base_model(), tmp_path / "saved")
        for config in (AutoConfig.from_pretrained(tmp_path / "saved"), task.load_saved(tmp_path / "saved").config):
            assert list(config.id2label.values()) == names
