"""Multiple choice by likelihood, and families over a column that names tasks: descriptions to generated adapters."""

import json

import pytest
import torch
from support.language import ids, make_llama
from support.scripts import run_script
from support.texts import make_text_encoder
from transformers import LlamaForCausalLM

from pdiff_hf import PDiffPipeline
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout
from pdiff_hf.tasks import make_family, make_task
from pdiff_hf.tasks.multiple_choice import MultipleChoiceTask
from pdiff_hf.tasks.task import accuracies, take

peft = pytest.importorskip("peft")
TOPICS = ["law", "chess", "cooking", "texts", "questions"]


def write(folder, rows):
    (folder / "data").mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "data")


@torch.no_grad()
def test_the_likeliest_answer_is_chosen(tmp_path):
    model = make_llama(tmp_path / "llama")
    for choices in (["a", "b", "c"], ["a b", "c", "d d d"]):
        rows = [{"prompt": p, "choices": choices, "answer": i % 3} for i, p in enumerate(["e f g", "h", "a b c d e"])]
        rows[1]["answer"] = choices[1]
        task = make_task("multiple_choice", {"model": model, "dataset": write(tmp_path, rows)})
        plain = LlamaForCausalLM.from_pretrained(model).eval()
        batch = task.collate(take(task.load_split("train"), [0, 1, 2]))
        network, other = task.load_base_model(), make_task("multiple_choice", {"model": model, "dataset": task.dataset})
        torch.testing.assert_close(other.predict(plain, batch), task.predict(network, batch))  # of elsewhere, too
        assert batch["labels"].tolist() == [0, 1, 2] and batch["input_ids"].shape[1] == (1 if choices[0] == "a" else 3)
        expected = []
        for row in rows:
            for choice in choices:
                whole = ids(f"{row['prompt']} {choice}")
                start = len(row["prompt"].split())
                scores = plain(torch.tensor([whole])).logits[0].log_softmax(-1)
                expected.append(sum(scores[i - 1, whole[i]].item() for i in range(start, len(whole))))
        found = task.predict(network, batch)
        torch.testing.assert_close(found, torch.tensor(expected).view(3, 3), rtol=1e-4, atol=1e-4)
        layout = select_layout(network, "norm")
        parameters = layout.flatten(network.state_dict()).repeat(2, 1)
        scores = accuracies(task, NetworkRunner(network, layout), "test", parameters)
        right = (found.argmax(1) == batch["labels"]).float().mean().item()
        assert scores.tolist() == pytest.approx([100 * right] * 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "choices": ["a", "b"], "answer": "c"}, "answer, row 1: 'c' is none of the choices"),
        ({"prompt": "a", "choices": ["a", "b"], "answer": "2"}, "answer, row 1: '2' is none of the choices"),
        ({"prompt": "a", "choices": ["a"], "answer": "a"}, "choices, row 1: there are 1, and 2 in the first row"),
        ({"prompt": "a", "choices": None, "answer": "a"}, "choices, row 1: None is not a list of non-empty texts"),
        (
            {"prompt": "a", "choices": ["a", ""], "answer": "a"},
            r"choices, row 1: \['a', ''\] is not a list of non-empty texts",
        ),
    ],
)
def test_what_is_refused(tmp_path, row, message):
    rows = [{"prompt": "a", "choices": ["a", "b"], "answer": "a"}, row]
    with pytest.raises(ValueError, match=message):
        MultipleChoiceTask(make_llama(tmp_path / "llama"), write(tmp_path, rows))
    with pytest.raises(ValueError, match="has no column answer"):
        MultipleChoiceTask(str(tmp_path / "llama"), write(tmp_path, [{"prompt": "a", "choices": ["a", "b"]}]))


def questions(num_examples: int = 6) -> list[dict]:
    """Ten tasks of two descriptions and a third one for when they are unseen."""
    rows = []
    for t, topic in enumerate(TOPICS):
        for negated in (False, True):
            told = [f"the {topic}", f"answers on {topic}", f"translates a {topic}"]
            for i in range(num_examples):
                answer = int("abcdefgh"[(i + t) % 8] in "abcd") ^ negated
                row = {"prompt": f"{'abcdefgh'[(i + t) % 8]} {'hgfedcba'[i % 8]}", "choices": ["a", "b"]}
                said = ("the the " if negated else "") + told[i % 3]
                rows.append(
                    row | {"answer": answer, "task": f"{topic} {negated}", "told": said, "sign": float(negated)}
                )
    return rows


def test_a_task_without_training_examples_is_refused(tmp_path):
    data = write(tmp_path, questions())
    with open(f"{data}/test.jsonl", "a") as file:
        file.write(json.dumps(questions()[0] | {"task": "new"}) + "\n")
    base = MultipleChoiceTask(make_llama(tmp_path / "llama"), data)
    with pytest.raises(ValueError, match="task 'new' of dataset .* has no train examples"):
        make_family("tabled", base, {"fields": {"sign": {"type": "scalar", "low": 0.0, "high": 1.0}}})


def test_tasks_that_a_column_names(tmp_path):
    base = MultipleChoiceTask(make_llama(tmp_path / "llama"), write(tmp_path, questions()))
    encoder = make_text_encoder(tmp_path / "encoder")
    fields = {"told": {"type": "text", "encoder": encoder}, "sign": {"type": "scalar", "low": 0.0, "high": 1.0}}
    family = make_family("tabled", base, {"fields": fields})
    assert len(family.members) == 10 and family.num_examples("train") == 6
    sets = family.split({"train": 6, "validation": 2, "test": 2}, seed=0)
    keys = [{family.key(condition) for condition in conditions} for conditions in sets.values()]
    assert len(set.union(*keys)) == 10
    assert all(len(condition["told"]) == 2 for condition in sets["train"])
    assert all(condition["told"][0].endswith(tuple(f"translates a {t}" for t in TOPICS)) for condition in sets["test"])
    table = family.fields.table(sets["test"])
    for one in (table, table + 1e-5):
        batch = family.batch("train", one, torch.tensor([[0, 1, 2], [3, 4, 5]]))
        assert batch["labels"].shape == (2, 3) and batch["input_ids"].shape[:3] == (2, 3, 1)
        for t, condition in enumerate(sets["test"]):
            own = [
                row for row in questions() if condition["told"][0] == row["told"] and condition["sign"] == row["sign"]
            ]
            rows = [row for row in questions() if row["task"] == own[0]["task"]][3 * t : 3 * t + 3]
            assert batch["labels"][t].tolist() == [row["answer"] for row in rows]
    with pytest.raises(ValueError, match="no task of dataset .* has such a condition"):
        family.batch("train", table + 1, torch.arange(2))
    (condition,) = family.fields.conditions(family.fields.table(sets["train"][:1]))
    assert family.described(condition) == sets["train"][0]
    model = family.load_base_model()
    encoded, encode = [], base.encode
    base.encode = lambda text: encoded.append(text) or encode(text)
    logits = family.prompted(model)(table, batch, torch.Generator())
    assert encoded == [f"{condition['told'][0]}\n" for condition in sets["test"]]
    prompt = base.encode(sets["test"][1]["told"][0]) + batch["input_ids"][1, 0, 0][-2:].tolist()
    expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[ids("a b")]
    torch.testing.assert_close(logits[1, 0], expected)
    number = {"type": "scalar", "low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match="has no column 'tusk'"):
        make_family("tabled", base, {"fields": {"sign": number}, "column": "tusk"})
    with pytest.raises(ValueError, match="column 'answer' has several values for one task"):
        make_family("tabled", base, {"fields": {"answer": number}})


def test_adapters_from_descriptions(tmp_path, monkeypatch):
    make_llama(tmp_path / "llama")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    encoder = make_text_encoder(tmp_path / "encoder")
    run_script(
        monkeypatch,
        "train.py",
        *("--task=multiple_choice", "--dataset", write(tmp_path, questions(8)), "--model", tmp_path / "adapter"),
        *("--family=tabled", "--family_args", json.dumps({"fields": {"told": {"type": "text", "encoder": encoder}}})),
        *("--select", "*lora_*", "--base_epochs=0", "--num_tasks=6", "--num_validation_tasks=2", "--num_test_tasks=2"),
        *("--num_snapshots=6", "--collect_steps=3", "--collect_every=1", "--collect_batch_size=4", "--latent_dim=2"),
        *(
            "--adapter_products=true",
            "--autoencoder_preset=pca",
            "--heldout_snapshots=0",
            "--denoiser_preset=mlp",
        ),
        *("--denoiser_steps=3", "--tune_steps=2", "--tune_models=2", "--tune_batch_size=4", "--num_models=2"),
        *("--baselines=few", "--task_args=adapter_rank=4", "--output_dir", tmp_path / "out"),
    )
    report = (tmp_path / "out" / "evaluation" / "report.md").read_text()
    assert all(name in report for name in ("trained on the task", "kernel ridge", "told in its prompt", "shuffled"))
    tuned = json.loads((tmp_path / "out" / "stages" / "tune.json").read_text())["results"]
    losses, pipe = tuned["validation_loss_of_rank"], PDiffPipeline.from_pretrained(tmp_path / "out")
    assert {*losses} == {"2", "4"} and str(pipe.autoencoder.config.adapter_rank) == min(losses, key=losses.get)
    latents, tokens = torch.randn(1, 2), torch.tensor([ids("a b c")])
    (network,) = pipe.decode(latents, "model")
    for rank in (None, 4):
        (adapter,) = pipe.decode(latents, "adapter", rank=rank)
        adapter.save_pretrained(tmp_path / "generated")
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "generated")
        assert loaded.peft_config["default"].r == (rank or tuned["adapter_rank"])
        torch.testing.assert_close(loaded(tokens).logits, network(tokens).logits)
    with pytest.raises(ValueError, match="adapter_rank=4 is for a model with an adapter"):
        MultipleChoiceTask(str(tmp_path / "llama"), str(tmp_path / "data"), adapter_rank=4)
