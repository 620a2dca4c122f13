"""A small language model, made on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<user>", "<bot>", *"abcdefgh"]


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def save_tokenizer(folder: Path, template: str | None = None) -> None:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def make_llama(folder: Path, template: str | None = None) -> str:
    """Writes a Llama with a tokenizer of twelve words, and returns its folder."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    network = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32))
    network.save_pretrained(folder)
    save_tokenizer(folder, template)
    return str(folder)
