"""The table of stages."""

from ..training import make_sampling_scheduler  # noqa: F401  scripts that were written for version 0.2 import it from here
from ..utils import names
from . import settings
from .collecting import collect, train_base
from .evaluating import write_report
from .folder import Stage
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
            (settings.TaskSection, settings.FamilySection, settings.BaseSection),
            "the base model, {base_epochs} epochs of training",
            train_base,
        ),
        Stage(
            "collect",
            names.SNAPSHOTS,
            ("base",),
            (settings.CollectSection,),
            "{num_snapshots} snapshots",
            collect,
            "{num_snapshots} snapshots of networks for {num_tasks} tasks",
        ),
        Stage(
            "autoencoder",
            names.AUTOENCODER,
            ("collect",),
            (settings.AutoencoderSection,),
            "{autoencoder_steps} steps, to latents of {latent_dim}",
            fit_autoencoder,
        ),
        Stage(
            "denoiser",
            names.PIPELINE,
            ("autoencoder",),
            (settings.DenoiserSection,),
            "{denoiser_steps} steps, on the latents",
            fit_denoiser,
        ),
        Stage(
            "tune",
            names.TUNED,
            ("denoiser",),
            (settings.TuneSection,),
            "{tune_steps} steps on the loss of generated networks",
            tune_denoiser,
            is_wanted=lambda config: bool(config.num_tune_steps),
        ),
        Stage(
            "evaluate",
            names.EVALUATION,
            ("denoiser", "tune"),
            (settings.EvaluateSection,),
            "{num_models} generated networks, and {baseline_models} of each baseline",
            write_report,
            "{num_models} generated networks for each of {num_test_tasks} unseen tasks, and other answers",
        ),
    )
}
