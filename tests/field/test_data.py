"""Data sets as people have them: tables of texts, folders of classes, columns of images, labels that are missing."""

import base64
import io
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.data import grey, write_csv
from transformers import BertConfig

from pdiff_hf.tasks import ImageClassificationTask
from pdiff_hf.tasks.images import ImageColumn, load_image_data
from pdiff_hf.tasks.labels import bad_labels, number_labels, without_unlabelled_test
from pdiff_hf.tasks.sources import load_raw
from pdiff_hf.tasks.text_classification import TextClassificationTask


@pytest.fixture
def bert(tmp_path) -> str:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertConfig(vocab_size=200, max_position_embeddings=40, **sizes).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def rows_of(labels) -> datasets.Dataset:
    labels = datasets.Dataset.from_dict({"label": labels})
    return labels.add_column("row", np.arange(len(labels)))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    grey(value).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder, *paths: str) -> None:
    for i, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png(i))


# -------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("where", ["texts.csv", "folder/train.csv"])
@pytest.mark.parametrize("first", ["not bad, really,good", "fine,good"])
def test_texts_whose_commas_are_not_quoted(where, first, tmp_path):
    file = tmp_path / where
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"text,label\n{first}\nnot good, at all,bad\n", encoding="utf-8")
    wrong = "Length of header" if "," in first.removesuffix(",good") else "Expected 2 fields in line 3, saw 3"
    with pytest.raises(ValueError, match=f"{wrong}.*; put values with a comma in them into double quotes"):
        load_raw(str(file if where == "texts.csv" else file.parent))


def test_texts_with_commas_line_breaks_and_quotes_as_other_programs_write_them(tmp_path):
    texts = ["a, b", "two\nlines", 'she said "no"', "plain"]
    write_csv(tmp_path / "texts.csv", [(text, "x") for text in texts])
    assert load_raw(str(tmp_path / "texts.csv"))["train"]["text"][:] == texts


def test_a_file_with_the_mark_of_excel(tmp_path):
    (tmp_path / "texts.csv").write_text("text,label\na,x\n", encoding="utf-8-sig")
    assert load_raw(str(tmp_path / "texts.csv"))["train"].column_names == ["text", "label"]


def test_classes_that_are_called_like_missing_values(bert, tmp_path):
    """NA for Namibia or North America, None for no defect, null for a null allele."""
    names = ["NA", "None", "null", "EU"]
    write_csv(tmp_path / "regions.csv", [(f"word {i}", names[i % 4]) for i in range(80)])
    task = TextClassificationTask(model=bert, dataset=str(tmp_path / "regions.csv"))
    assert task.class_names == ["EU", "NA", "None", "null"]


def test_texts_that_are_the_word_none(bert, tmp_path):
    write_csv(tmp_path / "texts.csv", [("None" if i % 2 else "nan", "ab"[i % 2]) for i in range(40)])
    task = TextClassificationTask(model=bert, dataset=str(tmp_path / "texts.csv"))
    assert {"none", "nan"} <= set(task.tokenizer.get_vocab())


@pytest.mark.parametrize("missing", ["NA", "nan", "None", "?"])
def test_a_missing_value_among_classes_that_are_numbers(missing, bert, tmp_path):
    write_csv(tmp_path / "t.csv", [(f"word {i}", missing if i == 7 else i % 3) for i in range(60)])
    with pytest.raises(ValueError, match=f"row 7: it is '{missing.replace('?', '[?]')}' among numbers"):
        TextClassificationTask(model=bert, dataset=str(tmp_path / "t.csv"))
    task = TextClassificationTask(model=bert, dataset=str(tmp_path / "t.csv"), skip_bad_examples=True)
    assert task.class_names == ["0", "1", "2"]


# ------------------------------------------------------------------------------------------------------------- labels


def test_unlabelled_examples_marked_with_minus_one():
    assert bad_labels(rows_of([0, 1, -1, 2])) == {2: ("label", "it is -1, which stands for no class")}


def test_classes_minus_one_and_one_are_two_classes():
    raw = {"train": rows_of([-1, 1, 1, -1])}
    assert bad_labels(raw["train"]) == {} and number_labels(raw, "it")[0] == ["-1", "1"]


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], ["", " "]])
def test_a_test_split_without_labels_is_left_out_and_said(labels, caplog):
    raw = {"train": rows_of([0, 1]), "test": rows_of(labels)}
    with caplog.at_level(logging.WARNING):
        assert list(without_unlabelled_test(raw, "withheld")) == ["train"]
    assert "the test split of dataset 'withheld' has no labels" in caplog.text


def test_a_data_set_that_is_too_small_to_hold_anything_out(tmp_path):
    write_images(tmp_path / "few", "a/1.png", "a/2.png", "b/1.png")
    with pytest.raises(ValueError, match="too small to hold out 20% of its 3 .* choose another validation_fraction"):
        ImageClassificationTask(model="test_resnet", dataset=str(tmp_path / "few"))


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_a_class_that_is_called_like_a_split(name, tmp_path):
    """Vehicles: bus, car, train."""
    write_images(tmp_path, *(f"{folder}/{i}.png" for folder in ("bus", "car", name) for i in range(3)))
    raw = load_image_data(str(tmp_path))
    assert list(raw) == ["train"] and len(raw["train"]) == 9
    assert raw["train"].features["label"].names == sorted(["bus", "car", name])


def test_such_a_class_in_folders_of_splits_brings_no_test_image_into_training(tmp_path):
    classes = ("bus", "car", "train", "test")
    write_images(tmp_path, *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in classes for i in range(2)))
    raw = load_image_data(str(tmp_path))
    assert {name: len(rows) for name, rows in raw.items()} == {"train": 8, "test": 8}
    files = {name: {image["path"] for image in rows.cast_column("image", datasets.Image(decode=False))["image"]}
             for name, rows in raw.items()}  # fmt: skip
    assert all(path.startswith(str(tmp_path / name)) for name, paths in files.items() for path in paths)
    assert raw["test"].features["label"].names == sorted(classes)


def test_folders_of_splits_of_other_names(tmp_path):
    write_images(tmp_path, *(f"{s}/{c}/{i}.png" for s in ("training", "val", "Test") for c in "ab" for i in range(2)))
    assert {name: len(rows) for name, rows in load_image_data(str(tmp_path)).items()} == {
        "train": 4, "validation": 4, "test": 4
    }  # fmt: skip


def test_a_folder_of_save_to_disk(tmp_path):
    splits = datasets.DatasetDict({"train": rows_of([0, 1, 0]), "test": rows_of([1])})
    splits.save_to_disk(tmp_path / "saved")
    assert {name: len(rows) for name, rows in load_raw(str(tmp_path / "saved")).items()} == {"train": 3, "test": 1}


# ------------------------------------------------------------------------------------------------- columns of images


def values_of(raw, column="image") -> list[int]:
    return [np.asarray(image)[0, 0].item() for image in raw["train"][column]]


@pytest.mark.parametrize("relative_to", ["data set", "folder of the program", "nothing"])
def test_a_table_with_the_paths_of_images(relative_to, tmp_path, monkeypatch):
    write_images(tmp_path, "pictures/0.png", "pictures/1.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path if relative_to == "folder of the program" else tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere" if relative_to == "folder of the program" else tmp_path
    prefix = f"{tmp_path}/" if relative_to == "nothing" else ""
    write_csv(folder / "t.csv", [(f"{prefix}pictures/{i}.png", "ab"[i]) for i in range(2)], ("image", "label"))
    assert values_of(load_image_data(str(folder / "t.csv"))) == [0, 1]


def test_another_column_with_paths(tmp_path):
    write_images(tmp_path, "0.png", "1.png")
    write_csv(tmp_path / "t.csv", [(f"{i}.png", "ab"[i]) for i in range(2)], ("file", "label"))
    assert values_of(load_image_data(str(tmp_path / "t.csv"), "file"), "file") == [0, 1]


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_images_in_base64(prefix, tmp_path):
    texts = [prefix + base64.b64encode(png(i)).decode() for i in range(3)]
    write_csv(tmp_path / "t.csv", [(text, "a") for text in texts], ("image", "label"))
    assert values_of(load_image_data(str(tmp_path / "t.csv"))) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["bytes", "bytes and path"])
def test_files_of_images_in_a_column(kind, tmp_path):
    column = [png(i) if kind == "bytes" else {"bytes": png(i), "path": f"{i}.png"} for i in range(3)]
    # Without the mark of datasets, as other programs write them.
    pq.write_table(pa.table({"picture": column}), tmp_path / "t.parquet")
    assert values_of(load_image_data(str(tmp_path / "t.parquet"), "picture"), "picture") == [0, 1, 2]


def test_addresses_of_images_are_refused_with_the_reason(tmp_path):
    write_csv(tmp_path / "t.csv", [("https://example.org/1.png", "a")] * 3, ("image", "label"))
    with pytest.raises(ValueError, match="holds addresses such as 'https://example.org/1.png'. Nothing is downloaded"):
        load_image_data(str(tmp_path / "t.csv"))


def test_a_column_that_says_nothing_of_images(tmp_path):
    write_csv(tmp_path / "t.csv", [("a picture of a cat", "a")] * 3, ("image", "label"))
    with pytest.raises(ValueError, match="'a picture of a cat', which is neither a file in .* nor an image in base64"):
        load_image_data(str(tmp_path / "t.csv"))


@pytest.mark.parametrize("damaged", ["path", "base64"])
def test_one_damaged_image_of_a_column_is_named_or_left_out(damaged, tmp_path):
    write_images(tmp_path, *(f"{i}.png" for i in range(30)))
    texts = [f"{i}.png" if damaged == "path" else base64.b64encode(png(i)).decode() for i in range(30)]
    texts[4] = "gone.png"
    write_csv(tmp_path / "t.csv", [(text, "ab"[i % 2]) for i, text in enumerate(texts)], ("image", "label"))
    task = ImageClassificationTask(model="test_resnet", dataset=str(tmp_path / "t.csv"), image_size=8)
    with pytest.raises(ValueError, match="column image, row 4.*: it cannot be read"):
        [task.load_split(split) for split in ("train", "validation", "test")]
    task = ImageClassificationTask(
        model="test_resnet", dataset=str(tmp_path / "t.csv"), image_size=8, skip_bad_examples=True
    )
    assert sum(len(task.load_split(split)) for split in ("train", "validation", "test")) == 29


def test_sixteen_bits_of_a_scanner(tmp_path):
    for i, value in enumerate((0, 257 * 20, 257 * 120)):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), value, dtype=np.uint16)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    rows = load_image_data(str(tmp_path))["train"]
    column = ImageColumn(rows.add_column("row", np.arange(len(rows))), "image", "scans")
    assert sorted(np.asarray(column[i]).max().item() for i in range(3)) == [0, 20, 120]
