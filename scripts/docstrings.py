"""
Questions about where a paragraph of documentation comes from, and the small language model that answers them.

The paragraphs are those of the docstrings of installed packages. A decoder is trained here to continue them, and to
name the package behind each. A task is to tell some of the packages from the others; it comes with descriptions in
words. The recipe `adapters.yaml` makes adapters for such tasks from their descriptions.
"""

import ast
import importlib.util
import itertools
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from pdiff_hf.tasks.multiple_choice import MultipleChoiceTask
from pdiff_hf.training import Loop, LoopArguments
from pdiff_hf.utils.files import replacing

# What descriptions say of each package; and, in other words, where a task is unseen. The text encoder finds those words
# likest to their own package, so that the answer can be known.
PACKAGES = {
    "datasets": (
        "datasets|loading data sets|rows and columns of examples|splits for training and testing|"
        "streaming of shards|features of a dataset and their types|caches in the Arrow format|"
        "mapping a function over many examples|data on the Hub|downloading and preparing data|"
        "filtering, shuffling and concatenating examples|builders of a data set and their configurations|"
        "large collections of data|audio and image columns|datasets that are read lazily|"
        "sharing training data|corpora|a hub of public corpora|benchmarks to download|Parquet and JSON files|"
        "examples with labels|dictionaries of columns|"
        "a table of training samples that does not fit into memory|splitting a corpus|loading scripts|"
        "batches of rows|iterating over samples|fingerprints and cached files|collections that can be shared|"
        "text, image and audio samples on disk|preprocessing of samples|an archive of examples",
        "repositories of records",
    ),
    "diffusers": (
        "diffusers|generating pictures|pipelines that remove noise|text to image|Stable Diffusion|"
        "noise schedulers|variational autoencoders and UNets|inpainting of images from a prompt|"
        "denoising diffusion models|samplers and their timesteps|video generation|latents and guidance|"
        "ControlNet and adapters for images|generative models of images|turning noise into a picture|"
        "image to image|drawing from a prompt|image synthesis|creating illustrations|painting by machine|"
        "pictures made up from words|editing an image|latent diffusion|upscaling of images|denoisers|"
        "schedules of noise|animation and video from text|a UNet that predicts noise|"
        "guidance scale and negative prompts|image generators|style of a picture|"
        "stable diffusion checkpoints",
        "artificial photographs and artwork",
    ),
    "matplotlib": (
        "matplotlib|plots|figures with axes and lines|colors, markers and legends|drawing on a canvas|"
        "ticks and labels|scatter diagrams and histograms|subplots of a figure|colormaps and colorbars|"
        "rendering of lines, patches and text|saving a figure to PDF|interactive windows and toolkits|"
        "limits and scales of an axis|drawing curves|pictures of data|annotations and arrows|graphs|graphics|"
        "diagrams|plotting|bars, pies and lines|illustrating numbers|curves and surfaces|"
        "the look of a figure|fonts and text in a plot|heat maps and contours|PNG and SVG output|"
        "polar and 3D axes|backends and event loops|styles of lines|presenting measurements graphically|"
        "a grid of panels",
        "charts visualizing results",
    ),
    "numpy": (
        "numpy|arrays|arrays of numbers and their shapes|universal functions and broadcasting|"
        "matrices, linear algebra|element-wise operations|slices and indices of an array|"
        "polynomials and random numbers|n-dimensional arrays|dtypes and memory layout|Fourier transforms|"
        "sums and products along an axis|sorting and searching arrays|calculations with vectors|"
        "floating-point numbers|masked arrays|mathematics|numerical methods|number crunching|"
        "vectors and matrices|integers, floats and complex numbers|algebra|buffers of numbers in memory|"
        "rounding, minimum and maximum|vectorized code|reshaping and stacking|C and Fortran order|"
        "exponentials and logarithms|bits and bytes of numbers|eigenvalues and inverses|"
        "ranges and grids of numbers|math functions",
        "scientific computing and arithmetic",
    ),
    "pandas": (
        "pandas|tables|series and data frames|groups, joins and pivots|time series, dates and periods|"
        "an index with missing values|reading CSV files into a table|categories and intervals|"
        "data analysis with tables|rows selected by label|merging two tables|resampling and rolling windows|"
        "columns of a data frame|cleaning tabular data|aggregation by group|time zones and offsets|"
        "tabular data|Excel sheets|a table with named columns|dates and times|data wrangling|"
        "business figures in tables|SQL-like queries|financial time series|null and duplicate entries|"
        "hierarchical labels of rows|pivot tables|importing and exporting tables|summaries by group|"
        "strings in a column|frames of data|sheets of rows and columns",
        "spreadsheets",
    ),
    "sklearn": (
        "scikit-learn|classical machine learning|fitting estimators|cross-validation and scores|"
        "decision trees|support vector machines|choosing and scaling features|predicting targets|"
        "random forests and boosting|principal components and other decompositions|"
        "hyperparameters and grid search|metrics such as precision and recall|nearest neighbors|"
        "linear models with a penalty|labels of samples and their probabilities|"
        "supervised and unsupervised learning|predictive modelling|data mining|classifiers|models of data|"
        "estimating and evaluating|pipelines with preprocessing|cross-validated models|"
        "Bayesian models and Gaussian processes|dimensionality reduction|grouping similar samples|"
        "fit and predict|outliers and anomalies|kernels and margins|ensembles of trees|scikit estimators|"
        "machine learning without tensors",
        "regression, clustering and statistical inference",
    ),
    "torch": (
        "torch|tensors|tensors and their gradients|modules and layers|CUDA devices and kernels|autograd|"
        "optimizers of parameters in backward passes|compiled graphs and distributed processes|"
        "trainable weights|convolutions and activations|automatic differentiation|data-parallel processes|"
        "quantized and sparse tensors|hooks and state dicts|just-in-time compilation|"
        "losses and learning rates|backpropagation|training on accelerators|gradient descent|"
        "differentiable programs|layers, weights and biases|CUDA|multilayer perceptrons|graphs of operations|"
        "half precision and memory|dispatch of operators|stochastic optimizers|"
        "recurrent and convolutional layers|exporting and tracing modules|worker processes and collectives|"
        "parameters that require gradients|low-level kernels",
        "deep neural networks on GPUs",
    ),
    "transformers": (
        "transformers|language models|tokenizers and attention|pretrained checkpoints|"
        "generation with beam search|BERT and GPT|encoders and decoders|configurations of models of text|"
        "vocabularies and token ids|fine-tuning a pretrained model|hidden states and attention masks|"
        "summaries of long articles|sequence classification|models of vision|chat templates and prompts|"
        "large language models|understanding and writing text|dialogue|asking questions|"
        "linguistics and text|generated text|large pretrained models|LLMs|text encoders|sentences and words|"
        "helpful assistants|completing a sentence|masked language modelling|summarization|"
        "multilingual models|attention heads|reading comprehension",
        "chatbots, translation and natural speech",
    ),
}
STYLES = (
    "{}",
    "tell texts about {} from all others",
    "yes for {}, no for everything else",
    "is it about {}?",
    "find what is said of {}",
    "a paragraph belongs if it is on {}",
    "documentation of {}",
    "which sentences mention {}?",
    "keep everything that concerns {}, reject the rest",
    "I only want to read about {}",
    "does this come from a library for {}?",
    "flag passages on {}",
)
UNSEEN_STYLE = "answer positively when the topic is {}"
NUM_DESCRIPTIONS = 24  # of each task, and one more in other words
NUM_TEXTS, MIN_WORDS, MAX_WORDS = 1000, 8, 40  # of each package
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
EXAMPLES = {"train": 240, "validation": 60, "test": 160}  # of each task
ANSWERS = ["<no>", "<yes>"]
NUM_TASKS = 104
VOCABULARY, MAX_TOKENS = 4000, 32
TO_LEARN = "to_learn.json"  # texts that the network beside them has not seen yet
NETWORK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass
class DocstringQuestions(MultipleChoiceTask):
    """
    The data set and the model are made where they are named, if they are not there. The model is trained when a
    run starts, after all settings have been checked.

    Args: those of [`MultipleChoiceTask`]: `dataset` is a folder `DIR/data`, and `model` the folder `DIR/adapter`.
    """

    model: str = "outputs/docstrings/adapter"
    dataset: str = "outputs/docstrings/data"
    max_length: int = MAX_TOKENS

    def __post_init__(self) -> None:
        if not Path(self.model).is_dir() or not Path(self.dataset).is_dir():
            make(Path(self.dataset).parent)
        super().__post_init__()

    def prepare_run(self) -> None:
        learn(Path(self.model))


def paragraphs(package: str, generator: torch.Generator, most: int = 20) -> list[str]:
    """`NUM_TEXTS` of the docstrings of a package, of `most` times as many, without its own name, in random order."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    found: dict[str, None] = {}
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                for part in text.split("\n\n"):
                    words = re.sub(package, " ", part, flags=re.IGNORECASE).split()
                    if len(words) >= MIN_WORDS:
                        found[" ".join(words[:MAX_WORDS])] = None
        if len(found) > most * NUM_TEXTS:
            break
    texts = list(found)
    return [texts[i] for i in torch.randperm(len(texts), generator=generator)[:NUM_TEXTS].tolist()]


def make(folder: Path, seed: int = 0, kind: str = "llama") -> None:
    """
    Writes `data`, `adapter`, and `network`, of a type of transformers, into a folder. The network is as it was drawn;
    `learn` trains it.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = {package: paragraphs(package, generator, 3) for package in PACKAGES}
    parts: dict[str, dict[str, list[str]]] = {split: {} for split in SHARES}
    for package, found in texts.items():
        start = 0
        for split, share in SHARES.items():
            stop = start + round(share * len(found))
            parts[split][package], start = found[start:stop], stop
    with replacing(folder / "network") as target:
        write_network(parts["train"], target, seed, kind)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    add_adapter(folder / "network", folder / "adapter", seed)
    with replacing(folder / "data") as target:
        target.mkdir()
        for split, own in parts.items():
            lines = [json.dumps(row) + "\n" for row in questions(own, EXAMPLES[split], generator)]
            (target / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def tasks() -> list[tuple[int, ...]]:
    """Which packages are to be told from the others; no task is another one with its answers swapped."""
    sets = [bits for bits in itertools.product((0, 1), repeat=len(PACKAGES)) if 2 <= sum(bits) <= 4]
    sets = [bits for bits in sets if 2 * sum(bits) < len(bits) or bits[0]]
    order = torch.randperm(len(sets), generator=torch.Generator().manual_seed(0))
    return [sets[i] for i in order[:NUM_TASKS].tolist()]


def descriptions(bits: tuple[int, ...], generator: torch.Generator) -> list[str]:
    """Of a task, in other words each; the last one in words that no other one has."""
    of_packages = [phrases for bit, phrases in zip(bits, PACKAGES.values(), strict=True) if bit]

    def said(style: str, unseen: bool) -> str:
        ways = [phrases[unseen].split("|") for phrases in of_packages]
        chosen = [own[int(torch.randint(len(own), (), generator=generator))] for own in ways]
        *first, last = [chosen[i] for i in torch.randperm(len(chosen), generator=generator).tolist()]
        return style.format(", ".join(first) + f" or {last}")

    return [*(said(STYLES[i % len(STYLES)], False) for i in range(NUM_DESCRIPTIONS)), said(UNSEEN_STYLE, True)]


def questions(texts: dict[str, list[str]], count: int, generator: torch.Generator) -> Iterable[dict]:
    """The rows of a split: for each task equally many texts of both answers."""
    names = list(PACKAGES)
    for bits in tasks():
        told = descriptions(bits, torch.Generator().manual_seed(int("".join(map(str, bits)), 2)))
        for i in range(count):
            own = [name for name, bit in zip(names, bits, strict=True) if bit == i % 2]
            package = own[int(torch.randint(len(own), (), generator=generator))]
            text = texts[package][int(torch.randint(len(texts[package]), (), generator=generator))]
            yield {
                "prompt": f"{text} <from>",
                "choices": ANSWERS,
                "answer": i % 2,
                "task": " ".join(name for name, bit in zip(names, bits, strict=True) if bit),
                "description": told[i % len(told)],
                "packages": list(map(float, bits)),
            }


def write_network(texts: dict[str, list[str]], folder: Path, seed: int, kind: str) -> None:
    """A decoder of 340,000 parameters, its tokenizer, and what it has to learn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<from>", *ANSWERS, *(f"<{package}>" for package in texts)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=words.pre_tokenizer.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(itertools.chain(*texts.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", additional_special_tokens=special[1:], truncation_side="left"
    )
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, max_position_embeddings=128, tie_word_embeddings=True, **NETWORK
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Path(folder, TO_LEARN).write_text(json.dumps(texts), encoding="utf-8")


def learn(folder: Path, seed: int = 0) -> None:
    """Trains the network in a folder, if it is not yet, to continue texts, and to say which package they are from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not Path(folder, TO_LEARN).is_file():
        return
    texts = json.loads(Path(folder, TO_LEARN).read_text(encoding="utf-8"))
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [
        tokenizer(f"{text} <from><{package}>", truncation=True, max_length=MAX_TOKENS)["input_ids"]
        for package, found in texts.items()
        for text in found
    ]
    ids = torch.tensor([[0] * (MAX_TOKENS - len(row)) + row for row in rows])  # (N, T), filled up at the left

    def loss(model: nn.Module, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        batch = ids[indices].to(generator.device)
        labels = batch.masked_fill(batch == 0, -100)
        output = model(input_ids=batch, attention_mask=(batch > 0).long(), labels=labels)
        # The last token of 32 says more than the others.
        return output.loss + nn.functional.cross_entropy(output.logits[:, -2], batch[:, -1])

    steps = LoopArguments(5 * len(rows) // 64, 64, 4e-3, lr_warmup_steps=50, weight_decay=0.01, max_grad_norm=1.0)
    Loop(Accelerator(), seed).train(network, loss, len(rows), steps, description="language model")
    with replacing(folder) as target:
        network.eval().save_pretrained(target)
        tokenizer.save_pretrained(target)


def add_adapter(network: Path, folder: Path, seed: int, rank: int = 4) -> None:
    """Writes an adapter that changes nothing yet."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(network), config).save_pretrained(folder)


if __name__ == "__main__":
    make(Path("outputs/docstrings"))
    learn(Path("outputs/docstrings/network"))
