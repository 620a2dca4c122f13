"""
Recipes: what a run is made of, from a YAML file and flags.

This module imports neither torch nor what needs it, so that `--help` and errors in flags come at once. Choices that
other modules define are therefore repeated here; a test compares them.
"""

import argparse
import copy
import dataclasses
import difflib
import importlib.util
import json
import os
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..utils.paths import expand_path
from ..utils.terminal import shorten
from .options import RecipeLoader, check_value, is_list, is_nullable, option

SECRETS = ("hub_token",)
STAGES = ("base", "collect", "autoencoder", "denoiser", "tune", "evaluate")
DEFAULT_DATASET = "digits"
# Those of `scripts/recipes`, in a clone or an installed package; a name alone is enough for them.
_SCRIPTS = importlib.util.find_spec("pdiff_hf.scripts")
PACKAGED = Path(*(_SCRIPTS.submodule_search_locations or ())[:1] if _SCRIPTS else "") / "recipes"
RENAMED = {"holdout_fraction": "validation_fraction", "heldout_fraction": "heldout_snapshots"}


@dataclass
class RunSection:
    """Where the run lives, and how it is executed."""

    output_dir: str = option("outputs/digits", "Folder that receives everything.", path=True)
    stages: list[str] = option(list(STAGES), "Which stages to execute.", choices=STAGES)
    seed: int = option(0, "Seed of the whole run.", min=0)
    resume_from_checkpoint: str | None = option(None, "An unfinished stage goes on where it was.", choices=("latest",))
    overwrite_output_dir: bool = option(False, "Execute stages again whose settings have changed.")
    require_same_frozen: bool = option(
        False, "Refuse to import networks that differ from the base model in tensors that are not selected."
    )
    checkpointing_steps: int = option(500, "Training stages save a checkpoint every so many steps.", min=1)
    checkpoints_total_limit: int = option(2, "Keep no more than this many checkpoints of a stage.", min=1)
    mixed_precision: str | None = option(
        None, "By default what the launcher is set to.", choices=("no", "fp16", "bf16")
    )
    gradient_accumulation_steps: int = option(1, "A training batch is computed in so many parts.", min=1)
    report_to: str | None = option(None, "Tracker of Accelerate: tensorboard, wandb, trackio, ...")
    push_to_hub: bool = option(False, "Push the finished generator to the Hub, with its report as the model card.")
    hub_model_id: str | None = option(None, "Repository, `user/name` or `organization/name`; else output_dir's name.")
    hub_private_repo: bool = option(False, "Create the repository as a private one.")
    hub_token: str | None = option(None, "Token that can write; by default that of `hf auth login`. It is not stored.")
    hub_license: str = option("apache-2.0", "Licence for the model card; mind those of the base model and the data.")


@dataclass
class TaskSection:
    """The base model and its data: see the classes of `pdiff_hf.tasks`, `ImageClassificationTask` and its like."""

    task: str = option(
        "image_classification",
        "A task of this package (its modules in pdiff_hf/tasks have these names), or a class of your own, module:Class "
        "or path/to/file.py:Class. Of the other keys your class gets those that you set and that it has arguments for.",
        path=True,
    )
    task_args: str = option("{}", "More arguments of the task's class, as JSON.", json=True)
    model: str | None = option(
        "resnet18",
        "timm architecture, or local folder or Hub id of a timm or transformers model; for detection and segmentation, "
        "torchvision's builder or builder:WEIGHTS; `unet2d` for a fresh UNet2DModel that generates images.",
        path=True,
    )
    dataset: str | None = option(
        None,
        f"`digits`, `moving_digits`, or local folder, file or Hub id of a data set. `{DEFAULT_DATASET}` by "
        "default, but for a model of your own there is no default.",
        path=True,
    )
    image_size: int | None = option(
        None,
        "Side of the square that images are scaled to; 0 for the model's own. By default also its own if it has "
        "weights, and else that of the images, if the model takes it.",
        min=0,
    )
    model_args: str = option(
        "{}",
        "More arguments of a timm architecture or torchvision builder, or the config of a UNet2DModel, as JSON.",
        json=True,
    )
    max_length: int = option(128, "Texts are cut to so many tokens.", min=1)
    validation_fraction: float = option(
        0.2, "Share of the training data for a validation (and test) split it lacks.", above=0, below=0.5
    )
    max_train_samples: int | None = option(None, "Use no more training examples than this.", min=1)
    max_eval_samples: int | None = option(None, "Use no more validation and test examples than this.", min=1)
    label_column: str | None = option(None, "Column of the classes; else `label`, `labels` or the only ClassLabel.")
    image_column: str | None = option(None, "Column of the images; else `image` or the only one.")
    text_column: str | None = option(None, "Column of the texts; else `text`.")
    skip_bad_examples: bool = option(False, "Leave out examples that are empty or cannot be read, and count them.")
    augmentation: str = option(
        "none", "Of images in training, at every step by chance.", choices=("none", "flip", "crop_flip")
    )


@dataclass
class FamilySection:
    """A family of tasks, for a generator that answers to conditions: see `pdiff_hf.tasks.family`."""

    family: str | None = option(
        None,
        "`transformed` or `grouped`, over the images of the task; or a class of your own, module:Class or "
        "path/to/file.py:Class. Without one, there is one task.",
        path=True,
    )
    family_args: str = option("{}", "Arguments of the family's class, as JSON, such as ranges of fields.", json=True)
    num_tasks: int = option(192, "Seen tasks, which snapshots are collected for.", min=2)
    num_validation_tasks: int = option(32, "Tasks that settings are chosen on.", min=1)
    num_test_tasks: int = option(48, "Unseen tasks of the report, in each of its sets.", min=2)


@dataclass
class BaseSection:
    """Training of the base model (paper, Table 5a); of a family, on all seen tasks together."""

    base_epochs: int = option(20, "Epochs; 0 takes the model as it is.", min=0)
    base_batch_size: int = option(64, "Images in a step.", min=2)
    base_learning_rate: float = option(1e-3, "Peak learning rate, with cosine decay.", above=0)
    base_warmup_steps: int = option(0, "Steps over which the learning rate rises to its peak.", min=0)
    base_weight_decay: float = option(5e-4, "Weight decay.", min=0)


@dataclass
class CollectSection:
    """Snapshots: an existing data set of them, or fine-tuning (paper, Table 5b)."""

    snapshots: str | None = option(
        None, "Folder or Hub id of a parameter data set to use as it is; all below is moot.", path=True
    )
    select: list[str] = option(["norm[-2:]"], "Tensors to generate: kinds, globs, or `re:` expressions.")
    exclude: list[str] = option([], "Tensors to leave out of those.")
    batch_norm_statistics: str = option(
        "base",
        "Running statistics of batch norm: those of the `base` model, `generated` with their layers, or `recomputed` "
        "for each network from training data.",
        choices=("base", "generated", "recomputed"),
    )
    num_snapshots: int = option(300, "K, over all runs or seen tasks together.", min=2)
    num_runs: int = option(1, "Fine-tune so many times from the base model, each in another order of the data.", min=1)
    collect_every: int = option(1, "Take a snapshot every so many steps.", min=1)
    collect_optimizer: str = option("adamw", "Optimizer.", choices=("adamw", "adam", "sgd"))
    collect_learning_rate: float = option(0.03, "Constant learning rate.", above=0)
    collect_weight_decay: float = option(5e-4, "Weight decay.", min=0)
    collect_batch_size: int = option(128, "Images in a step.", min=1)
    collect_steps: int = option(
        400, "Of a family: AdamW steps of the network of each task; their learning rate falls as a cosine.", min=1
    )


@dataclass
class AutoencoderSection:
    """Training of the autoencoder (paper, Table 5c)."""

    autoencoder_preset: str = option("tokens", "See ParameterAutoencoder.", choices=("tokens", "paper", "pca"))
    token_size: int | None = option(
        None, "Parameters in a token, for the preset `tokens`; by default the next power of two from 2 √D.", min=1
    )
    normalization: str = option(
        "coordinate",
        "Mean of every parameter (`coordinate`), or of every `tensor` as the paper has it.",
        choices=("coordinate", "tensor"),
    )
    latent_dim: int = option(128, "L, the length of a latent.", min=1)
    latent_scaling: str = option(
        "each",
        "Latents are divided by the standard deviation of `each` entry, or of all `together`.",
        choices=("each", "together"),
    )
    adapter_products: bool = option(
        False, "Learn and compare LoRA adapters as the products BA of their factors, which are not unique."
    )
    adapter_frame_size: int = option(
        128,
        "With adapter_products: products are kept by what they are between bases of at most this many rows and columns "
        "that all adapters share; 0 for whole products.",
        min=0,
    )
    heldout_snapshots: float = option(
        0.1, "Share of the snapshots that generators never see, to measure R² on.", min=0, below=0.5
    )
    autoencoder_steps: int = option(300, "Optimizer steps.", min=1)
    autoencoder_batch_size: int = option(50, "Snapshots in a step.", min=1)
    autoencoder_learning_rate: float = option(
        4e-3, "Peak learning rate, with cosine decay (the paper's widths: 2e-5).", above=0
    )
    autoencoder_warmup_steps: int = option(30, "Steps over which the learning rate rises to its peak.", min=0)
    max_grad_norm: float = option(1.0, "Gradients, the denoiser's too, are clipped to this norm.", above=0)
    parameter_noise: float = option(1e-3, "σ_v, noise on the normalised parameters.", min=0)
    latent_noise: float = option(0.1, "σ_z, noise on the latent.", min=0)


@dataclass
class DenoiserSection:
    """Training of the denoiser (paper, Table 5d)."""

    denoiser_preset: str = option("small", "Widths.", choices=("paper", "small", "mlp"))
    denoiser_steps: int = option(1000, "Optimizer steps.", min=1)
    denoiser_batch_size: int = option(50, "Latents in a step.", min=1)
    denoiser_learning_rate: float = option(
        1e-3, "Peak learning rate, with cosine decay (the paper's widths: 1e-4).", above=0
    )
    denoiser_warmup_steps: int = option(0, "Steps over which the learning rate rises to its peak.", min=0)
    ema_decay: float = option(
        0.999, "Decay of the moving average of the denoiser's weights, which is what is kept.", min=0, below=1
    )
    prediction_type: str = option("epsilon", "What is predicted.", choices=("epsilon", "v_prediction"))
    condition_dropout: float = option(
        0.0, "Share of conditions that are left out in training, for classifier-free guidance.", min=0, below=1
    )
    regressed_networks: int | None = option(
        None,
        "Of a family: so many networks for other conditions, given by kernel ridge regression, are learned beside the "
        "snapshots. By default 1500 where tuning is on seen tasks alone, and else none.",
        min=0,
    )
    # A pipeline with a longer schedule is not loaded.
    num_train_timesteps: int = option(1000, "T, the length of the diffusion.", min=1, max=10**6)


@dataclass
class TuneSection:
    """Fine-tuning of the denoiser on the loss of the networks that it generates."""

    tune_steps: int | None = option(
        None, "Optimizer steps; 0 for none. By default 1200 for a family, and else none. For classifiers.", min=0
    )
    tune_learning_rate: float = option(3e-4, "Peak learning rate, with cosine decay.", above=0)
    tune_models: int = option(32, "Networks in a step; of a family, each for a task of its own.", min=1)
    tune_batch_size: int = option(
        32, "Training examples in a step: of one task the same for all networks, of a family for each.", min=1
    )
    tune_inference_steps: int = option(10, "Denoising steps, the last of which is trained through.", min=1)
    tune_ensemble_size: int = option(
        1, "For one task: networks whose mean prediction is to be right; a divisor of tune_models.", min=1
    )
    tune_diversity: list[float] = option(
        [0.0], "For one task: weights of the overlap of errors in an ensemble; validation chooses.", min=0
    )
    tune_penalty: float = option(
        0.0, "For one task: weight of the squared distance to the latents of the untuned generator.", min=0
    )
    tune_map: bool = option(False, "Also train a linear map from latents to parameters, beside the decoder.")
    tune_tasks: str = option(
        "fresh", "Of a family: new tasks at every step (`fresh`), or the `seen` ones alone.", choices=("fresh", "seen")
    )
    tune_condition_noise: float = option(
        0.0, "Of seen tasks: their conditions are moved by so many standard deviations.", min=0
    )
    tune_weight_loss: float = option(0.0, "Weight of the denoiser's own loss on snapshots, which is added.", min=0)


@dataclass
class EvaluateSection:
    """Generation and scoring."""

    num_models: int = option(200, "How many networks to generate; of a family, for each unseen task.", min=1)
    score_models: int | None = option(None, "Score no more than so many of them, drawn at random.", min=1)
    num_inference_steps: int | None = option(
        None, "Denoising steps, saved with the generator; by default 10, or those of a generator that has some.", min=1
    )
    temperature: float | None = option(
        None,
        "Spread of the starting noise, saved with the generator; by default 1, or its own.",
        min=0,
    )
    fid_features: str = option(
        "inception",
        "FID is measured on these features: `inception`, or folder or Hub id of an image classifier.",
        path=True,
    )
    baseline_models: int = option(20, "Networks of each setting of the baselines; 0 for none.", min=0)
    baselines: str = option("all", "Settings of the baselines: `few` is one of each family.", choices=("all", "few"))


@dataclass
class Recipe(
    RunSection,
    TaskSection,
    FamilySection,
    BaseSection,
    CollectSection,
    AutoencoderSection,
    DenoiserSection,
    TuneSection,
    EvaluateSection,
):
    """
    Everything that a run is made of; flags of `scripts/train.py` and keys of a recipe file have these names.

    Raises:
        ValueError: for a value that is not possible; the message begins with the key.
    """

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self):
            setattr(self, key.name, check_value(key, getattr(self, key.name)))
        if self.tune_models % self.tune_ensemble_size:
            raise ValueError(
                f"tune_ensemble_size must be a divisor of tune_models={self.tune_models}, got {self.tune_ensemble_size}"
            )
        if any(self.tune_diversity) and self.tune_ensemble_size == 1:
            raise ValueError(
                f"tune_diversity={self.tune_diversity} needs a tune_ensemble_size above 1: one network has no other to "
                "differ from"
            )
        if self.tune_steps is None:
            self.tune_steps = 0 if self.family is None else 1200
        if self.regressed_networks and self.family is None:
            raise ValueError(
                f"regressed_networks={self.regressed_networks} needs a family, whose conditions they are for"
            )
        if self.regressed_networks is None:
            self.regressed_networks = 0 if self.family is None or self.tune_tasks == "fresh" else 1500
        if self.family is not None and self.snapshots is None and self.num_snapshots % self.num_tasks:
            raise ValueError(
                f"num_snapshots must be a multiple of num_tasks={self.num_tasks}, got {self.num_snapshots}: every task "
                "has as many"
            )
        if self.num_snapshots % self.num_runs:
            raise ValueError(f"num_runs must be a divisor of num_snapshots={self.num_snapshots}, got {self.num_runs}")
        if self.token_size is not None and self.autoencoder_preset != "tokens":
            raise ValueError(
                f"token_size must be left out with autoencoder_preset={self.autoencoder_preset}, got {self.token_size}"
            )

    @property
    def recomputes_statistics(self) -> bool:
        """Whether each network gets its own statistics of batch norm, from training data."""
        return self.batch_norm_statistics == "recomputed"

    @property
    def sampling(self) -> dict[str, Any]:
        """What is set of how a pipeline samples, as its config has it."""
        values = {name: getattr(self, name) for name in ("num_inference_steps", "temperature")}
        return {name: value for name, value in values.items() if value is not None}

    def section(self, *sections: type) -> dict[str, Any]:
        """The settings of some sections, by name."""
        return {f.name: getattr(self, f.name) for section in sections for f in dataclasses.fields(section)}

    def without_secrets(self, *sections: type) -> dict[str, Any]:
        """What may be written to files and sent to trackers."""
        return {key: value for key, value in self.section(*sections).items() if key not in SECRETS}

    def with_dataset(self) -> "Recipe":
        """
        This recipe with the default data set where it names none.

        Raises:
            ValueError: if it has a model of one's own, which must not be judged by data that it was not made for.
        """
        if self.dataset is not None or ":" in self.task:
            return self
        if self.model is not None and ("/" in self.model or os.path.exists(self.model)):
            raise ValueError(
                f"--dataset is needed: there is no default one for '{self.model}', a model of your own; name the data "
                "set that it was trained for"
            )
        return dataclasses.replace(self, dataset=DEFAULT_DATASET)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a recipe file that gives this recipe again."""
        parts = (
            f"# {section.__doc__}\n{yaml.safe_dump(self.without_secrets(section), sort_keys=False, allow_unicode=True)}"
            for section in SECTIONS
        )
        Path(path).write_text("\n".join(parts), encoding="utf-8")


SECTIONS = (
    RunSection,
    TaskSection,
    FamilySection,
    BaseSection,
    CollectSection,
    AutoencoderSection,
    DenoiserSection,
    TuneSection,
    EvaluateSection,
)
TITLES = ("run", "task", "family", "base model", "snapshots", "autoencoder", "denoiser", "tuning", "evaluation")
for _section, _title in zip(SECTIONS, TITLES, strict=True):
    _section._argument_group_name = _title  # type: ignore[attr-defined]  # the heading in --help


class RecipeParser(HfArgumentParser):
    """
    Flags for every key of a recipe, after an optional recipe file. Errors are one line that names the key, and end the
    program.
    """

    def __init__(self, default_recipe: str | None = None, **kwargs: Any):
        super().__init__(SECTIONS, allow_abbrev=False, **kwargs)
        self.default_recipe = default_recipe
        default = f" Without one, and without --model and --task, {default_recipe}." if default_recipe else ""
        about = f"A recipe file; flags take precedence.{default}"
        self.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help=about)
        self.keys = {key.name: key for key in dataclasses.fields(Recipe)}

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        key = copy.copy(field)  # the parser of transformers changes its type
        choices = field.metadata.get("choices")
        text = field.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
        key.metadata = {"help": text}  # type: ignore[assignment]  # the rest is no argument of add_argument
        HfArgumentParser._parse_dataclass_field(parser, key)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {shorten(message)} (--help lists every key)", file=sys.stderr)
        sys.exit(2)

    def parse_recipe(self, argv: list[str] | None = None) -> Recipe:
        """The recipe that the file and the flags give; flags take precedence."""
        argv = sys.argv[1:] if argv is None else argv
        namespace, unknown = self.parse_known_args(argv)
        if unknown:  # before the value that follows an unknown flag is taken for the recipe file
            self._refuse(unknown[0])
        recipe = namespace.recipe
        if recipe is None and not any(flag.partition("=")[0] in ("--model", "--task") for flag in argv):
            recipe = self.default_recipe
        if recipe is not None:
            self.set_defaults(**self._read(recipe))
            namespace = self.parse_known_args(argv)[0]
        try:
            return Recipe(**{key: value for key, value in vars(namespace).items() if key in self.keys})
        except ValueError as error:
            self.error(str(error))

    def parse_changes(self, argv: list[str]) -> dict[str, Any]:
        """The values of the keys that `argv` has flags for, and of no others."""
        unset = object()
        namespace, unknown = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(self.keys, unset)))
        if unknown or namespace.recipe is not None:
            self._refuse(unknown[0] if unknown else namespace.recipe)
        return {key: value for key, value in vars(namespace).items() if key in self.keys and value is not unset}

    def _read(self, path: str) -> dict[str, Any]:
        """The file's values such that they can be defaults: those that are text are read as flags are."""
        try:
            file = Path(expand_path(path))
            if not file.exists() and (PACKAGED / file.name).is_file():
                file = PACKAGED / file.name
            values = yaml.load(file.read_text(encoding="utf-8"), RecipeLoader)
        except FileNotFoundError:
            names = sorted(file.name for file in PACKAGED.glob("*.yaml"))
            close = difflib.get_close_matches(Path(path).name, names, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"this package has {', '.join(names)}"
            self.error(f"there is no recipe '{path}'; {hint}")
        except (OSError, UnicodeDecodeError) as error:
            self.error(f"recipe '{path}' cannot be read: {error}")
        except Exception as error:  # what odd values make the parts of yaml raise has no common type
            self.error(f"recipe '{path}' is not YAML: {error}")
        values = {} if values is None else values
        if not isinstance(values, dict):
            self.error(f"recipe '{path}' must be a mapping of keys to values, got a {type(values).__name__}")
        return {key: self._as_default(path, key, value) for key, value in values.items()}

    def _as_default(self, path: str, key: Any, value: Any) -> Any:
        if key not in self.keys:
            self.error(f"recipe '{path}' has the unknown key '{key}'{self._suggest(str(key))}")
        if value is None and not is_nullable(self.keys[key]):
            self.error(f"recipe '{path}' has no value for the key '{key}'")
        if isinstance(value, list) != is_list(self.keys[key]):
            if not is_list(self.keys[key]):
                self.error(f"recipe '{path}' has a list for the key '{key}', which takes one value")
            value = [value]
        if isinstance(value, list):
            return [str(item) for item in value] if str in typing.get_args(self.keys[key].type) else value
        return value if value is None else json.dumps(value) if isinstance(value, dict) else str(value)

    def _refuse(self, argument: str) -> NoReturn:
        self.error(f"unknown argument '{argument}'{self._suggest(argument.lstrip('-').partition('=')[0])}")

    def _suggest(self, key: str) -> str:
        if key in RENAMED:
            return f"; it is called {RENAMED[key]} now"
        close = difflib.get_close_matches(key, self.keys, n=3)
        return f"; did you mean {' or '.join(close)}?" if close else ""


class _RaisingParser(RecipeParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def load_recipe(path: str | os.PathLike, **changes: Any) -> Recipe:
    """
    The recipe in a file, with some keys changed.

    Raises:
        ValueError: if the file cannot be read, or its values cannot be used.
    """
    return dataclasses.replace(_RaisingParser().parse_recipe([os.fspath(path)]), **changes)
