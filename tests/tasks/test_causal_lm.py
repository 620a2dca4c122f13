"""Language models: what is read and what is predicted, the metric, and adapters from files to generated ones."""

import math

import datasets
import pytest
import torch
from support.language import WORDS, ids, make_llama, save_tokenizer
from support.scripts import run_script
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout
from pdiff_hf.tasks.causal_lm import IGNORED, CausalLMTask
from pdiff_hf.tasks.task import take

peft = pytest.importorskip("peft")
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama with a tokenizer of twelve words, and three adapters for it."""
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder / "model", TEMPLATE)
    for i in range(3):
        base = LlamaForCausalLM.from_pretrained(folder / "model")
        config = peft.LoraConfig(r=2 + i, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(base, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(i))
        wrapped.save_pretrained(folder / "adapters" / f"task{i}")
    return folder


def write(folder, rows):
    datasets.Dataset.from_list(rows * 10).to_json(folder / "train.jsonl")
    return str(folder / "train.jsonl")


KINDS = {
    "text": ({"text": "a b c"}, "a b c <eos>", 0),
    "prompt": ({"prompt": "a b", "completion": "c d"}, "a b c d <eos>", 2),
    "messages": (
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]},
        "<user> a b <bot> c d",
        4,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_and_what_is_predicted(kind, model, tmp_path):
    row, text, read = KINDS[kind]
    task = CausalLMTask(str(model / "model"), write(tmp_path, [row]))
    batch = task.collate(take(task.load_split("train"), [0, 1]))
    assert batch["input_ids"][0].tolist() == ids(text)
    assert batch["labels"][0].tolist() == [IGNORED] * read + ids(text)[read:]
    assert CausalLMTask(str(model / "model"), write(tmp_path, [row]), max_length=3).fingerprint("train") != (
        task.fingerprint("train")
    )


@pytest.mark.parametrize(
    ("kind", "read", "predicted"),
    [("text", "", "a b c"), ("prompt", "b", "c d <eos>"), ("messages", "<bot>", "c d")],
)
def test_of_long_prompts_the_end_is_kept(kind, read, predicted, model, tmp_path):
    length = len(f"{read} {predicted}".split())
    task = CausalLMTask(str(model / "model"), write(tmp_path, [KINDS[kind][0]]), max_length=length)
    batch = task.collate(take(task.load_split("train"), [0, 1]))
    assert batch["input_ids"][0].tolist() == ids(f"{read} {predicted}")
    assert batch["labels"][0].tolist() == [IGNORED] * len(ids(read)) + ids(predicted)


def test_a_message_without_a_prompt_is_predicted(model, tmp_path):
    row = {"messages": [{"role": "assistant", "content": "c d"}]}
    task = CausalLMTask(str(model / "model"), write(tmp_path, [row]))
    (labels,) = task.collate(take(task.load_split("train"), [0]))["labels"]
    assert labels.tolist() == ids("<bot> c d")


@pytest.mark.parametrize(
    ("template", "predicted"),
    [
        # A prompt ends with the start of a thought, which the written answer lacks.
        (TEMPLATE.replace("%}<bot> {%", "%}<bot> e {%"), "c d"),
        # How many messages there are stands before them.
        ("{{ 'a ' if messages | length == 1 else 'b ' }}" + TEMPLATE, None),
    ],
)
def test_the_answer_begins_where_a_template_puts_it(template, predicted, model, tmp_path):
    task = CausalLMTask(str(model / "model"), write(tmp_path, [KINDS["messages"][0]]))
    task.tokenizer.chat_template = template
    if predicted is None:
        with pytest.raises(ValueError, match="does not write the messages before the last one as it writes them alone"):
            task.load_split("train")
    else:
        (labels,) = task.collate(take(task.load_split("train"), [0]))["labels"]
        assert labels.tolist() == [IGNORED] * 4 + ids(predicted)


@torch.no_grad()
def test_the_loss_of_a_token(model, tmp_path):
    rows = [{"prompt": "a b", "completion": "c d e"}, {"prompt": "f", "completion": "g"}]
    task = CausalLMTask(str(model / "model"), write(tmp_path, rows), adapter=str(model / "adapters" / "task0"))
    network = task.load_base_model()
    layout = select_layout(network, "*.lora_*")
    parameters = torch.stack([layout.flatten(network.state_dict()), torch.zeros(layout.num_parameters)])
    measured = task.measure(NetworkRunner(network, layout), "test", parameters)
    plain = LlamaForCausalLM.from_pretrained(model / "model").eval()
    for one, expected in ((network, measured[0]), (plain, measured[1])):
        losses = []
        for i in range(len(task.load_split("test"))):
            batch = task.collate(take(task.load_split("test"), [i]))
            logits = one(batch["input_ids"]).logits.log_softmax(-1)[0, :-1]
            labels = batch["labels"][0, 1:]
            losses += [-logits[t, label].item() for t, label in enumerate(labels) if label != IGNORED]
        assert math.isclose(sum(losses) / len(losses), expected.item(), rel_tol=1e-5)
    assert task.higher_is_better is False


@torch.no_grad()
def test_exact_answers_are_those_that_greedy_decoding_gives(model, tmp_path):
    prompts = ["a b", "f", "c c d", "h e"]
    network = LlamaForCausalLM.from_pretrained(model / "model").eval()
    rows = []
    for i, prompt in enumerate(prompts):
        made = network.generate(torch.tensor([ids(prompt)]), max_new_tokens=3, do_sample=False, eos_token_id=None)
        words = [WORDS[token] for token in made[0].tolist()[len(prompt.split()) :]]
        rows.append({"prompt": prompt, "completion": " ".join(words if i % 2 else ["g", *words[1:]])})
    task = CausalLMTask(str(model / "model"), write(tmp_path, rows), measured="exact_match")
    task.tokenizer.eos_token = None
    layout = select_layout(network, "norm")
    measured = task.measure(NetworkRunner(network, layout), "test", layout.flatten(network.state_dict())[None])
    right = [task._raw["test"][i]["completion"] in (rows[1]["completion"], rows[3]["completion"]) for i in range(8)]
    task._splits["test"].append((ids("a"), 0))  # has nothing to predict, and is no exact answer
    again = task.measure(NetworkRunner(network, layout), "test", layout.flatten(network.state_dict())[None])
    assert measured.item() == again.item() == pytest.approx(100 * sum(right) / 8) and (task.metric, task.unit) == (
        "exact match",
        "%",
    )


@torch.no_grad()
def test_encoders_read_prompts(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    network = T5ForConditionalGeneration(T5Config(vocab_size=12, decoder_start_token_id=0, **sizes)).eval()
    network.save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    rows = [{"prompt": "a b", "completion": "c d e"}, {"prompt": "f", "completion": "g"}]
    task = CausalLMTask(str(tmp_path / "t5"), write(tmp_path, rows))
    batch = task.collate(take(task.load_split("train"), range(8)))
    long = batch["labels"].ne(IGNORED).sum(1).argmax()
    assert batch["input_ids"][long].tolist() == ids("a b") and batch["labels"][long].tolist() == ids("c d e <eos>")
    assert batch["decoder_input_ids"][long].tolist() == ids("<pad> c d e")
    expected = network(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(task.loss(task.load_base_model(), batch), expected)
    with pytest.raises(ValueError, match="has an encoder, which needs prompts"):
        CausalLMTask(str(tmp_path / "t5"), write(tmp_path, [{"text": "a b"}]))


def test_from_adapters_to_generated_adapters(model, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "a b", "completion": "c d"}, {"prompt": "e f", "completion": "g h"}]
    flags = (
        *("--task=causal_lm", "--dataset", write(tmp_path, rows), "--model", model / "model", "--select", "*.lora_*"),
        *("--base_epochs=0", "--adapter_products=true", "--autoencoder_preset=pca", "--latent_dim=2"),
        *("--heldout_snapshots=0", "--denoiser_steps=2", "--num_models=2", "--baseline_models=0"),
        *("--output_dir", tmp_path / "out"),
    )
    run_script(monkeypatch, "collect.py", *flags, "--import", model / "adapters")
    assert "3 snapshots of" in capsys.readouterr().out
    run_script(monkeypatch, "train.py", *flags)
    assert "loss of a token" in (tmp_path / "out" / "evaluation" / "report.md").read_text()
    run_script(
        monkeypatch, "generate.py", tmp_path / "out", "--num_models=1", "--adapters", "--output_dir", tmp_path / "g"
    )
    base = LlamaForCausalLM.from_pretrained(model / "model")
    made = peft.PeftModel.from_pretrained(base, tmp_path / "g" / "network-00000")
    assert made.peft_config["default"].r == 4 and made(torch.tensor([[4, 5]])).logits.isfinite().all()


def test_a_network_in_half_precision_keeps_its_adapter_in_single(model, tmp_path):
    rows, adapter = write(tmp_path, [KINDS["prompt"][0]]), str(model / "adapters" / "task0")
    network = CausalLMTask(str(model / "model"), rows, adapter=adapter, dtype="bfloat16").load_base_model()
    types = {("lora_" in name, parameter.dtype) for name, parameter in network.named_parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got 'int8'"):
        CausalLMTask(str(model / "model"), rows, dtype="int8")


def test_what_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="max_length must be at least 2"):  # all answers would be exact ones
        CausalLMTask(str(model / "model"), write(tmp_path, [KINDS["prompt"][0]]), max_length=1)
    with pytest.raises(ValueError, match="no column text, nor messages, nor prompt and completion.*columns are x"):
        CausalLMTask(str(model / "model"), write(tmp_path, [{"x": "a"}]))
    with pytest.raises(ValueError, match="column completion, row 1: it is empty"):
        CausalLMTask(str(model / "model"), write(tmp_path, [KINDS["prompt"][0], {"prompt": "a", "completion": " "}]))
    from pdiff_hf.tasks.text_classification import TextClassificationTask

    rows = write(tmp_path, [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(ValueError, match="one of a language model .task_type CAUSAL_LM.*--task causal_lm"):
        TextClassificationTask(str(model / "model"), rows, adapter=str(model / "adapters" / "task0"))
