"""Recipes: what a run is made of, from a YAML file and flags."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import yaml
from transformers import HfArgumentParser

from ..models import AUTOENCODER_PRESETS, DENOISER_PRESETS
from ..models.autoencoder import NORMALIZATIONS
from ..training.loop import OPTIMIZERS

SECRETS = ("hub_token",)
TASKS = (
    "image_classification",
    "text_classification",
    "object_detection",
    "semantic_segmentation",
    "image_generation",
)
BATCH_NORM_STATISTICS = ("base", "generated")
STAGES = ("base", "collect", "autoencoder", "denoiser", "evaluate")


def _option(default, help: str):
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _require(name: str, value, condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {what}, got {value!r}")


class _RecipeLoader(yaml.SafeLoader):
    """YAML without references: a few lines of them can stand for more text than any memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"references such as *{self.peek_event().anchor} cannot be used")
        return super().compose_node(parent, index)


@dataclass
class RunSection:
    """Where the run lives, and how it is carried out."""

    output_dir: str = _option("outputs/digits", "Folder that receives everything.")
    stages: list[str] = _option(list(STAGES), f"Which stages to carry out, of {', '.join(STAGES)}.")
    seed: int = _option(0, "Seed of the whole run.")
    resume_from_checkpoint: str | None = _option(None, "`latest`: an unfinished stage goes on where it was.")
    overwrite_output_dir: bool = _option(False, "Carry out stages again whose settings have changed.")
    require_same_frozen: bool = _option(
        False, "Refuse to import networks that differ from the base model in tensors that are not selected."
    )
    checkpointing_steps: int = _option(500, "Training stages save a checkpoint every so many steps.")
    checkpoints_total_limit: int = _option(2, "Keep no more than this many checkpoints of a stage.")
    mixed_precision: str = _option("no", "`no`, `fp16` or `bf16`.")
    gradient_accumulation_steps: int = _option(1, "A training batch is computed in so many parts.")
    report_to: str | None = _option(None, "Tracker of Accelerate: tensorboard, wandb, trackio, ...")
    push_to_hub: bool = _option(False, "Push the finished generator to the Hub, with its report as the model card.")
    hub_model_id: str | None = _option(None, "Repository, `user/name` or `organization/name`; else output_dir's name.")
    hub_private_repo: bool = _option(False, "Create the repository as a private one.")
    hub_token: str | None = _option(None, "Token that can write; by default that of `hf auth login`. It is not stored.")
    hub_license: str = _option("apache-2.0", "Licence for the model card; mind those of the base model and the data.")

    def __post_init__(self):
        unknown = [stage for stage in self.stages if stage not in STAGES]
        _require("stages", unknown, not unknown, f"of {', '.join(STAGES)}")
        _require(
            "resume_from_checkpoint",
            self.resume_from_checkpoint,
            self.resume_from_checkpoint in (None, "latest"),
            "'latest'",
        )
        _require(
            "mixed_precision", self.mixed_precision, self.mixed_precision in ("no", "fp16", "bf16"), "no, fp16 or bf16"
        )
        for name in ("checkpointing_steps", "checkpoints_total_limit", "gradient_accumulation_steps"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("seed", self.seed, self.seed >= 0, "at least 0")


@dataclass
class TaskSection:
    """The base model and its data: see the classes of `pdiff_hf.tasks`, `ImageClassificationTask` and its like."""

    task: str = _option(TASKS[0], f"One of {', '.join(TASKS)}.")
    model: str = _option(
        "resnet18",
        "timm architecture, or local folder or Hub id of a timm or transformers model; for detection and segmentation, "
        "torchvision's builder or builder:WEIGHTS; `unet2d` for a fresh UNet2DModel that generates images.",
    )
    dataset: str = _option(
        "digits",
        "`digits`, or local folder, file or Hub id of a data set; for detection and segmentation also canvas:ID.",
    )
    image_size: int = _option(8, "Side of the square that images are scaled to; 0 for the model's own.")
    model_args: str = _option(
        "{}", "More arguments of a timm architecture or torchvision builder, or the config of a UNet2DModel, as JSON."
    )
    max_length: int = _option(128, "Texts are cut to so many tokens.")
    holdout_fraction: float = _option(0.2, "Share of the training data for a validation (and test) split it lacks.")
    max_train_samples: int | None = _option(None, "Use no more training examples than this.")
    max_eval_samples: int | None = _option(None, "Use no more validation and test examples than this.")

    def __post_init__(self):
        try:
            parsed = json.loads(self.model_args)
        except ValueError as error:
            raise ValueError(f"model_args must be JSON, got {self.model_args!r}: {error}") from error
        _require("model_args", self.model_args, isinstance(parsed, dict), "a mapping")
        _require("task", self.task, self.task in TASKS, f"of {', '.join(TASKS)}")


@dataclass
class BaseSection:
    """Training of the base model (paper, Table 5a)."""

    base_epochs: int = _option(20, "Epochs; 0 takes the model as it is.")
    base_batch_size: int = _option(64, "Images in a step.")
    base_learning_rate: float = _option(1e-3, "Peak learning rate, with cosine decay.")
    base_weight_decay: float = _option(5e-4, "Weight decay.")

    def __post_init__(self):
        _require("base_epochs", self.base_epochs, self.base_epochs >= 0, "at least 0")
        _require("base_batch_size", self.base_batch_size, self.base_batch_size >= 2, "at least 2")
        _require("base_learning_rate", self.base_learning_rate, self.base_learning_rate > 0, "above 0")


@dataclass
class CollectSection:
    """Snapshots: an existing data set of them, or fine-tuning (paper, Table 5b)."""

    snapshots: str | None = _option(
        None, "Folder or Hub id of a parameter data set to use as it is; all below is moot."
    )
    select: list[str] = _option(["norm[-2:]"], "Tensors to generate: kinds, globs, or `re:` expressions.")
    exclude: list[str] = _option([], "Tensors to leave out of those.")
    batch_norm_statistics: str = _option(
        "base", "Running statistics of batch norm: those of the `base` model, or `generated` with their layers."
    )
    num_snapshots: int = _option(300, "K, over all runs together.")
    num_runs: int = _option(1, "Fine-tune so many times from the base model, each in another order of the data.")
    collect_every: int = _option(1, "Take a snapshot every so many steps.")
    collect_optimizer: str = _option("adamw", f"One of {', '.join(OPTIMIZERS)}.")
    collect_learning_rate: float = _option(0.03, "Constant learning rate.")
    collect_weight_decay: float = _option(5e-4, "Weight decay.")
    collect_batch_size: int = _option(128, "Images in a step.")

    def __post_init__(self):
        known = self.batch_norm_statistics in BATCH_NORM_STATISTICS
        _require("batch_norm_statistics", self.batch_norm_statistics, known, f"of {', '.join(BATCH_NORM_STATISTICS)}")
        _require("num_snapshots", self.num_snapshots, self.num_snapshots >= 2, "at least 2")
        _require("collect_every", self.collect_every, self.collect_every >= 1, "at least 1")
        divides = self.num_runs >= 1 and self.num_snapshots % self.num_runs == 0
        _require("num_runs", self.num_runs, divides, f"a divisor of num_snapshots={self.num_snapshots}")
        _require(
            "collect_optimizer", self.collect_optimizer, self.collect_optimizer in OPTIMIZERS, f"of {list(OPTIMIZERS)}"
        )
        _require("collect_learning_rate", self.collect_learning_rate, self.collect_learning_rate > 0, "above 0")
        _require("collect_batch_size", self.collect_batch_size, self.collect_batch_size >= 1, "at least 1")


@dataclass
class AutoencoderSection:
    """Training of the autoencoder (paper, Table 5c)."""

    autoencoder_preset: str = _option("tokens", f"One of {', '.join(AUTOENCODER_PRESETS)}; see ParameterAutoencoder.")
    token_size: int | None = _option(
        None, "Numbers in a token, for the preset `tokens`; by default the next power of two from 2 √D."
    )
    normalization: str = _option(
        "coordinate", "Mean of every parameter (`coordinate`), or of every `tensor` as the paper has it."
    )
    latent_dim: int = _option(128, "L, the length of a latent.")
    heldout_fraction: float = _option(0.1, "Share of the snapshots that generators never see, to measure R² on.")
    autoencoder_steps: int = _option(300, "Optimizer steps.")
    autoencoder_batch_size: int = _option(50, "Snapshots in a step.")
    autoencoder_learning_rate: float = _option(
        4e-3, "Peak learning rate, with cosine decay (the paper's widths: 2e-5)."
    )
    autoencoder_warmup_steps: int = _option(30, "Steps over which the learning rate rises to its peak.")
    max_grad_norm: float = _option(1.0, "Gradients, the denoiser's too, are clipped to this norm.")
    parameter_noise: float = _option(1e-3, "σ_v, noise on the normalised parameters.")
    latent_noise: float = _option(0.1, "σ_z, noise on the latent.")

    def __post_init__(self):
        presets = list(AUTOENCODER_PRESETS)
        _require("normalization", self.normalization, self.normalization in NORMALIZATIONS, f"of {NORMALIZATIONS}")
        if self.token_size is not None:
            _require("token_size", self.token_size, self.token_size >= 1, "at least 1")
            preset = self.autoencoder_preset
            _require("token_size", self.token_size, preset == "tokens", f"left out with autoencoder_preset={preset}")
        _require("autoencoder_preset", self.autoencoder_preset, self.autoencoder_preset in presets, f"of {presets}")
        _require("latent_dim", self.latent_dim, self.latent_dim >= 1, "at least 1")
        _require("heldout_fraction", self.heldout_fraction, 0 <= self.heldout_fraction < 0.5, "between 0 and 0.5")
        _require("autoencoder_steps", self.autoencoder_steps, self.autoencoder_steps >= 1, "at least 1")
        _require("autoencoder_batch_size", self.autoencoder_batch_size, self.autoencoder_batch_size >= 1, "at least 1")
        _require(
            "autoencoder_learning_rate", self.autoencoder_learning_rate, self.autoencoder_learning_rate > 0, "above 0"
        )
        for name in ("parameter_noise", "latent_noise", "autoencoder_warmup_steps"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")


@dataclass
class DenoiserSection:
    """Training of the denoiser (paper, Table 5d)."""

    denoiser_preset: str = _option("small", f"Widths: {', '.join(DENOISER_PRESETS)}.")
    denoiser_steps: int = _option(1000, "Optimizer steps.")
    denoiser_batch_size: int = _option(50, "Latents in a step.")
    denoiser_learning_rate: float = _option(1e-3, "Peak learning rate, with cosine decay (the paper's widths: 1e-4).")
    denoiser_warmup_steps: int = _option(0, "Steps over which the learning rate rises to its peak.")
    ema_decay: float = _option(0.999, "Decay of the moving average of the denoiser's weights, which is what is kept.")
    num_train_timesteps: int = _option(1000, "T, the length of the diffusion.")

    def __post_init__(self):
        presets = list(DENOISER_PRESETS)
        _require("denoiser_preset", self.denoiser_preset, self.denoiser_preset in presets, f"of {presets}")
        for name in ("denoiser_steps", "denoiser_batch_size", "num_train_timesteps"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        # A pipeline with a longer schedule is not loaded.
        _require("num_train_timesteps", self.num_train_timesteps, self.num_train_timesteps <= 10**6, "at most 10**6")
        for name in ("denoiser_learning_rate", "max_grad_norm"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        _require("denoiser_warmup_steps", self.denoiser_warmup_steps, self.denoiser_warmup_steps >= 0, "at least 0")
        _require("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "between 0 and 1")


@dataclass
class EvaluateSection:
    """Generation and scoring."""

    num_models: int = _option(200, "How many networks to generate and score.")
    num_inference_steps: int = _option(20, "Denoising steps.")
    fid_features: str = _option(
        "inception", "FID is measured on these features: `inception`, or folder or Hub id of an image classifier."
    )
    baseline_models: int = _option(20, "Networks of each setting of the baselines, and of the VAE; 0 for none.")
    hyper_representations: bool = _option(
        False, "Also compare with S_KDE30, SANE_SUB and SANE_KDE30 (paper, Table 7), with num_models networks each."
    )

    def __post_init__(self):
        _require("baseline_models", self.baseline_models, self.baseline_models >= 0, "at least 0")
        _require("num_models", self.num_models, self.num_models >= 1, "at least 1")
        _require("num_inference_steps", self.num_inference_steps, self.num_inference_steps >= 1, "at least 1")


@dataclass
class Recipe(
    RunSection, TaskSection, BaseSection, CollectSection, AutoencoderSection, DenoiserSection, EvaluateSection
):
    """Everything that a run is made of; flags of `scripts/train.py` and keys of a recipe file have these names."""

    def __post_init__(self):
        for key, value in vars(self).items():
            if isinstance(value, float):
                _require(key, value, math.isfinite(value), "finite")
        for section in SECTIONS:
            section.__post_init__(self)

    def section(self, *sections: type) -> dict:
        """The settings of some sections, by name."""
        return {f.name: getattr(self, f.name) for section in sections for f in dataclasses.fields(section)}

    def without_secrets(self, *sections: type) -> dict:
        """What may be written to files and sent to trackers."""
        return {key: value for key, value in self.section(*sections).items() if key not in SECRETS}

    def save(self, path: str | os.PathLike) -> None:
        """Writes a recipe file that gives this recipe again."""
        lines = []
        for section in SECTIONS:
            lines.append(f"# {section.__doc__}")
            lines.append(yaml.safe_dump(self.without_secrets(section), sort_keys=False, allow_unicode=True))
        Path(path).write_text("\n".join(lines))


SECTIONS = (RunSection, TaskSection, BaseSection, CollectSection, AutoencoderSection, DenoiserSection, EvaluateSection)
for _section, _title in zip(
    SECTIONS, ("run", "task", "base model", "snapshots", "autoencoder", "denoiser", "evaluation"), strict=True
):
    _section._argument_group_name = _title


_FIELDS = [f for section in SECTIONS for f in dataclasses.fields(section)]
NULLABLE = {f.name for f in _FIELDS if f.default is None}
LISTS = {f.name for f in _FIELDS if f.type == list[str]}


class RecipeParser(HfArgumentParser):
    """Flags for every key of some sections, after an optional recipe file. Errors are one line that names the key."""

    def __init__(self, sections: tuple[type, ...] = SECTIONS, **kwargs):
        super().__init__(sections, allow_abbrev=False, **kwargs)
        self.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="A recipe file; flags take precedence.")
        self.keys = {f.name for section in sections for f in dataclasses.fields(section)}

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists every key)\n")

    def parse_recipe(self, argv: list[str] | None = None) -> Recipe:
        """The recipe that the file and the flags give; ends the program with one line for a wrong one."""
        argv = sys.argv[1:] if argv is None else argv
        namespace, unknown = super().parse_known_args(argv)
        if unknown:  # before the value that follows an unknown flag is taken for the recipe file
            self.error(f"unknown argument '{unknown[0]}'{self._suggest(unknown[0].lstrip('-').partition('=')[0])}")
        if namespace.recipe is not None:
            namespace = super().parse_known_args(self._read(namespace.recipe) + argv)[0]
        values = {key: value for key, value in vars(namespace).items() if key in self.keys}
        try:
            return Recipe(**values)
        except ValueError as error:
            self.error(str(error))

    def parse_changes(self, argv: list[str]) -> dict:
        """The values of the keys that `argv` has flags for, and of no others; ends the program for a wrong flag."""
        unset = object()
        namespace, unknown = super().parse_known_args(argv, argparse.Namespace(**dict.fromkeys(self.keys, unset)))
        if unknown or namespace.recipe is not None:
            wrong = unknown[0] if unknown else namespace.recipe
            self.error(f"unknown argument '{wrong}'{self._suggest(wrong.lstrip('-').partition('=')[0])}")
        return {key: value for key, value in vars(namespace).items() if key in self.keys and value is not unset}

    def _read(self, path: str) -> list[str]:
        """The flags that say the same as the file."""
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), _RecipeLoader)
        except (OSError, UnicodeDecodeError) as error:
            self.error(f"recipe '{path}' cannot be read: {error}")
        except Exception as error:  # what values that are none make the parts of yaml raise has no common type
            self.error(f"recipe '{path}' is not YAML: {error}")
        values = {} if values is None else values
        if not isinstance(values, dict):
            self.error(f"recipe '{path}' must be a mapping of keys to values, got a {type(values).__name__}")
        argv: list[str] = []
        for key, value in values.items():
            if key not in self.keys:
                self.error(f"recipe '{path}' has the unknown key '{key}'{self._suggest(str(key))}")
            if (value is None and key in NULLABLE) or (value == [] and key in LISTS):
                self.set_defaults(**{key: value})
            elif value is None or value == []:
                self.error(f"recipe '{path}' has no value for the key '{key}'")
            elif isinstance(value, list):
                wrong = [item for item in map(str, value) if item.startswith("-")]
                if wrong:  # it would be taken for a flag
                    self.error(f"recipe '{path}' has '{wrong[0]}' in the list '{key}', which cannot begin with '-'")
                argv += [f"--{key}", *map(str, value)]
            else:
                argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
        return argv

    def _suggest(self, key: str) -> str:
        close = difflib.get_close_matches(key, self.keys, n=3)
        return f"; did you mean {' or '.join(close)}?" if close else ""
