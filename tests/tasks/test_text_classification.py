"""The text-classification task: files, tokenizers, and the whole job on it."""

import csv
import json

import pytest
import torch
from support.networks import SIZES
from support.runs import finish
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.tasks import TextClassificationTask, predict_logits

WORDS = {"good": ["fine", "lovely", "great", "warm", "kind"], "bad": ["poor", "awful", "cold", "dull", "sad"]}
FILLER = ["the", "film", "was", "a", "very", "and", "we", "saw", "it"]


def write_csv(path, size: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    lines = ["text,label"]
    for i in range(size):
        label = ("good", "bad")[i % 2]
        length = int(torch.randint(3, 9, (1,), generator=generator))
        words = [FILLER[int(j)] for j in torch.randint(len(FILLER), (length,), generator=generator)]
        words[i % length] = WORDS[label][int(torch.randint(5, (1,), generator=generator))]
        lines.append(f"{' '.join(words).capitalize()}!,{label}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`reviews.csv`, the folder `reviews` with two splits, and `model` with nothing but a configuration."""
    path = tmp_path_factory.mktemp("text")
    (path / "reviews").mkdir()
    write_csv(path / "reviews.csv", 200)
    write_csv(path / "reviews" / "train.csv", 160)
    write_csv(path / "reviews" / "test.csv", 40, seed=1)
    sizes = SIZES | {"vocab_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 12}
    BertConfig(**sizes).save_pretrained(path / "model")
    return path


def test_a_file_and_a_folder_of_texts(folder):
    task = TextClassificationTask(str(folder / "model"), str(folder / "reviews.csv"))
    assert task.class_names == ["bad", "good"]
    assert [len(task.load_split(name)) for name in ("train", "validation", "test")] == [128, 32, 40]
    task = TextClassificationTask(str(folder / "model"), str(folder / "reviews"), max_length=8)
    assert [len(task.load_split(name)) for name in ("train", "validation", "test")] == [128, 32, 40]
    batch = task.load_split("test").__getitems__([0, 1, 2])
    assert batch["input_ids"].shape == batch["attention_mask"].shape and batch["input_ids"].shape[1] <= 8
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    assert (batch["input_ids"][:, 0] == 2).all()  # [CLS]
    assert task.fingerprint("test") == task.fingerprint("test") != task.fingerprint("train")
    logits = task.predict(task.load_base_model().eval(), batch)
    assert logits.shape == (3, 2) and task.loss(task.load_base_model(), batch).ndim == 0


def test_the_tokenizer_is_that_of_the_model_or_made_of_the_training_texts(folder, tmp_path):
    task = TextClassificationTask(str(folder / "model"), str(folder / "reviews"))
    ids = task.tokenizer("the film was LOVELY unheard")["input_ids"]
    assert task.tokenizer.decode(ids) == "[CLS] the film was lovely [UNK] [SEP]" and len(task.tokenizer) <= 40
    task.save_base_model(task.load_base_model(), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("the film")["input_ids"] == task.tokenizer("the film")["input_ids"]
    again = TextClassificationTask(str(tmp_path), str(folder / "reviews"))
    assert torch.equal(again.load_split("test").input_ids, task.load_split("test").input_ids)


def test_wrong_data_sets(folder, tmp_path):
    (tmp_path / "columns.csv").write_text("words,label\na,0\nb,1\n")
    (tmp_path / "numbers.csv").write_text("text,label\n1,0\n2,1\n")
    for name in ("columns", "numbers"):
        with pytest.raises(ValueError, match="has no column text of strings; its columns of strings are (words|none)"):
            TextClassificationTask(str(folder / "model"), str(tmp_path / f"{name}.csv"))
    with pytest.raises(ValueError, match="too small to hold out"):
        write_csv(tmp_path / "small.csv", 3)
        TextClassificationTask(str(folder / "model"), str(tmp_path / "small.csv"))
    with pytest.raises(ValueError, match="neither a folder with a transformers config.json"):
        TextClassificationTask(str(tmp_path / "nothing"), str(folder / "reviews"))
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        TextClassificationTask(str(folder / "model"), str(folder / "reviews"), max_length=0)


def test_the_whole_job(folder, tmp_path):
    recipe = PDiffConfig(
        task="text_classification",
        model=str(folder / "model"),
        dataset=str(folder / "reviews"),
        output_dir=str(tmp_path),
        base_epochs=2,
        base_batch_size=16,
        select=["attention[-1]", "head"],
        num_snapshots=10,
        collect_batch_size=32,
        collect_learning_rate=1e-2,
        latent_dim=4,
        autoencoder_steps=5,
        autoencoder_batch_size=5,
        denoiser_steps=5,
        denoiser_batch_size=5,
        num_models=4,
        baseline_models=0,
        num_inference_steps=3,
    )
    run = finish(recipe)
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    groups = {group["name"]: group for group in report["groups"]}
    assert groups["snapshots"]["n"] == 10 and groups["generated"]["n"] == 4
    # What is scored is what the saved network says about texts that its saved tokenizer reads.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base_model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base_model")
    parameters = run.parameters[-1:]
    model.load_state_dict(run.layout.unflatten(parameters[0]), strict=False)
    with open(folder / "reviews" / "test.csv") as file:
        rows = list(csv.DictReader(file))
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    models = NetworkRunner(run.base_model, run.layout)
    scored = list(predict_logits(run.task, models, "test", parameters))
    assert len(scored) == 1
    torch.testing.assert_close(scored[0][2][0], logits, atol=1e-5, rtol=1e-4)
    assert [model.config.id2label[int(label)] for label in scored[0][3]] == [row["label"] for row in rows]
