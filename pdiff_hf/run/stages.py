"""The table of stages."""

from ..utils import names
from .collecting import collect, train_base
from .config import (
    AutoencoderSection,
    BaseSection,
    CollectSection,
    DenoiserSection,
    EvaluateSection,
    FamilySection,
    TaskSection,
    TuneSection,
)
from .context import Stage
from .evaluating import evaluate
from .learning import fit_autoencoder, fit_denoiser
from .tuning import tune_denoiser

# In the order in which they are executed.
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "base",
            names.BASE_MODEL,
            (),
            (TaskSection, FamilySection, BaseSection),
            "the base model, {base_epochs} epochs of training",
            train_base,
        ),
        Stage(
            "collect",
            names.SNAPSHOTS,
            ("base",),
            (CollectSection,),
            "{num_snapshots} snapshots",
            collect,
            "{num_snapshots} snapshots of networks for {num_tasks} tasks",
        ),
        Stage(
            "autoencoder",
            names.AUTOENCODER,
            ("collect",),
            (AutoencoderSection,),
            "{autoencoder_steps} steps, to latents of {latent_dim}",
            fit_autoencoder,
        ),
        Stage(
            "denoiser",
            names.PIPELINE,
            ("autoencoder",),
            (DenoiserSection,),
            "{denoiser_steps} steps, on the latents",
            fit_denoiser,
        ),
        Stage(
            "tune",
            names.TUNED,
            ("denoiser",),
            (TuneSection,),
            "{tune_steps} steps on the loss of generated networks",
            tune_denoiser,
            is_wanted=lambda config: bool(config.num_tune_steps),
        ),
        Stage(
            "evaluate",
            names.EVALUATION,
            ("denoiser", "tune"),
            (EvaluateSection,),
            "{num_models} generated networks, and {baseline_models} of each baseline",
            evaluate,
            "{num_models} generated networks for each of {num_test_tasks} unseen tasks, and other answers",
        ),
    )
}
