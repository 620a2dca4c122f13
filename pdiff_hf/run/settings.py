"""
The settings of a run by section. `PDiffConfig` has all of them.

This module imports neither torch nor what needs it, so that `--help` and errors in flags come at once. Choices that
other modules define are therefore repeated here; a test compares them.
"""

from dataclasses import dataclass
from functools import partial

from .options import When, option

common = partial(option, common=True)  # `--help` shows it
STAGE_NAMES = ("base", "collect", "autoencoder", "denoiser", "tune", "evaluate")
DEFAULT_DATASET = "digits"

FAMILY = When(lambda c: c.has_family, "it is for a family of tasks, and this run has a single task")
ONE_TASK = When(lambda c: not c.has_family, "it is for a single task, and this run has a family of tasks")
NOT_DATA = When(
    lambda c: c.is_of_data is not True, "there is one network for each datum, and the data set says which are held out"
)
PUSHED = When(lambda c: c.push_to_hub, "nothing is pushed without push_to_hub")
TRAINED = When(lambda c: c.base_epochs > 0, "base_epochs=0 takes the base model as it is")
SELECTED = When(lambda c: c.snapshots is None, "the snapshots say which tensors are generated")
STATISTICS = When(lambda c: SELECTED.holds(c) or c.batch_norm_statistics == "recomputed", SELECTED.why_not)
COLLECTED = When(lambda c: c.collects, "the snapshots come from elsewhere")
SIDE_BY_SIDE = When(
    lambda c: c.has_family or c.is_of_data is not False,
    "this run has a single task, whose networks num_snapshots counts",
)
# The networks that are trained on an unseen task, for comparison, are trained as snapshots are.
FINE_TUNED = When(lambda c: c.collects or c.has_family, COLLECTED.why_not)
LEARNED = When(
    lambda c: c.autoencoder_preset != "pca", "autoencoder_preset=pca is linear, and computed without training"
)
TOKENS = When(lambda c: c.autoencoder_preset == "tokens", "autoencoder_preset=tokens alone has tokens")
PRODUCTS = When(lambda c: c.adapter_products, "it is for adapter_products")
FRAMES = When(
    lambda c: PRODUCTS.holds(c) and c.autoencoder_args.adapter_frame_size > 0,
    "it is for adapter_products with an adapter_frame_size",
)
CONDITIONS = When(lambda c: c.has_conditions, "the snapshots have no conditions")
CLUSTERED = When(
    lambda c: c.is_of_data is not False and not (c._of_data and c.conditional),
    "it is for networks that are data, and have no conditions",
)
GUIDED = When(
    lambda c: CONDITIONS.holds(c) and c.denoiser_args.condition_dropout > 0, "denoiser_args.condition_dropout is 0"
)
TUNED = When(lambda c: c.tunes, "tune_steps is 0, so that nothing is tuned")
# The networks that a generator with conditions is compared with are trained as it is tuned.
COMPARED = When(lambda c: c.tunes or c.has_family, TUNED.why_not)
HELD_OUT = When(lambda c: not (c.is_of_data and c.collects), NOT_DATA.why_not)
SEEN_TASKS = When(lambda c: c.has_family and c.tune_tasks == "seen", "it is for tune_tasks=seen")


@dataclass
class RunSection:
    """Where the run lives, and how it is executed."""

    output_dir: str | None = common(None, "Folder of the run; by default `outputs/` and the model's name.", path=True)
    stages: list[str] = common(list(STAGE_NAMES), "Which stages to execute.", choices=STAGE_NAMES)
    seed: int = common(0, "Seed of the whole run.", min=0)
    resume_from_checkpoint: str | None = common(None, "Resume an unfinished stage.", choices=("latest",))
    overwrite_output_dir: bool = common(False, "Rerun stages whose settings have changed.")
    checkpointing_steps: int = option(500, "Steps between two checkpoints of a training stage.", min=1)
    mixed_precision: str | None = option(None, "By default that of the launcher.", choices=("no", "fp16", "bf16"))
    gradient_accumulation_steps: int = option(1, "Parts that a training batch is computed in.", min=1)
    report_to: str | None = option(None, "Tracker of Accelerate: tensorboard, wandb, trackio, ...")
    push_to_hub: bool = common(False, "Push the finished generator to the Hub, with its report as the model card.")
    hub_model_id: str | None = common(None, "Repository, `user/name`; by default the name of output_dir.", PUSHED)
    hub_private_repo: bool = option(False, "Create the repository as a private one.", PUSHED)


@dataclass
class TaskSection:
    """The base model and its data. What a task's class does not take is refused."""

    task: str = common(
        "image_classification",
        "A task of this package (its modules in pdiff_hf/tasks have these names), or a class of your own, module:Class "
        "or path/to/file.py:Class.",
        path=True,
    )
    task_args: dict = common(
        {},
        "More arguments of the task's class, such as label_column, text_column, max_length, augmentation, "
        "skip_bad_examples or fid_features.",
    )
    model: str | None = common(
        "resnet18",
        "timm architecture, or local folder or Hub id of a timm or transformers model; for detection and segmentation, "
        "torchvision's builder or builder:WEIGHTS; `unet2d` for a fresh UNet2DModel that generates images.",
        path=True,
    )
    model_args: dict = option({}, "More arguments of a fresh network: of timm, torchvision or UNet2DModel.")
    dataset: str | None = common(
        None,
        "`digits`, `all_digits`, `moving_digits`, or local folder, file or Hub id of a data set. "
        f"`{DEFAULT_DATASET}` by default, but for your own model there is no default.",
        path=True,
    )
    image_size: int | None = option(
        None,
        "Side of the square that images are scaled to; 0 for the model's own. By default also its own if it has "
        "weights, and else that of the images, if the model takes it.",
        min=0,
    )
    validation_fraction: float = option(0.2, "Share of training data for a split that is missing.", above=0, below=0.5)
    max_train_samples: int | None = option(None, "Use no more training examples than this.", min=1)
    max_eval_samples: int | None = option(None, "Use no more validation and test examples than this.", min=1)


@dataclass
class FamilySection:
    """A family of tasks, for a generator that answers to conditions: see `pdiff_hf.tasks.family`."""

    family: str | None = common(
        None,
        "`transformed` or `grouped`, over the examples of the task; or a class of your own, module:Class or "
        "path/to/file.py:Class. Without one, there is one task.",
        path=True,
    )
    family_args: dict = option({}, "Arguments of the family's class, such as ranges of fields.", when=FAMILY)
    num_tasks: int = option(192, "Seen tasks, which snapshots are collected for.", min=2, when=FAMILY)
    num_validation_tasks: int = option(32, "Tasks that settings are chosen on.", min=1, when=FAMILY)
    num_test_tasks: int = option(48, "Unseen tasks of the report, in each of its sets.", min=2, when=FAMILY)


@dataclass
class BaseArgs:
    """More settings of the base model's training."""

    warmup_steps: int = option(0, "Steps over which the learning rate rises to its peak.", min=0, when=TRAINED)
    weight_decay: float = option(5e-4, "Weight decay.", min=0, when=TRAINED)


@dataclass
class BaseSection:
    """Training of the base model (paper, Table 5a); for a family, on all seen tasks together."""

    base_epochs: int = common(20, "Epochs; 0 takes the model as it is.", min=0)
    base_batch_size: int = option(64, "Examples in a step.", min=2, when=TRAINED)
    base_learning_rate: float = option(1e-3, "Peak learning rate, with cosine decay.", above=0, when=TRAINED)
    base_args: BaseArgs = option(BaseArgs, "More settings.")


@dataclass
class CollectArgs:
    """More settings of fine-tuning."""

    optimizer: str = option("adamw", "Optimizer.", choices=("adamw", "adam", "sgd"), when=COLLECTED & ONE_TASK)
    weight_decay: float = option(5e-4, "Weight decay.", min=0, when=FINE_TUNED)
    num_runs: int = option(
        1, "Runs from the base model, each in another order of the data.", COLLECTED & ONE_TASK & NOT_DATA, min=1
    )


@dataclass
class CollectSection:
    """Snapshots: an existing data set of them, or fine-tuning (paper, Table 5b)."""

    snapshots: str | None = common(None, "Folder or Hub id of a parameter data set to use as it is.", path=True)
    select: list[str] = common(["norm[-2:]"], "Tensors to generate: kinds, globs, or `re:` expressions.", SELECTED)
    exclude: list[str] = option([], "Tensors to leave out of those.", when=SELECTED)
    batch_norm_statistics: str = option(
        "base",
        "Running statistics of batch norm: those of the `base` model, `generated` with their layers, or `recomputed` "
        "for each network from training data.",
        choices=("base", "generated", "recomputed"),
        when=STATISTICS,
    )
    num_snapshots: int = common(300, "K, over all runs or seen tasks together.", COLLECTED & NOT_DATA, min=2)
    collect_every: int = option(1, "Steps between two snapshots.", min=1, when=COLLECTED & NOT_DATA)
    collect_learning_rate: float = option(0.03, "Constant learning rate.", above=0, when=FINE_TUNED)
    collect_batch_size: int = option(128, "Examples, or coordinates of data, in a step.", min=1, when=FINE_TUNED)
    collect_steps: int = option(
        400, "Families and data: steps of each network, at a rate with cosine decay.", SIDE_BY_SIDE, min=1
    )
    collect_args: CollectArgs = option(CollectArgs, "More settings.")


@dataclass
class AutoencoderArgs:
    """More settings of the autoencoder."""

    loss: str = option(
        "parameters",
        "Train it to return the `parameters`, or networks with the same `outputs`: the data that they are, the "
        "predictions of classifiers on training examples, or else their loss.",
        choices=("parameters", "outputs"),
        when=LEARNED,
    )
    token_size: int | None = option(None, "Parameters in a token; by default a power of two above 2 √D.", TOKENS, min=1)
    adapter_frame_size: int = option(
        128,
        "Products are kept by what they are between bases of at most this many rows and columns that all adapters "
        "share; 0 for whole products.",
        min=0,
        when=PRODUCTS,
    )
    adapter_energy: float = option(
        0.0,
        "The smallest bases, by powers of two up to adapter_frame_size, that keep this part of the products' energy; 0 "
        "for adapter_frame_size itself.",
        min=0,
        below=1,
        when=FRAMES,
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
    warmup_steps: int = option(30, "Steps over which the learning rate rises to its peak.", min=0, when=LEARNED)
    parameter_noise: float = option(1e-3, "σ_v, noise on the normalised parameters.", min=0, when=LEARNED)
    latent_noise: float = option(0.1, "σ_z, noise on the latent.", min=0, when=LEARNED)


@dataclass
class AutoencoderSection:
    """Training of the autoencoder (paper, Table 5c)."""

    autoencoder_preset: str = common(
        "tokens", "See ParameterAutoencoder.", choices=("tokens", "paper", "pca", "linear")
    )
    latent_dim: int = common(128, "L, the length of a latent.", min=1)
    adapter_products: bool = option(False, "Learn and compare LoRA adapters as products BA of their factors.")
    heldout_snapshots: float = option(0.1, "Share that no generator sees, for R².", HELD_OUT, min=0, below=0.5)
    autoencoder_steps: int = common(300, "Optimizer steps.", min=1, when=LEARNED)
    autoencoder_batch_size: int = option(50, "Snapshots in a step.", min=1, when=LEARNED)
    autoencoder_learning_rate: float = option(4e-3, "Peak rate; cosine decay (paper: 2e-5).", LEARNED, above=0)
    autoencoder_args: AutoencoderArgs = option(AutoencoderArgs, "More settings.")


@dataclass
class DenoiserArgs:
    """More settings of the denoiser."""

    ema_decay: float = option(0.999, "Decay of the average of the weights, which is what is kept.", min=0, below=1)
    # A pipeline with a longer schedule is not loaded.
    num_train_timesteps: int = option(1000, "T, the length of the diffusion.", min=1, max=10**6)
    condition_dropout: float = option(
        0.0, "Share of conditions left out in training, for classifier-free guidance.", CONDITIONS, min=0, below=1
    )
    guidance_scale: float | None = option(
        None, "Strength of that guidance, saved with the generator; by default 1, which is none.", min=0, when=GUIDED
    )
    clusters: int = option(
        50,
        "Data without conditions: so many clusters of latents stand for one, and are drawn as often as they come; 0 "
        "for none.",
        min=0,
        when=CLUSTERED,
    )
    regressed_networks: int | None = option(
        None,
        "Families only: networks for other conditions, by kernel ridge regression, to learn beside the snapshots. "
        "By default 1500 where tuning is on seen tasks alone, and others can be drawn, and else none. Of described "
        "tasks they are for what is between two descriptions.",
        min=0,
        when=FAMILY,
    )


@dataclass
class DenoiserSection:
    """Training of the denoiser (paper, Table 5d)."""

    denoiser_preset: str = common("mlp", "Widths.", choices=("paper", "small", "mlp"))
    denoiser_steps: int = common(1000, "Optimizer steps.", min=1)
    denoiser_batch_size: int = option(50, "Latents in a step.", min=1)
    denoiser_learning_rate: float = option(1e-3, "Peak rate, with cosine decay (the paper's widths: 1e-4).", above=0)
    prediction_type: str = option("v_prediction", "What is predicted.", choices=("epsilon", "v_prediction"))
    denoiser_args: DenoiserArgs = option(DenoiserArgs, "More settings.")


@dataclass
class TuneArgs:
    """More settings of tuning."""

    inference_steps: int = option(10, "Denoising steps, the last of which is trained through.", min=1, when=COMPARED)
    ensemble_size: int = option(1, "Networks that predict together; a divisor of tune_models.", TUNED & ONE_TASK, min=1)
    diversity: list[float] = option([0.0], "Weights of common errors; validation chooses.", TUNED & ONE_TASK, min=0)
    penalty: float = option(0.0, "Weight of the squared distance to untuned latents.", TUNED & ONE_TASK, min=0)
    map: bool = option(False, "Also train a linear map from latents to parameters, beside the decoder.", when=TUNED)
    condition_noise: float = option(0.0, "Standard deviations that conditions are moved by.", SEEN_TASKS, min=0)
    weight_loss: float = option(0.0, "Weight of the denoiser's own loss on snapshots, which is added.", TUNED, min=0)


@dataclass
class TuneSection:
    """Fine-tuning of the denoiser on the loss of the networks that it generates, for classifiers."""

    tune_steps: int | None = common(None, "Optimizer steps; by default 1200 for a family, else 0 for none.", min=0)
    tune_learning_rate: float = option(3e-4, "Peak learning rate, with cosine decay.", above=0, when=COMPARED)
    tune_models: int = option(32, "Networks in a step; for a family, each for its own task.", COMPARED, min=1)
    tune_batch_size: int = option(32, "Examples in a step, for a single task shared by all networks.", COMPARED, min=1)
    tune_tasks: str = option("fresh", "New tasks at every step, or seen ones alone.", FAMILY, choices=("fresh", "seen"))
    tune_args: TuneArgs = option(TuneArgs, "More settings.")


@dataclass
class EvaluateSection:
    """Generation and scoring."""

    num_models: int = common(200, "How many networks to generate; for a family, for each unseen task.", min=1)
    num_inference_steps: int | None = common(
        None, "Denoising steps, kept with the generator; by default 10, or its own.", min=1
    )
    temperature: float | None = option(
        None, "Spread of the starting noise, kept with the generator; by default 1, or its own.", min=0
    )
    baseline_models: int = common(20, "Networks of each baseline's setting, 0 for none.", ONE_TASK & NOT_DATA, min=0)
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
