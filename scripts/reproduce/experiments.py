"""
The tables and figures of the paper, each of them runs that differ in what it varies and have all else in common.

An `Experiment` is data: its rows, what each varies, and what the paper prints. `reproduce` turns rows into recipes,
carries them out, and writes the paper's table with the numbers of these runs beside the paper's. Runs live side by side
in one folder, named after a digest of their settings, and take over every stage that another one has finished with the
same settings: a base model is trained and its snapshots are collected once, whatever asks for them, and what was killed
goes on where it was.
"""

import csv
import dataclasses
import fnmatch
import hashlib
import json
import logging
import math
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch.utils.flop_counter import FlopCounterMode

from pdiff_hf.evaluation.baselines import standard_baselines
from pdiff_hf.evaluation.plots import (
    GENERATED,
    ORIGINAL,
    ScatterGroup,
    plot_accuracy_vs_similarity_panels,
    plot_max_similarity_distribution,
    plot_memory,
    plot_reverse_process,
)
from pdiff_hf.evaluation.report import format_table
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import DENOISER_PRESETS, autoencoder_architecture
from pdiff_hf.run.recipe import Recipe, TaskSection
from pdiff_hf.run.run import FOLDERS, Run, stage_settings
from pdiff_hf.selection import select_parameters
from pdiff_hf.tasks import make_task
from pdiff_hf.training import NoiseArguments, make_training_scheduler, train_autoencoder, train_denoiser
from pdiff_hf.training.loop import LoopArguments
from pdiff_hf.utils.files import write_json

logger = logging.getLogger(__name__)

SCALES = ("small", "paper")
SMALL_DATASET = "zalando-datasets/fashion_mnist"

# Of the paper's data sets: their id on the Hub, what the paper calls them, and how many training images there are.
DATASETS = {
    "cifar10": ("uoft-cs/cifar10", "CIFAR-10", 50_000),
    "cifar100": ("uoft-cs/cifar100", "CIFAR-100", 50_000),
    "stl10": ("tanganke/stl10", "STL-10", 5_000),
    "flowers": ("dpdl-benchmark/oxford_flowers102", "Flowers", 1_020),
    "pets": ("timm/oxford-iiit-pet", "Pets", 3_680),
    "food101": ("ethz/food101", "Food-101", 75_750),
    "imagenet": ("ILSVRC/imagenet-1k", "ImageNet-1K", 1_281_167),
    "mnist": ("ylecun/mnist", "MNIST", 60_000),
    "svhn": ("ufldl-stanford/svhn:cropped_digits", "SVHN", 73_257),
    "coco": ("detection-datasets/coco", "COCO", 117_266),
    "coco_masks": ("nateraw/pascal-voc-2012", "COCO, the classes of Pascal VOC", 1_464),
}
TRAIN_SIZES = {hub_id: size for hub_id, _, size in DATASETS.values()} | {SMALL_DATASET: 60_000, "digits": 898}


@dataclass(frozen=True)
class Architecture:
    """
    A network of the paper.

    Args:
        label (`str`): What the paper calls it.
        recipe (`str`): The recipe file that it starts from.
        small (`Mapping`): Settings at the small scale, where a run is to take well under 40 minutes on one slow core.
        paper (`Mapping`): Settings at the paper's scale.
        small_dataset (`str`, *optional*): What the data set is called at the small scale, `{}` being its name.
        minutes (`float`, *optional*): What a run at the small scale was measured to take on one slow core, for tasks
            other than classification, whose operations are not counted.
        features (`str`, *optional*): Recipe of the classifier that is trained first at the small scale, because FID is
            measured on its features.
    """

    label: str
    recipe: str
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    small_dataset: str = "{}"
    minutes: float | None = None
    features: str | None = None


def _mini(label: str, name: str, **paper) -> Architecture:
    return Architecture(label, name, paper=paper)


def _other_task(label: str, name: str, minutes: float, **paper) -> Architecture:
    """A network that torchvision has with weights; at the small scale for garments on canvases, as its recipe says."""
    return Architecture(label, name, {}, {"model_args": "{}", "base_epochs": 0} | paper, "canvas:{}", minutes)


_AT_32 = {"image_size": 32}
_VIT_AT_32 = _AT_32 | {"model_args": '{"img_size": 32}'}
ARCHITECTURES = {
    "resnet18": Architecture(
        "ResNet-18",
        "partial",
        {"model": "resnet18", "max_train_samples": 20_000, "base_epochs": 3},
        {"model": "timm/resnet18.a1_in1k"},
    ),
    "resnet50": Architecture(
        "ResNet-50",
        "partial",
        _AT_32 | {"model": "resnet50", "max_train_samples": 8_000, "base_epochs": 2},
        {"model": "timm/resnet50.a1_in1k"},
    ),
    "vit_tiny": Architecture(
        "ViT-Tiny",
        "partial",
        _VIT_AT_32 | {"model": "vit_tiny_patch16_224", "max_train_samples": 20_000, "base_epochs": 3},
        {"model": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"},
    ),
    "vit_base": Architecture(
        "ViT-Base",
        "partial",
        _VIT_AT_32
        | {
            "model": "vit_base_patch16_224",
            "max_train_samples": 4_000,
            "base_epochs": 2,
            "base_batch_size": 32,
            "base_learning_rate": 1e-4,
            "max_eval_samples": 300,
        },
        {"model": "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"},
    ),
    "convnext_tiny": Architecture(
        "ConvNeXt-Tiny",
        "partial",
        _AT_32 | {"model": "convnext_tiny", "max_train_samples": 8_000, "base_epochs": 2},
        {"model": "timm/convnext_tiny.in12k_ft_in1k"},
    ),
    "convnext_base": Architecture(
        "ConvNeXt-Base",
        "partial",
        _AT_32 | {"model": "convnext_base", "max_train_samples": 3_000, "base_epochs": 2, "max_eval_samples": 500},
        {"model": "timm/convnext_base.fb_in22k_ft_in1k"},
    ),
    "convnet_mini": _mini("ConvNet-mini", "convnet_mini"),
    "mlp_mini": _mini("MLP-mini", "mlp_mini"),
    "resnet_mini": _mini("ResNet-mini", "resnet_mini"),
    "vit_mini": _mini("ViT-mini", "vit_mini"),
    "convnext_mini": _mini("ConvNeXt-mini", "convnext_mini"),
    "cnn3_mini": _mini("3-layer CNN", "cnn3_mini", latent_dim=128),
    # The paper gives no learning rates for these: they are those of the small scale.
    "faster_rcnn": _other_task(
        "Faster R-CNN",
        "faster_rcnn",
        12,
        model="fasterrcnn_resnet50_fpn:COCO_V1",
        collect_learning_rate=2e-4,
        max_train_samples=20_000,
        max_eval_samples=1_000,
    ),
    "fcos": _other_task(
        "FCOS",
        "fcos",
        15,
        model="fcos_resnet50_fpn:COCO_V1",
        collect_learning_rate=2e-3,
        max_train_samples=20_000,
        max_eval_samples=1_000,
    ),
    "fcn": _other_task(
        "FCN",
        "fcn",
        15,
        model="fcn_resnet50:COCO_WITH_VOC_LABELS_V1",
        collect_learning_rate=1e-2,
        max_train_samples=None,
    ),
    "ddpm": Architecture(
        "DDPM UNet",
        "ddpm",
        paper={
            "model": "google/ddpm-cifar10-32",
            "model_args": "{}",
            "base_epochs": 0,
            "collect_learning_rate": 3e-4,
            "max_eval_samples": 10_000,
            "fid_features": "inception",
        },
        minutes=20,
        features="cnn3_mini",
    ),
}
MINIS = ("convnet_mini", "mlp_mini", "resnet_mini", "vit_mini", "convnext_mini")

# What all rows have in common, beside their recipe file.
SMALL_SETTINGS = {"max_eval_samples": 1_000, "num_snapshots": 200, "num_models": 100, "baseline_models": 0}
PAPER_SETTINGS = {  # Table 5
    "base_epochs": 10,
    "base_batch_size": 128,
    "base_learning_rate": 5e-4,
    "base_weight_decay": 5e-4,
    "max_eval_samples": None,
    "num_snapshots": 300,
    "collect_batch_size": 128,
    "collect_weight_decay": 5e-4,
    "autoencoder_preset": "paper",
    "normalization": "tensor",
    "autoencoder_steps": 500,
    "autoencoder_batch_size": 50,
    "autoencoder_learning_rate": 2e-5,
    "autoencoder_warmup_steps": 0,
    "parameter_noise": 1e-3,
    "latent_noise": 0.1,
    "denoiser_preset": "paper",
    "denoiser_steps": 1_000,
    "denoiser_batch_size": 50,
    "denoiser_learning_rate": 1e-4,
    "ema_decay": 0.0,
    "num_train_timesteps": 1_000,
    "num_models": 200,
    "num_inference_steps": 1_000,
    "baseline_models": 0,
}
# Pretrained networks at their own size; the published implementation trains longer, with longer latents, on the minis.
PAPER_PARTIAL = {"image_size": 0, "collect_learning_rate": 0.03, "latent_dim": 128}
PAPER_ENTIRE = {"latent_dim": 768, "autoencoder_steps": 2_000, "denoiser_steps": 8_000}


@dataclass(frozen=True)
class Column:
    """
    A column of numbers.

    Args:
        title (`str`): The paper's.
        statistic (`str`, *optional*): One of `STATISTICS`, or `memory`; None for what only the paper has.
        group (`str`, *optional*): Group of the report that it is of; by default the one that the row is about.
    """

    title: str
    statistic: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Row:
    """
    A row of a table, or a point of a figure: one group of networks of one run.

    Args:
        run (`str`): Name of the run; rows with the same one are about the same run.
        label (`str`): First cell of the row.
        varies (`Mapping`): What the experiment is about: recipe keys in which its runs differ.
        paper (`Sequence[str]`): What the paper prints, as it prints it, for the first columns or none.
        group (`str`, *optional*, defaults to `"generated"`): Of the report.
        architecture (`str`, *optional*, defaults to `"resnet18"`): One of `ARCHITECTURES`.
        dataset (`str`, *optional*, defaults to `"cifar100"`): One of `DATASETS`.
    """

    run: str
    label: str
    varies: Mapping[str, Any]
    paper: Sequence[str] = ()
    group: str = "generated"
    architecture: str = "resnet18"
    dataset: str = "cifar100"


@dataclass(frozen=True)
class Experiment:
    """
    A table or figure of the paper.

    Args:
        title (`str`): What it shows.
        varied (`str`): What the rows differ in, the title of the first column.
        columns (`Sequence[Column]`): Of numbers.
        rows (`Sequence[Row]`): In the paper's order.
        draw (`Callable`, *optional*): `draw(path, rows, reports)` draws the figure: rows with the report of each.
        settings (`Mapping`, *optional*): Recipe keys that all of its rows need.
        note (`str`, *optional*): What a reader has to know to compare the numbers.
        measures_memory (`bool`, *optional*, defaults to `False`): Rows are measured by `measure_training`, not run.
    """

    title: str
    varied: str = ""
    columns: Sequence[Column] = ()
    rows: Sequence[Row] = ()
    draw: Callable[[Path, Sequence[Row], Sequence[dict]], None] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    measures_memory: bool = False


class ExperimentError(ValueError):
    """An experiment cannot be carried out as asked; nothing was changed."""


# --------------------------------------------------------------------------------------------------- what the paper has

_BEST_AND_AVERAGE = (Column("best", "best"), Column("average", "average"))
_ORIGINAL_BEST_AND_AVERAGE = (Column("original", "best", "original"), *_BEST_AND_AVERAGE)
_COMPARED = (
    Column("original", "best", "original"),
    Column("ensemble", "best", "ensemble"),
    Column("p-diff", "best"),
    Column("original average", "average", "original"),  # the paper has none
    Column("p-diff average", "average"),
)
_ACCURACY_AND_SIMILARITY = (Column("accuracy", "average"), Column("maximum similarity", "similarity"))

_TABLE_1 = {  # original, ensemble, p-diff
    "resnet18": ("77.4 77.7 77.9", "95.1 95.1 95.2", "80.1 79.2 79.7", "89.0 88.8 89.1", "79.1 79.4 79.4")
    + ("69.5 70.3 70.4",),
    "resnet50": ("78.4 78.6 78.7", "97.0 96.9 97.1", "85.9 85.8 86.1", "92.6 92.1 92.5", "80.4 80.0 80.1")
    + ("78.3 78.5 78.5",),
    "vit_tiny": ("86.7 86.4 86.7", "97.8 97.6 97.7", "87.6 87.5 87.6", "90.5 89.9 90.4", "87.4 87.4 87.5")
    + ("75.2 75.4 75.4",),
    "vit_base": ("91.2 91.1 91.2", "99.1 99.1 99.1", "98.1 98.0 98.2", "94.1 94.1 94.4", "91.3 91.2 91.2")
    + ("85.1 85.1 85.1",),
    "convnext_tiny": ("89.8 89.6 89.8", "99.1 98.9 99.0", "98.2 98.2 98.3", "94.2 93.7 93.9", "91.6 91.5 91.6")
    + ("83.4 83.7 83.7",),
    "convnext_base": ("93.2 93.1 93.2", "99.7 99.6 99.7", "99.5 99.5 99.5", "95.2 94.7 95.0", "92.8 92.9 93.0")
    + ("85.1 85.3 85.3",),
}
_TABLE_1_DATASETS = ("cifar100", "stl10", "flowers", "pets", "food101", "imagenet")
_TABLE_2 = {
    "cifar10": ("56.0 55.6 55.8", "41.8 41.8 42.4", "58.6 58.1 58.5", "73.4 73.6 73.6", "72.0 71.7 71.9"),
    "stl10": ("46.4 45.6 46.1", "35.0 35.0 35.2", "51.5 51.4 51.8", "52.3 52.0 52.6", "48.1 47.8 48.1"),
}


def _cell(architecture: str, dataset: str, numbers: str, **varies) -> Row:
    name = f"{architecture}/{dataset}"
    label = f"{ARCHITECTURES[architecture].label}, {DATASETS[dataset][1]}"
    return Row(name, label, varies, numbers.split(), architecture=architecture, dataset=dataset)


def _noise_rows(label: str, run: str, **varies) -> list[Row]:
    """The groups of one run that figures 3 and 4 show."""
    groups = ("original", "generated", "noise 0.001", "noise 0.05", "noise 0.15")
    return [Row(run, f"{label}: {group}", varies, group=group) for group in groups]


def _noises(name: str, default: float, factors: str, numbers: Sequence[str]) -> list[Row]:
    """Rows of Tables 3b and 3c: the default, then multiples of it."""
    rows = [Row("default", f"{default:g}", {name: default}, numbers[0].split())]
    for factor, printed in zip(factors.split(), numbers[1:], strict=True):
        rows.append(Row(f"x{factor}", f"×{factor}", {name: default * float(factor)}, printed.split()))
    return rows


def _augmentation_rows(numbers: Sequence[str] = ("", "", "", "")) -> list[Row]:
    settings = {
        "none": ("no noise", 0.0, 0.0),
        "parameter": ("parameter noise", 1e-3, 0.0),
        "latent": ("latent noise", 0.0, 0.1),
        "both": ("parameter and latent noise", 1e-3, 0.1),
    }
    return [
        Row(run, label, {"parameter_noise": parameter, "latent_noise": latent}, printed.split())
        for (run, (label, parameter, latent)), printed in zip(settings.items(), numbers, strict=True)
    ]


def _scatter(report: dict, name: str, family: str) -> ScatterGroup:
    accuracies = next(row["accuracies"] for row in report["groups"] if row["name"] == name)
    return ScatterGroup(family, torch.tensor(accuracies, dtype=torch.float64), _max_iou(report, name))


def _max_iou(report: dict, name: str) -> torch.Tensor:
    iou = next(row["iou"] for row in report["audit"]["rows"] if row["name"] == name)
    return torch.tensor([math.nan if value is None else value for value in iou], dtype=torch.float64)


def _draw_against_noise(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figures 3 and 4: one panel a run."""
    panels = {}
    for row, report in zip(rows, reports, strict=True):
        if row.group == "generated":
            noise = [_scatter(report, r.group, "noise") for r in rows if r.run == row.run and "noise" in r.group]
            groups = (
                _scatter(report, "original", "originals"),
                _scatter(report, "generated", "generated"),
                noise,
            )
            panels[row.label.partition(":")[0]] = groups
    plot_accuracy_vs_similarity_panels(path, panels)


def _draw_augmentation(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figure 5a: the generated networks of all runs in one panel. Their originals are the same."""
    generated = [_scatter(report, "generated", row.label) for row, report in zip(rows, reports, strict=True)]
    originals = _scatter(reports[-1], "original", "originals")
    plot_accuracy_vs_similarity_panels(path, {"noise augmentation": (originals, generated[-1], generated[:-1])})


def _draw_trajectories(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figure 5b."""
    process, groups = reports[0]["reverse_process"], reports[0]["groups"]
    plot_reverse_process(path, process["steps"], torch.tensor(process["accuracy"]), groups[0]["accuracy_mean"])


def _draw_similarities(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figure 5c."""
    shown = {row.label: _max_iou(report, row.group) for row, report in zip(rows, reports, strict=True)}
    colours = [ORIGINAL if row.group == "original" else GENERATED for row in rows]
    plot_max_similarity_distribution(path, shown, colours)


def _draw_memory(path: Path, rows: Sequence[Row], measured: Sequence[dict]) -> None:
    """Table 13, with measurements in place of reports."""
    sizes, curves = [row.varies["num_parameters"] for row in rows], {}
    for network, column in (("autoencoder", 0), ("denoiser", 2)):
        fit = [memory[network].memory / 1e6 if memory[network].fits else math.nan for memory in measured]
        curves[network] = (fit, [float(row.paper[column]) for row in rows])
    plot_memory(path, sizes, curves)


_SUBSETS = {
    "layer2": ("normalization layers of layer2.1", ["layer2.1.bn*"], ""),
    "layer3": ("normalization layers of layer3.1", ["layer3.1.bn*"], ""),
    "convolution": ("convolution of the last shortcut", ["layer4.0.downsample.0.weight"], ""),
    "classifier": ("fully-connected layer", ["head"], ""),
    "default": ("last two normalization layers", ["norm[-2:]"], "77.4 77.9 77.7"),
}
_SAMPLES = {10: "77.0 76.6", 50: "77.5 77.2", 200: "77.8 77.5", 300: "77.9 77.7", 400: "78.0 77.6"}
_OF_OTHER_TASKS = (
    Column("original", "average", "original"),
    Column("p-diff", "average"),
    Column("original best", "best", "original"),  # the paper has none
    Column("p-diff best", "best"),
)

EXPERIMENTS = {
    "table1": Experiment(
        "Partial parameters: architectures and data sets",
        "architecture, data set",
        _COMPARED,
        [
            _cell(architecture, dataset, numbers, **({"base_epochs": 0} if dataset == "imagenet" else {}))
            for architecture, printed in _TABLE_1.items()
            for dataset, numbers in zip(_TABLE_1_DATASETS, printed, strict=True)
        ],
    ),
    "table2": Experiment(
        "Entire networks",
        "architecture, data set",
        _COMPARED,
        [
            _cell(architecture, dataset, numbers)
            for dataset, printed in _TABLE_2.items()
            for architecture, numbers in zip(MINIS, printed, strict=True)
        ],
    ),
    "table3a": Experiment(
        "Noise augmentation of the autoencoder",
        "noise",
        _BEST_AND_AVERAGE,
        _augmentation_rows(("77.5 76.7", "77.4 76.7", "77.9 77.6", "77.9 77.7")),
        note="The text of the paper that the numbers were taken from has lost the labels of these rows; they are in "
        "the order that its discussion suggests.",
    ),
    "table3b": Experiment(
        "Noise on the parameters, σ_v",
        "noise scale",
        _BEST_AND_AVERAGE,
        _noises(
            "parameter_noise",
            1e-3,
            "0.01 5 2000 5000",
            ("77.9 77.7", "77.9 77.6", "77.9 77.6", "77.9 77.6", "77.3 76.8"),
        ),
    ),
    "table3c": Experiment(
        "Noise on the latents, σ_z",
        "noise scale",
        _BEST_AND_AVERAGE,
        _noises(
            "latent_noise", 0.1, "0.01 0.1 10 100", ("77.9 77.7", "77.4 76.7", "77.4 76.8", "77.9 77.6", "77.5 77.2")
        ),
    ),
    "table3d": Experiment(
        "Optimizer of the snapshots",
        "optimizer",
        _ORIGINAL_BEST_AND_AVERAGE,
        [
            Row("sgd", "SGD", {"collect_optimizer": "sgd"}, ["77.6", "77.5", "77.3"]),
            Row("adam", "Adam", {"collect_optimizer": "adam"}, ["79.7", "79.6", "79.4"]),
            Row("adamw", "AdamW", {"collect_optimizer": "adamw"}, ["77.4", "77.9", "77.7"]),
        ],
        note="The optimizer is that of the fine-tuning steps; the base model is the same for all rows.",
    ),
    "table3e": Experiment(
        "Number of snapshots, K",
        "samples (K)",
        _BEST_AND_AVERAGE,
        [Row(f"K{k}", str(k), {"num_snapshots": k}, printed.split()) for k, printed in _SAMPLES.items()],
    ),
    "table3f": Experiment(
        "Subsets of the parameters",
        "subset",
        _ORIGINAL_BEST_AND_AVERAGE,
        [Row(run, label, {"select": select}, p.split()) for run, (label, select, p) in _SUBSETS.items()],
        note="The text of the paper that the numbers were taken from has lost the labels of the rows. In its order "
        "they read (original, best, average): 77.8, 77.8, 77.3; 77.8, 77.8, 77.7; 77.4, 77.5, 77.0; 77.7, 77.3, 76.8; "
        "and the default last. Which layers the first four are is not said; the subsets here are our choice.",
    ),
    "table4": Experiment(
        "Noise scales and the similarity to the originals",
        "parameter and latent noise",
        (Column("best", "best"), Column("similarity range", "range")),
        [
            Row(run, label, {"parameter_noise": 1e-3 * factor, "latent_noise": 0.1 * factor}, printed.split())
            for run, label, factor, printed in (
                ("default", "0.001 and 0.1", 1, "77.9 0.85~0.87"),
                ("x0.01", "×0.01", 0.01, "77.4 0.75~0.84"),
                ("x0.1", "×0.1", 0.1, "77.4 0.75~0.83"),
                ("x10", "×10", 10, "77.9 0.82~0.87"),
                ("x100", "×100", 100, "77.6 0.79~0.83"),
            )
        ],
    ),
    "table7": Experiment(
        "A network of the hyper-representation papers, and their generators",
        "data set",
        (
            Column("original", "average", "original"),
            Column("S_KDE30", "average", "S_KDE30"),
            Column("SANE_SUB", "average", "SANE_SUB"),
            Column("SANE_KDE30", "average", "SANE_KDE30"),
            Column("p-diff", "average"),
        ),
        [
            _cell("cnn3_mini", "mnist", "92.1 68.6 86.7 84.8 93.3"),
            _cell("cnn3_mini", "svhn", "71.3 54.5 72.3 70.7 74.1", model_args='{"in_chans": 3}'),
        ],
        settings={"hyper_representations": True},
        note="Average accuracies. The originals are snapshots of one run, where those papers have a zoo of models that "
        "differ from initialisation on, and the samplers of S_KDE30, SANE_SUB and SANE_KDE30 draw from this library's "
        "codes of networks, not from those of transformers of their own (`evaluation/hyper_representations.py` lists "
        "all differences). SANE_SUB is selected on the validation images, five candidates for each that is kept.",
    ),
    "table8": Experiment(
        "A variational autoencoder as the generator",
        "method",
        (*_BEST_AND_AVERAGE, Column("similarity range", "range")),
        [
            Row("default", "original", {}, ["77.4", "76.9", "0.93~0.98"], "original"),
            Row("default", "vae", {}, ["77.3", "76.6", "0.74~0.82"], "vae"),
            Row("default", "p-diff", {}, ["77.9", "77.7", "0.85~0.87"]),
        ],
        settings={"baseline_models": 20},
    ),
    "table9": Experiment(
        "Length of the diffusion, T",
        "diffusion steps",
        _BEST_AND_AVERAGE,
        [
            Row(f"T{t}", str(t), {"num_train_timesteps": t, "num_inference_steps": min(t, 20)}, printed.split())
            for t, printed in ((10, "74.6 70.5"), (100, "77.9 77.6"), (1000, "77.9 77.7"), (2000, "77.8 77.5"))
        ],
        note="As in the paper, betas stay the same when T changes, so that with T = 10 the noisiest latents are still "
        "nearly clean. Sampling takes 20 steps of DPM-Solver++ (10 with T = 10) instead of T steps of DDPM.",
    ),
    "table10": Experiment(
        "Object detection",
        "detector, data set",
        _OF_OTHER_TASKS,
        [_cell("faster_rcnn", "coco", "36.9 37.0"), _cell("fcos", "coco", "39.1 39.1")],
        note="At the small scale, images are garments of Fashion-MNIST on larger canvases. The paper does not say "
        "which layers it generates.",
    ),
    "table11": Experiment(
        "Semantic segmentation",
        "network, data set",
        _OF_OTHER_TASKS,
        [_cell("fcn", "coco_masks", "60.5 60.7")],
        note="At the small scale, images are garments of Fashion-MNIST on larger canvases; at the paper's, those of "
        "Pascal VOC, which has the same classes as the paper's part of COCO.",
    ),
    "table12": Experiment(
        "Image generation",
        "network, data set",
        _OF_OTHER_TASKS,
        [_cell("ddpm", "cifar10", "3.17 3.19")],
        note="At the small scale, FID is on features of a classifier of the same data, and of as many generated images "
        "as the split has.",
    ),
    "table13": Experiment(
        "Memory of training against the number of generated parameters",
        "parameters",
        (Column("autoencoder (MB)", "memory"), Column("latent dimension"), Column("diffusion (MB)", "memory")),
        [
            Row(str(size), f"{size:,}", {"num_parameters": size, "latent_dim": latent}, (ae, str(latent), diffusion))
            for size, latent, ae, diffusion in (
                (2_048, 128, "658", "530"),
                (30_016, 256, "3756", "1418"),
                (100_288, 512, "13352", "3594"),
                (300_288, 1024, "44882", "12942"),
            )
        ],
        draw=_draw_memory,
        note="Peak memory of two training steps with a batch of 50, each in a process of its own: the resident set "
        "above what it was before training, with the 100 snapshots, which are mapped from a file, or what PyTorch "
        "allocates on a GPU. MB are 10^6 bytes.",
        measures_memory=True,
    ),
    "figure3": Experiment(
        "Accuracy against similarity: under-trained originals",
        "training, group",
        _ACCURACY_AND_SIMILARITY,
        _noise_rows("1 epoch", "1", base_epochs=1) + _noise_rows("3 epochs", "3", base_epochs=3),
        _draw_against_noise,
        {"baseline_models": 20},
    ),
    "figure4": Experiment(
        "Accuracy against similarity: diversity of the originals",
        "snapshots, group",
        _ACCURACY_AND_SIMILARITY,
        [
            row
            for rate in (0.03, 0.0003, 0.003, 0.3)
            for row in _noise_rows(f"learning rate {rate:g}", f"{rate:g}", collect_learning_rate=rate)
        ],
        _draw_against_noise,
        {"baseline_models": 10},
        note="The small learning rate is 0.0003 in the paper's text and 0.003 in the figure's caption; both are here.",
    ),
    "figure5a": Experiment(
        "Accuracy against similarity: noise augmentation",
        "noise",
        _ACCURACY_AND_SIMILARITY,
        _augmentation_rows(),
        _draw_augmentation,
    ),
    "figure5b": Experiment(
        "Accuracy along the reverse process",
        "group",
        (Column("accuracy", "average"),),
        [
            Row("default", "original", {}, ("77.4",), "original"),
            Row("default", "generated", {}),
        ],
        _draw_trajectories,
    ),
    "figure5c": Experiment(
        "Similarity against the number of snapshots, K",
        "K, group",
        _ACCURACY_AND_SIMILARITY,
        [
            Row(f"K{k}", f"K = {k}: {group}", {"num_snapshots": k}, group=group)
            for k in _SAMPLES
            for group in ("original", "generated")
        ],
        _draw_similarities,
    ),
}


# ------------------------------------------------------------------------------------------------------ rows to recipes


def find_experiment(name: str) -> Experiment:
    """The experiment of that name; an `ExperimentError` if there is none."""
    if name not in EXPERIMENTS:
        raise ExperimentError(f"there is no experiment '{name}'; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def select_rows(name: str, patterns: Sequence[str] | None = None, one_dataset: bool = False) -> list[Row]:
    """
    Rows of an experiment.

    Args:
        name (`str`): Of the experiment.
        patterns (`Sequence[str]`, *optional*): Globs of the names of runs; all by default.
        one_dataset (`bool`, *optional*, defaults to `False`): Of rows that differ only in the paper's data set, the
            first, without its name: another data set takes its place.
    """
    rows = list(find_experiment(name).rows)
    if one_dataset:
        first = {}
        for row in rows:
            first.setdefault(row.architecture, row.dataset)
        rows = [
            dataclasses.replace(row, label=row.label.replace(f", {DATASETS[row.dataset][1]}", ""))
            for row in rows
            if row.dataset == first[row.architecture]
        ]
    for pattern in patterns or ():
        if not any(fnmatch.fnmatch(row.run, pattern) for row in rows):
            names = ", ".join(dict.fromkeys(row.run for row in rows))
            raise ExperimentError(f"no row of {name} is named '{pattern}'; there are {names}")
    if patterns:
        rows = [row for row in rows if any(fnmatch.fnmatch(row.run, pattern) for pattern in patterns)]
    return rows


def expand(
    name: str,
    recipes: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    scale: str = "small",
    dataset: str | None = None,
    seeds: Sequence[int] = (0,),
    patterns: Sequence[str] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> list[tuple[Row, list[Recipe]]]:
    """
    Rows of an experiment with a recipe for each seed.

    Args:
        name (`str`): Of the experiment.
        recipes (`str` or `os.PathLike`): Folder of the recipe files that architectures start from.
        output_dir (`str` or `os.PathLike`): Runs are in its folder `runs`.
        scale (`str`, *optional*, defaults to `"small"`): `"small"`, or `"paper"` for its data sets and its Table 5.
        dataset (`str`, *optional*): In place of the paper's data sets; at the small scale `SMALL_DATASET` by default.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`): Of the runs of each row.
        patterns (`Sequence[str]`, *optional*): See `select_rows`.
        changes (`Mapping`, *optional*): Recipe keys to set for all rows.

    Raises:
        ExperimentError: for an unknown experiment, row or scale, and for changes of what the experiment itself varies.
        ValueError: for a value that a recipe refuses.
    """
    if scale not in SCALES:
        raise ExperimentError(f"scale must be one of {', '.join(SCALES)}, got '{scale}'")
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ExperimentError(f"seeds must be different numbers, got {list(seeds)}")
    changes = changes or {}
    for key, flag in (("seed", "--seeds"), ("output_dir", "--output_dir"), ("dataset", "--dataset")):
        if key in changes:
            raise ExperimentError(f"{key} is set with {flag}")
    if scale == "small":
        dataset = dataset or SMALL_DATASET
    experiment, plan = find_experiment(name), []
    for row in select_rows(name, patterns, one_dataset=dataset is not None):
        clash = sorted((set(row.varies) | set(experiment.settings)) & set(changes))
        if clash:
            raise ExperimentError(f"{name} sets {', '.join(clash)} itself")
        if experiment.measures_memory:
            plan.append((row, []))
            continue
        architecture = ARCHITECTURES[row.architecture]
        settings = dict(_read_recipe(Path(recipes, f"{architecture.recipe}.yaml")))
        if scale == "small":
            if architecture.minutes is None:  # recipes of other tasks are small
                settings |= SMALL_SETTINGS
            settings |= architecture.small
        else:
            settings |= PAPER_SETTINGS | (PAPER_ENTIRE if settings.get("select") == ["all"] else PAPER_PARTIAL)
            settings |= architecture.paper
        settings |= {"dataset": dataset or DATASETS[row.dataset][0]}
        if scale == "small":
            settings["dataset"] = architecture.small_dataset.format(dataset)
            if architecture.features is not None:
                classifier = _features_recipe(architecture, recipes, output_dir, dataset)
                settings["fid_features"] = str(Path(classifier.output_dir, FOLDERS["base"]))
        settings |= {**experiment.settings, **changes, **row.varies, "resume_from_checkpoint": "latest"}
        row_recipes = []
        for seed in seeds:
            recipe = Recipe(**settings | {"seed": seed})
            folder = Path(output_dir, "runs", run_name(recipe))
            row_recipes.append(dataclasses.replace(recipe, output_dir=str(folder)))
        plan.append((row, row_recipes))
    return plan


@lru_cache
def _read_recipe(path: Path) -> Mapping[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}


def _features_recipe(
    architecture: Architecture, recipes: str | os.PathLike, output_dir: str | os.PathLike, dataset: str
) -> Recipe:
    """Of the classifier: the same for all seeds, because FIDs on different features cannot be compared."""
    settings = _read_recipe(Path(recipes, f"{architecture.features}.yaml"))
    recipe = Recipe(**settings | {"dataset": dataset, "stages": ["base"], "resume_from_checkpoint": "latest"})
    return dataclasses.replace(recipe, output_dir=str(Path(output_dir, "runs", run_name(recipe))))


def run_name(recipe: Recipe) -> str:
    """Name of a run's folder: what it is about, and a digest of all settings that its outcome follows from."""
    digest = hashlib.blake2b(json.dumps(stage_settings(recipe, "evaluate")).encode(), digest_size=5).hexdigest()
    model, dataset = (Path(name).name.partition(":")[0] for name in (recipe.model, recipe.dataset))
    return f"{model}-{dataset}-seed{recipe.seed}-{digest}"


# -------------------------------------------------------------------------------------------------------- what it costs

OPERATIONS_PER_SECOND = 30e9  # of one slow core: 45 to 100 in training were measured, 25 in scoring many networks
GENERATOR_SECONDS = 60  # autoencoder and denoiser of the small scale, there


def cost(plan: Sequence[tuple[Row, Sequence[Recipe]]]) -> tuple[int, float]:
    """
    How many different runs a plan has, and about how many minutes those of the small scale take on one slow core.
    Stages that runs share are counted once.
    """
    done: dict[tuple[str, str], float] = {}
    for row, recipes in plan:
        minutes = ARCHITECTURES[row.architecture].minutes
        for recipe in recipes:
            seconds_of = _stage_seconds(recipe) if minutes is None else {"evaluate": 60 * minutes}
            for stage, seconds in seconds_of.items():
                done[stage, json.dumps(stage_settings(recipe, stage))] = seconds
    return sum(stage == "evaluate" for stage, _ in done), sum(done.values()) / 60


def _stage_seconds(r: Recipe) -> dict[str, float]:
    total, suffix = _operations(r.model, r.image_size, r.model_args, tuple(r.select), tuple(r.exclude))
    num_train = min(TRAIN_SIZES.get(r.dataset, 60_000), r.max_train_samples or math.inf)
    num_eval = r.max_eval_samples or 10_000
    num_scored = 2 * r.num_snapshots + 1 + r.num_models + (len(standard_baselines()) + 1) * r.baseline_models
    num_scored += 5 * r.num_models * r.hyper_representations  # candidates are scored on one of the two splits
    num_seen = r.num_snapshots * r.collect_every * r.collect_batch_size
    collected = min(num_seen, num_train) * (total - suffix) + num_seen * 3 * suffix
    operations = {
        "base": 3 * total * num_train * r.base_epochs,
        "collect": collected + num_eval * (total + r.num_snapshots * suffix),
        "evaluate": 2 * num_eval * (total + num_scored * suffix),
    }
    seconds = {stage: number / OPERATIONS_PER_SECOND for stage, number in operations.items()}
    return seconds | {"denoiser": GENERATOR_SECONDS}


@lru_cache
def _operations(model: str, image_size: int, model_args: str, select: tuple, exclude: tuple) -> tuple[int, int]:
    """Operations for one image, of the whole network and of what comes after the first selected tensor is used."""
    with torch.device("meta"):
        architecture = Path(model).name.partition(".")[0]
        network = timm.create_model(architecture, num_classes=10, **json.loads(model_args)).eval()
        channels, *size = network.pretrained_cfg["input_size"]
        channels = json.loads(model_args).get("in_chans", channels)
        images = torch.zeros(1, channels, *([image_size] * 2 if image_size else size))
    with FlopCounterMode(display=False) as counter:
        before = []

        def note(module, arguments):
            before.append(counter.get_total_flops())

        for name in select_parameters(network, list(select), list(exclude)):
            network.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(note)
        network(images)
    return counter.get_total_flops(), counter.get_total_flops() - min(before)


def list_runs(name: str, recipes: str | os.PathLike, **arguments) -> str:
    """The runs of an experiment by name, with what they vary and what each costs by itself."""
    rows = {}
    for row, row_recipes in expand(name, recipes, ".", **arguments):
        price = "–"
        if row_recipes and arguments.get("scale") != "paper":
            price = f"{cost([(row, row_recipes)])[1]:.0f} min"
        varies = ", ".join(f"{key}: {value}" for key, value in row.varies.items()) or "–"
        rows[row.run] = [row.run, price, varies]
    table = format_table(["run", "cost", "varies"], list(rows.values()))
    return "\n".join([f"{name}: {find_experiment(name).title}", "", *table])


def list_experiments(recipes: str | os.PathLike, **arguments) -> str:
    """Every table and figure, and what it costs; `arguments` are those of `expand`."""
    rows, at_paper = [], arguments.get("scale") == "paper"
    for name, experiment in EXPERIMENTS.items():
        num_runs, price = "–", "minutes"
        if not experiment.measures_memory:
            count, minutes = cost(expand(name, recipes, ".", **arguments))
            num_runs, price = str(count), "1 to 3 h each" if at_paper else f"{minutes:.0f} min"
        rows.append([name, num_runs, price, experiment.title])
    about = (
        "Costs are the paper's, on an A100."
        if at_paper
        else "Costs are estimates for one slow core, if nothing is finished yet."
    )
    about += " What several of them need is carried out once."
    return "\n".join([*format_table(["name", "runs", "cost", "title"], rows), "", about])


# -------------------------------------------------------------------------------------------------- carrying it all out


def reproduce(
    name: str,
    recipes: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    scale: str = "small",
    changes: Mapping[str, Any] | None = None,
    **arguments,
) -> Path:
    """
    Carries out an experiment, or what is left of it, and writes `table.md`, `table.csv` and the figure to
    `output_dir/name`, anew after every run. `recipes` and `arguments` are those of `expand`.

    Returns:
        `Path`: The folder of the table.

    Raises:
        ExperimentError: if it cannot be carried out as asked, or another process is at work in `output_dir`.
        ValueError: for everything in a recipe that can be seen to be wrong before any work is done.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ExperimentError("an experiment is carried out by one process; start it without a launcher")
    plan = expand(name, recipes, output_dir, scale=scale, changes=changes, **arguments)
    folder = Path(output_dir, name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(output_dir, ".lock"), timeout=0):
            if find_experiment(name).measures_memory:
                _measure_rows(name, [row for row, _ in plan], folder, scale, changes or {})
            else:
                if scale == "small":
                    for architecture in {row.architecture: ARCHITECTURES[row.architecture] for row, _ in plan}.values():
                        if architecture.features is not None:
                            dataset = arguments.get("dataset") or SMALL_DATASET
                            _train_features(_features_recipe(architecture, recipes, output_dir, dataset))
                _run_rows(name, plan, folder)
    except Timeout as error:
        raise ExperimentError(f"another experiment is at work in '{output_dir}'; wait, or choose another") from error
    return folder


def _train_features(recipe: Recipe) -> None:
    logger.info("features for FID: %s", Path(recipe.output_dir).name)
    run = Run(recipe)
    with run.lock():
        run.carry_out()


def _run_rows(name: str, plan: Sequence[tuple[Row, Sequence[Recipe]]], folder: Path) -> None:
    runs = {recipe.output_dir: recipe for _, recipes in plan for recipe in recipes}
    tasks: dict[str, Any] = {}
    for number, (run_folder, recipe) in enumerate(runs.items(), start=1):
        logger.info("%s: run %d of %d, %s", name, number, len(runs), Path(run_folder).name)
        if not _has_finished(Path(run_folder), "evaluate", stage_settings(recipe, "evaluate")):
            share_stages(recipe)
            key = json.dumps(recipe.section(TaskSection))
            if key not in tasks:
                tasks = {key: make_task(vars(recipe))}  # the latest alone: it holds the data
            run = Run(recipe, task=tasks[key])
            with run.lock():
                run.carry_out()
        write_tables(name, plan, folder)


def share_stages(recipe: Recipe) -> None:
    """
    Gives the run of a recipe every stage that a run beside it has finished with the same settings, as a link, and the
    scores of all runs beside it.
    """
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    scores = folder.parent.parent / "scores"
    scores.mkdir(exist_ok=True)
    _link(folder / "scores", scores)
    for stage, stage_folder in FOLDERS.items():
        settings, own = stage_settings(recipe, stage), folder / stage_folder
        if _has_finished(folder, stage, settings):
            continue
        if own.is_symlink():
            own.unlink()  # a link to what is gone, or one whose record was not written yet
        for other in sorted(folder.parent.iterdir()):
            if other != folder and _has_finished(other, stage, settings):
                shutil.rmtree(own, ignore_errors=True)  # the rest of a stage that was killed
                _link(own, (other / stage_folder).resolve())
                write_json(folder / "stages" / f"{stage}.json", _record(other, stage))
                logger.info("%s: taken over from %s", stage, other.name)
                break


def _record(folder: Path, stage: str) -> dict | None:
    path = folder / "stages" / f"{stage}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _has_finished(folder: Path, stage: str, settings: dict) -> bool:
    record = _record(folder, stage)
    return record is not None and record["settings"] == settings and (folder / FOLDERS[stage]).is_dir()


def _link(path: Path, target: Path) -> None:
    """A relative link, so that the whole can be moved."""
    if not path.is_symlink():
        path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()), target_is_directory=True)


# --------------------------------------------------------------------------------------------------------------- tables


def _best(report: dict, group: str) -> dict[str, float]:
    row, score = _group(report, group)
    return {"": row[f"{score}_best"], "selected on test": row[f"{score}_best_on_test"]}


def _average(report: dict, group: str) -> dict[str, float]:
    row, score = _group(report, group)
    return {"": row[f"{score}_mean"], "std over networks": row[f"{score}_std"], "networks": row["n"]}


def _group(report: dict, name: str) -> tuple[dict, str]:
    """A group of a report, and what its numbers are called: tasks other than classification have another metric."""
    return next(row for row in report["groups"] if row["name"] == name), "score" if "metric" in report else "accuracy"


def _similarity(report: dict, group: str) -> dict[str, float]:
    values = _max_iou(report, group)
    values = values[~values.isnan()].tolist()
    if not values:
        return {"": math.nan, "std over networks": math.nan, "networks": 0}
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"": statistics.mean(values), "std over networks": std, "networks": len(values)}


def _range(report: dict, group: str) -> dict[str, float]:
    values = _max_iou(report, group)
    values = values[~values.isnan()].tolist() or [math.nan]
    return {"": min(values), "highest": max(values)}


# From a report and a group to numbers, of which the first is the one that the paper prints.
STATISTICS = {"best": _best, "average": _average, "similarity": _similarity, "range": _range}
DIGITS = {"best": 2, "average": 2, "similarity": 3, "range": 2}


def summarise(statistic: str, reports: Sequence[dict], group: str) -> tuple[str, dict[str, float]]:
    """
    One cell, over the reports of several seeds.

    Returns:
        `tuple`: What stands in the table, and the numbers behind it by name; the first has the name `""`.
    """
    digits = DIGITS[statistic]
    values = [STATISTICS[statistic](report, group) for report in reports]
    numbers = {key: statistics.mean(value[key] for value in values) for key in values[0]}
    text = f"{numbers['']:.{digits}f}"
    if statistic == "range":
        numbers = {"": min(v[""] for v in values), "highest": max(v["highest"] for v in values)}
        text = f"{numbers['']:.{digits}f}~{numbers['highest']:.{digits}f}"
    if "networks" in numbers:
        numbers["networks"] = int(numbers["networks"])
        text += f" ± {numbers['std over networks']:.{digits}f} (n={numbers['networks']})"
    if len(values) > 1 and statistic != "range":
        numbers["std over seeds"] = statistics.stdev(value[""] for value in values)
        text += f"; ± {numbers['std over seeds']:.{digits}f} over {len(values)} seeds"
    return text, numbers


def read_reports(recipes: Sequence[Recipe]) -> list[dict]:
    """The reports of the runs that are finished."""
    paths = [Path(recipe.output_dir, FOLDERS["evaluate"], "report.json") for recipe in recipes]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def write_tables(name: str, plan: Sequence[tuple[Row, Sequence[Recipe]]], folder: Path) -> None:
    """Writes the table of an experiment, with what is finished, and its figure when all is."""
    experiment = find_experiment(name)
    reports_of = [read_reports(recipes) for _, recipes in plan]
    cells = []
    for (row, _), reports in zip(plan, reports_of, strict=True):
        measured = [
            summarise(column.statistic, reports, column.group or row.group) if column.statistic and reports else None
            for column in experiment.columns
        ]
        cells.append((row, measured, {"seeds": len(reports)}))

    sources = {f"{ARCHITECTURES[row.architecture].label} on {DATASETS[row.dataset][1]}": None for row, _ in plan}
    settings = {f"{recipe.model} on {_public(recipe.dataset)}": None for _, recipes in plan for recipe in recipes}
    splits = {(r["splits"]["validation"], r["splits"]["test"]): None for reports in reports_of for r in reports}
    runs = {Path(recipe.output_dir).name: row.run for row, recipes in plan for recipe in recipes}
    images = " or ".join(f"{test:,} test images (validation: {validation:,})" for validation, test in splits)
    metrics = {r["metric"]["name"] if "metric" in r else "Accuracies in percent": None for rs in reports_of for r in rs}
    about = [
        f"Paper: {', '.join(sources)}. Here: {', '.join(settings)}.",
        f"{' and '.join(metrics)} on {images}; ± is the standard deviation over n networks, or over seeds of all "
        "stages.",
    ]
    used = {column.statistic for column in experiment.columns}
    if "best" in used:
        about.append(
            "The best network is selected on validation and reported on test. The paper selects on the images that it "
            "reports; that figure is in table.csv as well."
        )
    if used & {"similarity", "range"}:
        about.append("Similarity is the maximum IoU of wrong predictions to the originals, other than itself.")
    about.append("Runs, in `../runs`: " + "; ".join(f"{run}: `{path}`" for path, run in runs.items()) + ".")
    if experiment.draw is not None and all(reports_of):
        experiment.draw(folder / f"{name}.png", [row for row, _ in plan], [reports[0] for reports in reports_of])
        about.insert(0, f"![{experiment.title}]({name}.png)")
    _write(experiment, name, cells, folder, about)


def _public(dataset: str) -> str:
    """A local folder by its name only: where it lies is nobody's business in a table."""
    return Path(dataset).name if os.path.exists(dataset.rpartition(":")[2]) else dataset


def _write(
    experiment: Experiment, name: str, cells: Sequence[tuple[Row, Sequence, Mapping]], folder: Path, about: list[str]
) -> None:
    """
    Writes `table.md` and `table.csv`.

    Args:
        cells (`Sequence[tuple]`): A row, for each of its columns text and numbers, or None where there are none, and
            more numbers.
        about (`list[str]`): Paragraphs below the table.
    """
    header, lines = [experiment.varied], [[row.label] for row, _, _ in cells]
    records = [{"run": row.run, experiment.varied: row.label, "group": row.group} for row, _, _ in cells]
    for i, column in enumerate(experiment.columns):
        printed = [row.paper[i] if len(row.paper) > i else "" for row, _, _ in cells]
        if any(printed):  # the paper has no numbers of some figures
            header.append(f"{column.title}, paper")
            for line, record, number in zip(lines, records, printed, strict=True):
                line.append(number or "–")
                record[f"{column.title} (paper)"] = number
        if column.statistic is not None:
            header.append(f"{column.title}, here")
            for line, record, (_, measured, _) in zip(lines, records, cells, strict=True):
                text, numbers = measured[i] or ("–", {})
                line.append(text)
                record |= {f"{column.title} {key}".strip(): number for key, number in numbers.items()}
    for record, (_, _, more) in zip(records, cells, strict=True):
        record |= more
    paragraphs = [f"## {name}: {experiment.title}", "\n".join(format_table(header, lines)), *about]
    if experiment.note:
        paragraphs.append(experiment.note)
    (folder / "table.md").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
        writer.writeheader()
        writer.writerows(records)


# --------------------------------------------------------------------------------------------------- memory of training


def _measure_rows(name: str, rows: Sequence[Row], folder: Path, scale: str, changes: Mapping[str, Any]) -> None:
    autoencoder_preset, denoiser_preset = ("paper", "paper") if scale == "paper" else ("tokens", "small")
    autoencoder_preset = changes.get("autoencoder_preset", autoencoder_preset)
    denoiser_preset = changes.get("denoiser_preset", denoiser_preset)
    unknown = sorted(set(changes) - {"autoencoder_preset", "denoiser_preset"})
    if unknown:
        raise ExperimentError(f"{name} takes autoencoder_preset and denoiser_preset, not {', '.join(unknown)}")
    presets = {"autoencoder_preset": autoencoder_preset, "denoiser_preset": denoiser_preset}
    Recipe(**presets)  # refuses unknown ones
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = [
        f"Presets {autoencoder_preset} (autoencoder) and {denoiser_preset} (denoiser), on {where}. Paper: an A100."
    ]
    experiment, cells, measured = find_experiment(name), [(row, [None] * 3, presets) for row in rows], []
    for i, row in enumerate(rows):
        size, latent_dim = row.varies["num_parameters"], row.varies["latent_dim"]
        logger.info("%s: %s parameters", name, row.label)
        autoencoder = measure_training("autoencoder", size, latent_dim, autoencoder_preset)
        denoiser = measure_training("denoiser", size, latent_dim, denoiser_preset)
        cells[i] = (row, [_megabytes(autoencoder), None, _megabytes(denoiser)], presets)
        measured.append({"autoencoder": autoencoder, "denoiser": denoiser})
        _write(experiment, name, cells, folder, about)
    experiment.draw(folder / f"{name}.png", rows, measured)
    _write(experiment, name, cells, folder, [f"![{experiment.title}]({name}.png)", *about])


@dataclass(frozen=True)
class TrainingMeasurement:
    """
    Args:
        memory (`int`): Peak in bytes, above that of the imports; the memory that there was, if that was not enough.
        seconds (`float`, *optional*): CPU time of it all; None if memory was not enough.
    """

    memory: int
    seconds: float | None

    @property
    def fits(self) -> bool:
        return self.seconds is not None


def _megabytes(measured: TrainingMeasurement) -> tuple[str, dict[str, Any]]:
    number = round(measured.memory / 1e6)
    return (f"{number}", {"": number}) if measured.fits else (f"more than {number}", {"does not fit into": number})


def measure_training(
    network: str, num_parameters: int, latent_dim: int, preset: str, num_steps: int = 2, num_snapshots: int = 100
) -> TrainingMeasurement:
    """
    Memory and time of training with a batch of 50, measured in a fresh process. Snapshots are mapped from a file, as
    those of a run are, and are part of the memory as far as they are read.

    Args:
        network (`str`): `autoencoder` or `denoiser`.
        num_parameters (`int`): D.
        latent_dim (`int`): L.
        preset (`str`): One of `AUTOENCODER_PRESETS` or `DENOISER_PRESETS`.
        num_steps (`int`, *optional*, defaults to 2): Steps of training.
        num_snapshots (`int`, *optional*, defaults to 100): K.
    """
    cuda = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    arguments = (network, num_parameters, latent_dim, preset, num_steps, num_snapshots, free)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return TrainingMeasurement(*pool.submit(_measure, *arguments).result())
        except (MemoryError, torch.OutOfMemoryError, BrokenProcessPool):
            return TrainingMeasurement(free, None)


def _measure(
    network: str, num_parameters: int, latent_dim: int, preset: str, num_steps: int, num_snapshots: int, free: int
) -> tuple[int, float]:
    """In the fresh process: peak memory above that of the imports, and CPU seconds."""
    accelerator = Accelerator()
    on_cpu = accelerator.device.type == "cpu"
    length = num_parameters if network == "autoencoder" else latent_dim
    with tempfile.TemporaryDirectory() as folder:
        snapshots = _random_snapshots(Path(folder, "snapshots"), num_snapshots, length)
        if on_cpu:
            # The whole machine must not suffer from what does not fit.
            limit = psutil.Process().memory_info().vms + free
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        loop = {
            "args": LoopArguments(num_steps=num_steps, batch_size=50, learning_rate=1e-5),
            "seed": 0,
            "checkpoint_dir": folder,
        }
        before, start = resident_memory("VmRSS"), time.process_time()
        try:
            if network == "autoencoder":
                train_autoencoder(
                    accelerator,
                    snapshots,
                    ParameterLayout(("parameters",), ((length,),), ("float32",)),
                    noise=NoiseArguments(),
                    latent_dim=latent_dim,
                    architecture=autoencoder_architecture(preset, length),
                    **loop,
                )
            else:
                scheduler = make_training_scheduler()
                train_denoiser(accelerator, snapshots, scheduler=scheduler, **DENOISER_PRESETS[preset], **loop)
        except RuntimeError as error:
            if on_cpu and "can't allocate memory" in str(error):
                raise MemoryError(str(error)) from error
            raise
        seconds = time.process_time() - start
    return resident_memory("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated(), seconds


def _random_snapshots(path: Path, num_snapshots: int, length: int) -> torch.Tensor:
    """Shape `(K, length)`, in a file that is mapped into memory and was not read yet."""
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        for _ in range(num_snapshots):
            file.write(torch.randn(length, generator=generator).numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=num_snapshots * length)
    return mapped.view(num_snapshots, length)


def resident_memory(name: str) -> int:
    """Bytes of this process in memory, now (`VmRSS`) or at most so far (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
