"""
The settings of a run: `PDiffConfig`, which Python, recipe files and flags share.

This module imports neither torch nor what needs it, so that `--help` and errors in flags come at once. Choices that
other modules define are therefore repeated here; a test compares them.
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from .options import check_value, group_of, nested, option

STAGES = ("base", "collect", "autoencoder", "denoiser", "tune", "evaluate")
DEFAULT_DATASET = "digits"

_NO_FAMILY: dict[str, Any] = {
    "read_when": lambda c: c.has_family,
    "why": "there is one task; it is for a family of tasks",
}
_ONE_TASK: dict[str, Any] = {
    "read_when": lambda c: not c.has_family,
    "why": "it is for a single task, and there is a family of tasks",
}
_OF_DATA: dict[str, Any] = {
    "read_when": lambda c: c.is_of_data is not True,
    "why": "there is one network for each datum, and the data set says which are held out",
}
_PUSHED: dict[str, Any] = {"read_when": lambda c: c.push_to_hub, "why": "nothing is pushed without push_to_hub"}
_BASE: dict[str, Any] = {"read_when": lambda c: c.base_epochs > 0, "why": "base_epochs=0 takes the base model as it is"}
_SELECTS: dict[str, Any] = {
    "read_when": lambda c: c.snapshots is None,
    "why": "the snapshots say which tensors are generated",
}
_COLLECTS: dict[str, Any] = {"read_when": lambda c: c.collects, "why": "the snapshots come from elsewhere"}
# The networks that are trained on an unseen task, for comparison, are trained as snapshots are.
_FINE_TUNES: dict[str, Any] = {
    "read_when": lambda c: c.collects or c.has_family,
    "why": "the snapshots come from elsewhere",
}
_LEARNED: dict[str, Any] = {
    "read_when": lambda c: c.autoencoder_preset != "pca",
    "why": "autoencoder_preset=pca is linear, and computed without training",
}
_TUNES: dict[str, Any] = {"read_when": lambda c: c.tunes, "why": "tune_steps is 0, so that nothing is tuned"}
# The networks that a generator with conditions is compared with are trained as it is tuned.
_TUNES_OR_COMPARES: dict[str, Any] = {
    "read_when": lambda c: c.tunes or c.has_family,
    "why": "tune_steps is 0, so that nothing is tuned",
}


def _both(*conditions: dict[str, Any]) -> dict[str, Any]:
    """All of several conditions."""
    return {
        "read_when": lambda c: all(condition["read_when"](c) for condition in conditions),
        "why": " or ".join(condition["why"] for condition in conditions),
    }


@dataclass
class RunSection:
    """Where the run lives, and how it is executed."""

    output_dir: str | None = option(
        None, "Folder that receives everything; `outputs/` and the model's name by default.", path=True, common=True
    )
    stages: list[str] = option(list(STAGES), "Which stages to execute.", choices=STAGES, common=True)
    seed: int = option(0, "Seed of the whole run.", min=0, common=True)
    resume_from_checkpoint: str | None = option(
        None, "An unfinished stage goes on where it was.", choices=("latest",), common=True
    )
    overwrite_output_dir: bool = option(False, "Execute stages again whose settings have changed.", common=True)
    checkpointing_steps: int = option(500, "Training stages save a checkpoint every so many steps.", min=1)
    mixed_precision: str | None = option(
        None, "By default what the launcher is set to.", choices=("no", "fp16", "bf16")
    )
    gradient_accumulation_steps: int = option(1, "A training batch is computed in so many parts.", min=1)
    report_to: str | None = option(None, "Tracker of Accelerate: tensorboard, wandb, trackio, ...")
    push_to_hub: bool = option(
        False, "Push the finished generator to the Hub, with its report as the model card.", common=True
    )
    hub_model_id: str | None = option(
        None, "Repository, `user/name` or `organization/name`; else output_dir's name.", **_PUSHED, common=True
    )
    hub_private_repo: bool = option(False, "Create the repository as a private one.", **_PUSHED)


@dataclass
class TaskSection:
    """The base model and its data. What a task's class does not take is refused."""

    task: str = option(
        "image_classification",
        "A task of this package (its modules in pdiff_hf/tasks have these names), or a class of your own, module:Class "
        "or path/to/file.py:Class.",
        path=True,
        common=True,
    )
    task_args: dict = option(
        {},
        "More arguments of the task's class, such as label_column, text_column, max_length, augmentation, "
        "skip_bad_examples or fid_features.",
        common=True,
    )
    model: str | None = option(
        "resnet18",
        "timm architecture, or local folder or Hub id of a timm or transformers model; for detection and segmentation, "
        "torchvision's builder or builder:WEIGHTS; `unet2d` for a fresh UNet2DModel that generates images.",
        path=True,
        common=True,
    )
    model_args: dict = option(
        {}, "More arguments of a timm architecture or torchvision builder, or the config of a UNet2DModel."
    )
    dataset: str | None = option(
        None,
        "`digits`, `all_digits`, `moving_digits`, or local folder, file or Hub id of a data set. "
        f"`{DEFAULT_DATASET}` by default, but for your own model there is no default.",
        path=True,
        common=True,
    )
    image_size: int | None = option(
        None,
        "Side of the square that images are scaled to; 0 for the model's own. By default also its own if it has "
        "weights, and else that of the images, if the model takes it.",
        min=0,
    )
    validation_fraction: float = option(
        0.2, "Share of the training data for a validation (and test) split it lacks.", above=0, below=0.5
    )
    max_train_samples: int | None = option(None, "Use no more training examples than this.", min=1)
    max_eval_samples: int | None = option(None, "Use no more validation and test examples than this.", min=1)


@dataclass
class FamilySection:
    """A family of tasks, for a generator that answers to conditions: see `pdiff_hf.tasks.family`."""

    family: str | None = option(
        None,
        "`transformed` or `grouped`, over the examples of the task; or a class of your own, module:Class or "
        "path/to/file.py:Class. Without one, there is one task.",
        path=True,
        common=True,
    )
    family_args: dict = option({}, "Arguments of the family's class, such as ranges of fields.", **_NO_FAMILY)
    num_tasks: int = option(192, "Seen tasks, which snapshots are collected for.", min=2, **_NO_FAMILY)
    num_validation_tasks: int = option(32, "Tasks that settings are chosen on.", min=1, **_NO_FAMILY)
    num_test_tasks: int = option(48, "Unseen tasks of the report, in each of its sets.", min=2, **_NO_FAMILY)


@dataclass
class BaseArgs:
    """More settings of the base model's training."""

    warmup_steps: int = option(0, "Steps over which the learning rate rises to its peak.", min=0, **_BASE)
    weight_decay: float = option(5e-4, "Weight decay.", min=0, **_BASE)


@dataclass
class BaseSection:
    """Training of the base model (paper, Table 5a); for a family, on all seen tasks together."""

    base_epochs: int = option(20, "Epochs; 0 takes the model as it is.", min=0, common=True)
    base_batch_size: int = option(64, "Examples in a step.", min=2, **_BASE)
    base_learning_rate: float = option(1e-3, "Peak learning rate, with cosine decay.", above=0, **_BASE)
    base_args: BaseArgs = option(BaseArgs, "More settings.")


@dataclass
class CollectArgs:
    """More settings of fine-tuning."""

    optimizer: str = option("adamw", "Optimizer.", choices=("adamw", "adam", "sgd"), **_both(_COLLECTS, _ONE_TASK))
    weight_decay: float = option(5e-4, "Weight decay.", min=0, **_FINE_TUNES)
    num_runs: int = option(
        1,
        "Fine-tune so many times from the base model, each in another order of the data.",
        min=1,
        **_both(_COLLECTS, _ONE_TASK, _OF_DATA),
    )


@dataclass
class CollectSection:
    """Snapshots: an existing data set of them, or fine-tuning (paper, Table 5b)."""

    snapshots: str | None = option(
        None, "Folder or Hub id of a parameter data set to use as it is.", path=True, common=True
    )
    select: list[str] = option(
        ["norm[-2:]"], "Tensors to generate: kinds, globs, or `re:` expressions.", **_SELECTS, common=True
    )
    exclude: list[str] = option([], "Tensors to leave out of those.", **_SELECTS)
    batch_norm_statistics: str = option(
        "base",
        "Running statistics of batch norm: those of the `base` model, `generated` with their layers, or `recomputed` "
        "for each network from training data.",
        choices=("base", "generated", "recomputed"),
        read_when=lambda c: c.snapshots is None or c.batch_norm_statistics == "recomputed",
        why=_SELECTS["why"],
    )
    num_snapshots: int = option(
        300, "K, over all runs or seen tasks together.", min=2, **_both(_COLLECTS, _OF_DATA), common=True
    )
    collect_every: int = option(1, "Take a snapshot every so many steps.", min=1, **_both(_COLLECTS, _OF_DATA))
    collect_learning_rate: float = option(0.03, "Constant learning rate.", above=0, **_FINE_TUNES)
    collect_batch_size: int = option(128, "Examples, or coordinates of data, in a step.", min=1, **_FINE_TUNES)
    collect_steps: int = option(
        400,
        "Families and data only: AdamW steps of each network; the learning rate falls as a cosine.",
        min=1,
        read_when=lambda c: c.has_family or c.is_of_data is not False,
        why="there is one task, whose networks are as many as num_snapshots says",
    )
    collect_args: CollectArgs = option(CollectArgs, "More settings.")


@dataclass
class AutoencoderArgs:
    """More settings of the autoencoder."""

    token_size: int | None = option(
        None,
        "Parameters in a token; by default the next power of two from 2 √D.",
        min=1,
        read_when=lambda c: c.autoencoder_preset == "tokens",
        why="autoencoder_preset=tokens alone has tokens",
    )
    adapter_frame_size: int = option(
        128,
        "Products are kept by what they are between bases of at most this many rows and columns that all adapters "
        "share; 0 for whole products.",
        min=0,
        read_when=lambda c: c.adapter_products,
        why="it is for adapter_products",
    )
    adapter_energy: float = option(
        0.0,
        "The smallest bases, by powers of two up to adapter_frame_size, that keep this part of the products' energy; 0 "
        "for adapter_frame_size itself.",
        min=0,
        below=1,
        read_when=lambda c: c.adapter_products and c.autoencoder_args.adapter_frame_size > 0,
        why="it is for adapter_products with an adapter_frame_size",
    )
    normalization: str = option(
        "coordinate",
        "Mean of every parameter (`coordinate`), or of every `tensor` as the paper has it.",
        choices=("coordinate", "tensor"),
    )
    latent_scaling: str | None = option(
        None,
        "Latents are divided by the standard deviation of `each` entry, or of all `together`; by default together for "
        "networks of many tasks or data.",
        choices=("each", "together"),
    )
    warmup_steps: int = option(30, "Steps over which the learning rate rises to its peak.", min=0, **_LEARNED)
    parameter_noise: float = option(1e-3, "σ_v, noise on the normalised parameters.", min=0, **_LEARNED)
    latent_noise: float = option(0.1, "σ_z, noise on the latent.", min=0, **_LEARNED)


@dataclass
class AutoencoderSection:
    """Training of the autoencoder (paper, Table 5c)."""

    autoencoder_preset: str = option(
        "tokens", "See ParameterAutoencoder.", choices=("tokens", "paper", "pca", "linear"), common=True
    )
    autoencoder_loss: str = option(
        "parameters",
        "Train it to return the `parameters`, or networks with the same `outputs`: the data that they are, the "
        "predictions of classifiers on training examples, or else their loss.",
        choices=("parameters", "outputs"),
        **_LEARNED,
    )
    latent_dim: int = option(128, "L, the length of a latent.", min=1, common=True)
    adapter_products: bool = option(
        False, "Learn and compare LoRA adapters as the products BA of their factors, which are not unique."
    )
    heldout_snapshots: float = option(
        0.1,
        "Share of the snapshots that generators never see, to measure R² on.",
        min=0,
        below=0.5,
        read_when=lambda c: not (c.is_of_data and c.collects),
        why=_OF_DATA["why"],
    )
    autoencoder_steps: int = option(300, "Optimizer steps.", min=1, **_LEARNED, common=True)
    autoencoder_batch_size: int = option(50, "Snapshots in a step.", min=1, **_LEARNED)
    autoencoder_learning_rate: float = option(
        4e-3, "Peak learning rate, with cosine decay (the paper's widths: 2e-5).", above=0, **_LEARNED
    )
    autoencoder_args: AutoencoderArgs = option(AutoencoderArgs, "More settings.")


@dataclass
class DenoiserArgs:
    """More settings of the denoiser."""

    ema_decay: float = option(
        0.999, "Decay of the moving average of the weights, which is what is kept.", min=0, below=1
    )
    # A pipeline with a longer schedule is not loaded.
    num_train_timesteps: int = option(1000, "T, the length of the diffusion.", min=1, max=10**6)
    condition_dropout: float = option(
        0.0,
        "Share of conditions that are left out in training, for classifier-free guidance.",
        min=0,
        below=1,
        read_when=lambda c: c.has_conditions,
        why="the snapshots have no conditions",
    )
    regressed_networks: int | None = option(
        None,
        "Families only: number of networks for other conditions, given by kernel ridge regression, that are learned "
        "beside the snapshots. By default 1500 where tuning is on seen tasks alone, and else none.",
        min=0,
        **_NO_FAMILY,
    )


@dataclass
class DenoiserSection:
    """Training of the denoiser (paper, Table 5d)."""

    denoiser_preset: str = option("mlp", "Widths.", choices=("paper", "small", "mlp"), common=True)
    denoiser_steps: int = option(1000, "Optimizer steps.", min=1, common=True)
    denoiser_batch_size: int = option(50, "Latents in a step.", min=1)
    denoiser_learning_rate: float = option(
        1e-3, "Peak learning rate, with cosine decay (the paper's widths: 1e-4).", above=0
    )
    prediction_type: str = option("v_prediction", "What is predicted.", choices=("epsilon", "v_prediction"))
    denoiser_args: DenoiserArgs = option(DenoiserArgs, "More settings.")


@dataclass
class TuneArgs:
    """More settings of tuning."""

    inference_steps: int = option(
        10, "Denoising steps, the last of which is trained through.", min=1, **_TUNES_OR_COMPARES
    )
    ensemble_size: int = option(
        1,
        "Networks whose mean prediction is to be right; a divisor of tune_models.",
        min=1,
        **_both(_TUNES, _ONE_TASK),
    )
    diversity: list[float] = option(
        [0.0],
        "Weights of the overlap of errors in an ensemble; validation chooses.",
        min=0,
        **_both(_TUNES, _ONE_TASK),
    )
    penalty: float = option(
        0.0,
        "Weight of the squared distance to the latents of the untuned generator.",
        min=0,
        **_both(_TUNES, _ONE_TASK),
    )
    map: bool = option(False, "Also train a linear map from latents to parameters, beside the decoder.", **_TUNES)
    condition_noise: float = option(
        0.0,
        "The conditions of seen tasks are moved by so many standard deviations.",
        min=0,
        read_when=lambda c: c.has_family and c.tune_tasks == "seen",
        why="it is for tune_tasks=seen",
    )
    weight_loss: float = option(0.0, "Weight of the denoiser's own loss on snapshots, which is added.", min=0, **_TUNES)


@dataclass
class TuneSection:
    """Fine-tuning of the denoiser on the loss of the networks that it generates, for classifiers."""

    tune_steps: int | None = option(
        None, "Optimizer steps; 0 for none. By default 1200 for a family, and else none.", min=0, common=True
    )
    tune_learning_rate: float = option(3e-4, "Peak learning rate, with cosine decay.", above=0, **_TUNES_OR_COMPARES)
    tune_models: int = option(
        32, "Networks in a step; for a family, each for its own task.", min=1, **_TUNES_OR_COMPARES
    )
    tune_batch_size: int = option(
        32,
        "Training examples in a step: one batch for all networks (single task) or one per network (family).",
        min=1,
        **_TUNES_OR_COMPARES,
    )
    tune_tasks: str = option(
        "fresh",
        "New tasks at every step (`fresh`), or the `seen` ones alone.",
        choices=("fresh", "seen"),
        **_NO_FAMILY,
    )
    tune_args: TuneArgs = option(TuneArgs, "More settings.")


@dataclass
class EvaluateSection:
    """Generation and scoring."""

    num_models: int = option(
        200, "How many networks to generate; for a family, for each unseen task.", min=1, common=True
    )
    num_inference_steps: int | None = option(
        None,
        "Denoising steps, saved with the generator; by default 10, or those of a generator that has some.",
        min=1,
        common=True,
    )
    temperature: float | None = option(
        None, "Spread of the starting noise, saved with the generator; by default 1, or its own.", min=0
    )
    baseline_models: int = option(
        20,
        "Networks of each setting of the baselines; 0 for none.",
        min=0,
        **_both(_ONE_TASK, _OF_DATA),
        common=True,
    )
    baselines: str = option("all", "Settings of the baselines: `few` is one of each kind.", choices=("all", "few"))


SECTIONS = {
    "run": RunSection,
    "task": TaskSection,
    "family": FamilySection,
    "base model": BaseSection,
    "snapshots": CollectSection,
    "autoencoder": AutoencoderSection,
    "denoiser": DenoiserSection,
    "tuning": TuneSection,
    "evaluation": EvaluateSection,
}


@dataclass
class PDiffConfig(
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
    Everything that a run is made of; flags of `scripts/train.py` and keys of a recipe file have these names. A setting
    that would have no effect is refused, by [`check`].

    Raises:
        ValueError: for a value that is not possible; the message begins with the key.
    """

    # No settings: what a run knows besides them, and which of them come from a file, where a flag may make them moot.
    imported, conditional, soft = False, True, frozenset[str]()
    _of_data = cast("bool | None", None)

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self):
            setattr(self, key.name, check_value(key, getattr(self, key.name)))
        tune = self.tune_args
        if self.tune_models % tune.ensemble_size:
            raise ValueError(
                f"tune_args.ensemble_size must be a divisor of tune_models={self.tune_models}, got {tune.ensemble_size}"
            )
        if any(tune.diversity) and tune.ensemble_size == 1:
            raise ValueError(
                f"tune_args.diversity={tune.diversity} needs an ensemble_size above 1: one network has no other to "
                "differ from"
            )
        if self.has_family and self.collects and self.num_snapshots % self.num_tasks:
            raise ValueError(
                f"num_snapshots must be a multiple of num_tasks={self.num_tasks}, got {self.num_snapshots}: every task "
                "has as many"
            )
        if self.num_snapshots % self.collect_args.num_runs:
            raise ValueError(
                f"collect_args.num_runs must be a divisor of num_snapshots={self.num_snapshots}, got "
                f"{self.collect_args.num_runs}"
            )

    @property
    def title(self) -> str:
        """What the run is about, as the name of a folder."""
        name = self.task.rpartition(":")[2] if ":" in self.task or self.model is None else self.model
        return Path(name.partition(":")[0]).name.lower()

    @property
    def has_family(self) -> bool:
        """Whether networks answer to conditions of a family of tasks."""
        return self.family is not None

    @property
    def is_of_data(self) -> bool | None:
        """Whether each network is a datum; None of your own class, before a run knows it."""
        return (
            (self.task == "neural_field" or (None if ":" in self.task else False))
            if self._of_data is None
            else self._of_data
        )

    @property
    def collects(self) -> bool:
        """Whether snapshots are made in this run."""
        return self.snapshots is None and not self.imported

    @property
    def latent_scaling(self) -> str:
        """`autoencoder_args.latent_scaling`, or its default for this run."""
        several = self.has_family or self.is_of_data or (self.imported and self.conditional)
        return self.autoencoder_args.latent_scaling or ("together" if several else "each")

    @property
    def has_conditions(self) -> bool:
        """Whether the snapshots have conditions, as far as that is known."""
        return self.has_family or self.conditional

    @property
    def tunes(self) -> bool:
        """Whether there is a stage of tuning."""
        return self.num_tune_steps > 0

    @property
    def num_tune_steps(self) -> int:
        """`tune_steps`, or its default for this run."""
        return (1200 if self.has_family else 0) if self.tune_steps is None else self.tune_steps

    @property
    def num_regressed(self) -> int:
        """`denoiser_args.regressed_networks`, or its default for this run."""
        default = 1500 if self.has_family and self.tune_tasks == "seen" else 0
        number = self.denoiser_args.regressed_networks
        return default if number is None else number

    @property
    def recomputes_statistics(self) -> bool:
        """Whether each network gets its own statistics of batch norm, from training data."""
        return self.batch_norm_statistics == "recomputed"

    @property
    def sampling(self) -> dict[str, Any]:
        """What is set of how a pipeline samples, as its config has it."""
        values = {name: getattr(self, name) for name in ("num_inference_steps", "temperature")}
        return {name: value for name, value in values.items() if value is not None}

    def changed(self, **changes: Any) -> "PDiffConfig":
        """
        This config with some settings changed, and knowing what it knows. Those in groups may have names such as
        `tune_args.penalty`; what else a group holds stays as it is.
        """
        values = nested(changes)
        for name in values:
            if isinstance(values[name], dict) and dataclasses.is_dataclass(group := getattr(self, name)):
                values[name] = dataclasses.asdict(group) | values[name]  # type: ignore[arg-type]
        config = dataclasses.replace(self, **values)
        config.imported, config.conditional, config._of_data = self.imported, self.conditional, self._of_data
        config.soft = self.soft - set(changes)
        return config

    def unread(self) -> Iterator[tuple[str, Any, str]]:
        """Settings that have no effect in this run: name, value (not the default one), and why."""
        for name, key, value in self._settings():
            if not key.metadata["read_when"](self) and value != default_of(key):
                yield name, value, key.metadata["why"]

    def check(self) -> None:
        """
        Raises:
            ValueError: for a setting without effect. One that is in a recipe file may have none because of a flag.
        """
        for name, value, why in self.unread():
            if name not in self.soft:
                raise ValueError(f"{name}={value} has no effect: {why}; leave it out")

    def section(self, *sections: type) -> dict[str, Any]:
        """The settings of some sections that this run reads, by name; those of groups as `group.name`."""
        names = {key.name for section in sections for key in dataclasses.fields(section)}
        return {
            name: value
            for name, key, value in self._settings()
            if name.partition(".")[0] in names and key.metadata["read_when"](self)
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes a recipe file that gives this config again."""
        sections = [(section.__doc__, nested(self.section(section))) for section in SECTIONS.values()]
        parts = [f"# {about}\n{yaml.safe_dump(s, sort_keys=False, allow_unicode=True)}" for about, s in sections if s]
        Path(path).write_text("\n".join(parts), encoding="utf-8")

    def with_dataset(self) -> "PDiffConfig":
        """
        This config with the default data set where it names none.

        Raises:
            ValueError: if it has your own model, which must not be judged by data that it was not made for.
        """
        if self.dataset is not None or ":" in self.task:
            return self
        if self.model is not None and ("/" in self.model or os.path.exists(self.model)):
            raise ValueError(
                f"--dataset is needed: there is no default one for '{self.model}', a model of your own; name the data "
                "set that it was trained for"
            )
        return self.changed(dataset=DEFAULT_DATASET)

    def _settings(self) -> Iterator[tuple[str, dataclasses.Field, Any]]:
        for key in dataclasses.fields(self):
            value = getattr(self, key.name)
            if group_of(key) is None:
                yield key.name, key, value
            else:
                for inner in dataclasses.fields(value):
                    yield f"{key.name}.{inner.name}", inner, getattr(value, inner.name)


def default_of(key: dataclasses.Field) -> Any:
    """The default value of a setting."""
    return key.default if key.default is not dataclasses.MISSING else key.default_factory()  # type: ignore[misc, operator]
