"""LoRA adapters on demand: binary text classifiers for every way to group the packages that docstrings come from.

    python scripts/benchmarks/adapters.py
    python scripts/benchmarks/adapters.py --size 7b   # how long adapters of a large model take, and what memory

The texts are paragraphs of the docstrings of installed packages, in files; the classes are the packages. A small BERT
is trained on all of them. The zoo are adapters of it, one for each seen grouping, and a generator of adapters is
audited on groupings that it has not seen: learned as products BA, and as the factors A and B.
"""

import argparse
import csv
import resource
import shutil
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, PDiffPipeline
from pdiff_hf.models import DENOISER_PRESETS, autoencoder_architecture, encode_in_batches
from pdiff_hf.models.products import AdapterProducts
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.scripts.docstrings import PACKAGES, paragraphs
from pdiff_hf.snapshots import adapter_layout, import_snapshots, load_snapshots, parameter_matrix

BERT = {
    "vocab_size": 4000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RECIPE = {
    "task": "text_classification",
    "family": "grouped",
    "num_tasks": 64,
    "num_validation_tasks": 16,
    "num_test_tasks": 32,
    "base_epochs": 0,
    "select": ["*lora_*", "*classifier*"],
    "num_snapshots": 128,
    "collect_steps": 300,
    "collect_every": 50,
    "collect_learning_rate": 0.005,
    "collect_args": {"weight_decay": 0.0},
    "collect_batch_size": 16,
    "autoencoder_preset": "pca",
    "latent_dim": 100,
    "heldout_snapshots": 0.0,
    "autoencoder_args": {"latent_scaling": "together"},
    "denoiser_preset": "mlp",
    "denoiser_steps": 1500,
    "denoiser_batch_size": 64,
    "prediction_type": "v_prediction",
    "tune_steps": 0,
    "num_models": 4,
    "num_inference_steps": 10,
    "max_eval_samples": 400,
    "baselines": "few",
}


def write_texts(folder: Path, seed: int) -> None:
    """`train.csv` and `test.csv`, with one class for each package."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    rows = [(text, package) for package in PACKAGES for text in paragraphs(package, generator)]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    for name, part in (("train", rows[len(rows) // 4 :]), ("test", rows[: len(rows) // 4])):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])


def finish(recipe: PDiffConfig) -> RunContext:
    run = prepare(recipe)
    execute(run)
    return run


def make_adapter(folder: Path, texts: Path, seed: int, rank: int) -> Path:
    """A BERT that knows the packages, and an adapter for it, with two outputs, that changes nothing yet."""
    BertConfig(**BERT).save_pretrained(folder / "config")
    settings = {
        "task": "text_classification",
        "model": str(folder / "config"),
        "dataset": str(texts),
        "output_dir": str(folder / "bert"),
        "base_epochs": 12,
        "base_learning_rate": 1e-3,
        "stages": ["base"],
        "select": ["*classifier*"],
        "seed": seed,
    }
    trained = finish(PDiffConfig(**settings)).folder / "base_model"
    torch.manual_seed(seed)
    names = {0: "negative", 1: "positive"}
    network = AutoModelForSequenceClassification.from_pretrained(
        trained, id2label=names, label2id={name: i for i, name in names.items()}, ignore_mismatched_sizes=True
    )
    network.save_pretrained(folder / "network")
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder / "network")
    network = AutoModelForSequenceClassification.from_pretrained(folder / "network")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], task_type="SEQ_CLS")
    get_peft_model(network, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


# Adapters of the attention of a model with 7 billion parameters: files of 1 GB, and products that would take 550 GB.
LARGE = {"num_adapters": 128, "num_modules": 64, "hidden_size": 4096, "rank": 8}
LARGE_LATENT = 64


def write_large(folder: Path) -> list[Path]:
    """Adapters, as PEFT writes them, that have moved from one initialisation, in a few directions that they share."""
    size, rank, generator = LARGE["hidden_size"], LARGE["rank"], torch.Generator().manual_seed(0)
    layers = range(LARGE["num_modules"] // 2)
    modules = [f"model.layers.{i}.self_attn.{name}" for i in layers for name in ("q_proj", "v_proj")]
    shape = (len(modules), rank, size)
    start = torch.randn(shape, generator=generator) / size**0.5
    shared = torch.randn(2, 6, *shape, generator=generator) / size**0.5  # of A and B
    folders = [folder / f"task{k:03d}" for k in range(LARGE["num_adapters"])]
    for k, path in enumerate(folders):
        weights = torch.randn(2, 6, generator=generator)
        noise = 0.1 * torch.randn(2, *shape, generator=generator) / size**0.5
        a = (start + 0.3 * torch.einsum("w,wmri->mri", weights[0], shared[0]) + noise[0]).bfloat16()
        b = (torch.einsum("w,wmri->mri", weights[1], shared[1]) + noise[1]).mT.bfloat16()
        tensors = {
            f"base_model.model.{module}.lora_A.weight": one.contiguous() for module, one in zip(modules, a, strict=True)
        }
        tensors |= {
            f"base_model.model.{module}.lora_B.weight": one.contiguous() for module, one in zip(modules, b, strict=True)
        }
        alpha, base = (8, 16, 32)[k % 3], "someone/model-7b"
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], base_model_name_or_path=base)
        config.save_pretrained(str(path))
        save_file(tensors, path / "adapter_model.safetensors")
    return folders


def measure_large(folder: Path) -> None:
    """Time on this machine's CPU and peak memory of each step from files to a generated adapter."""
    folders = [folder / f"task{k:03d}" for k in range(LARGE["num_adapters"])]
    if not all((path / "adapter_model.safetensors").is_file() for path in folders):
        # In a process of its own, because it takes memory.
        writer = torch.multiprocessing.get_context("spawn").Process(target=write_large, args=(folder,))
        writer.start()
        writer.join()
    for name in ("snapshots", "pipeline", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    last = [time.process_time(), time.perf_counter()]

    def took(what: str) -> None:
        cpu, wall = time.process_time() - last[0], time.perf_counter() - last[1]
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imports) / 2**20
        print(f"{what:30} {cpu:7.1f} s of CPU {wall:7.1f} s, peak {peak:.2f} GB above imports", flush=True)
        last[:] = time.process_time(), time.perf_counter()

    layout = adapter_layout(folders)
    report = import_snapshots(folders, layout, folder / "snapshots")
    took(f"import ({len(report['scaled'])} scaled)")
    dataset, layout = load_snapshots(folder / "snapshots")
    rows = parameter_matrix(dataset, layout)
    took("read and check")
    size = AdapterProducts(layout, 128).layout.num_parameters
    architecture = autoencoder_architecture("tokens", size, None, len(rows), True)
    autoencoder = ParameterAutoencoder(
        layout.to_dict(), latent_dim=LARGE_LATENT, adapter_products=True, adapter_frame_size=128, **architecture
    ).eval()
    geometry = autoencoder.fit_parameter_statistics(rows)
    assert geometry is not None
    took("frames, Gram matrix, bases")
    print({name: round(value, 4) for name, value in geometry.report().items()})
    parts = torch.arange(len(rows)).split(16)
    autoencoder.fit_latent_statistics(torch.cat([autoencoder.tokenize(rows, part) for part in parts]))
    latents = encode_in_batches(autoencoder, rows)
    took("latents")
    denoiser = LatentDenoiser(LARGE_LATENT, **DENOISER_PRESETS["mlp"])
    PDiffPipeline(autoencoder, denoiser, DPMSolverMultistepScheduler()).save_pretrained(folder / "pipeline")
    saved = sum(file.stat().st_size for file in (folder / "pipeline").rglob("*") if file.is_file())
    took(f"save ({saved / 1e6:.0f} MB)")
    pipe = PDiffPipeline.from_pretrained(folder / "pipeline")
    took("load")
    (adapter,) = pipe.decode(latents[:1], "adapter")
    adapter.save_pretrained(folder / "adapter")
    took("decode and write one")
    error = (pipe.encode(str(folders[0])) - latents[:1]).abs().max()
    took(f"encode one (off by {error:.1g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/adapters")
    parser.add_argument("--rank", type=int, default=4, help="Of the adapters.")
    parser.add_argument("--num_tasks", type=int, default=RECIPE["num_tasks"])
    parser.add_argument("--tune_steps", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", choices=("bert", "7b"), default="bert")
    args = parser.parse_args()
    if args.size == "7b":
        measure_large(Path(args.output_dir, "7b"))
        return
    for seed in args.seeds:
        folder = Path(args.output_dir, f"seed{seed}")
        write_texts(folder / "texts", seed)
        settings = RECIPE | {
            "model": str(make_adapter(folder, folder / "texts", seed, args.rank)),
            "dataset": str(folder / "texts"),
            "num_tasks": args.num_tasks,
            "num_snapshots": 2 * args.num_tasks,
            "tune_steps": args.tune_steps,
            "tune_args": {"map": bool(args.tune_steps)},
            "seed": seed,
        }
        zoo = finish(PDiffConfig(**settings | {"output_dir": str(folder / "zoo"), "stages": ["base", "collect"]}))
        for products in (True, False):
            name = "products" if products else "factors"
            own = {"snapshots": str(zoo.folder / "snapshots"), "adapter_products": products}
            run = finish(PDiffConfig(**settings | own | {"output_dir": str(folder / name)}))
            print(
                f"## Seed {seed}, {name}\n\n{(run.folder / 'evaluation' / 'report.md').read_text(encoding='utf-8')}",
                flush=True,
            )


if __name__ == "__main__":
    main()
