"""Evaluates a generator, whether a pipeline of this library or networks that come from elsewhere."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from ..pipelines import PDiffPipeline
from ..utils.files import without_nan
from ..utils.memory import InParts
from ..utils.seeds import derive_seed
from .baselines import Baseline, BaselineContext, standard_baselines
from .figures import draw_figures
from .hyper_representations import sample_hyper_representations
from .measured import Measurer, evaluate_measured
from .metrics import accuracy, pca_r2_score
from .report import Group, evaluate, write_report
from .scoring import Scorer

NUM_TRAJECTORIES = 5  # the paper's figure 5b has as many
MAX_TRAJECTORY_STEPS = 20  # of a longer process so many are scored


def evaluate_generator(
    scorer: Scorer | Measurer,
    snapshots: torch.Tensor,
    generator: PDiffPipeline | torch.Tensor,
    folder: str | os.PathLike,
    *,
    heldout: torch.Tensor | None = None,
    num_models: int = 200,
    num_inference_steps: int = 20,
    baseline_models: int = 20,
    hyper_representations: bool = False,
    vae: torch.Tensor | None = None,
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    seed: int = 0,
) -> dict:
    """
    Compares generated networks with the snapshots and with trivial generators, and writes the report and its figures.

    Args:
        scorer (`Scorer` or `Measurer`): For the base model and its task.
        snapshots (`torch.Tensor`): Shape `(K, D)`, K at least 2.
        generator (`PDiffPipeline` or `torch.Tensor`): A pipeline to sample, or the parameters of generated networks,
            shape `(N, D)`. What needs latents (reconstructions, the kernel density, figures) needs a pipeline.
        folder (`str` or `os.PathLike`): Receives `report.json`, `report.md` and figures.
        heldout (`torch.Tensor`, *optional*): bool of shape `(K,)`: snapshots that no generator has seen. Baselines are
            not made from them either.
        num_models (`int`, *optional*, defaults to 200): Networks to sample from a pipeline.
        num_inference_steps (`int`, *optional*, defaults to 20): Denoising steps of a pipeline.
        baseline_models (`int`, *optional*, defaults to 20): Networks of each baseline setting; 0 for no baselines.
        hyper_representations (`bool`, *optional*, defaults to `False`): Whether to add groups of `num_models` networks
            each for S_KDE30, SANE_SUB and SANE_KDE30 (paper, Table 7), with the autoencoder of a pipeline.
        vae (`torch.Tensor`, *optional*): Parameters from a variational autoencoder, shape `(n, D)`, for a group `vae`.
        losses (`Mapping`, *optional*): For the figure of losses, see `draw_figures`.
        seed (`int`, *optional*, defaults to 0): Of sampling, baselines and bootstrap.

    Returns:
        `dict`: What `report.json` holds, see `report.evaluate` and `measured.evaluate_measured`; for a pipeline of
        classifiers also `reverse_process`: the accuracy of `NUM_TRAJECTORIES` networks (rows) decoded after so many
        `steps` (columns).

    Raises:
        ValueError: if the baselines or the scores would not fit into memory, or `hyper_representations` is asked for
            without a pipeline, or for other networks than classifiers.
    """
    pipeline = generator if isinstance(generator, PDiffPipeline) else None
    if hyper_representations and pipeline is None:
        raise ValueError("hyper_representations needs a pipeline, for its autoencoder; networks alone were given")
    if hyper_representations and isinstance(scorer, Measurer):
        raise ValueError("hyper_representations chooses networks by their accuracy, which only classifiers have")
    heldout = torch.zeros(len(snapshots), dtype=torch.bool) if heldout is None else heldout
    groups = [Group("original", snapshots), Group("ensemble", snapshots.mean(0, keepdim=True))]
    if pipeline is None:
        latents, generated = None, generator
    else:
        latents = {"original": encode(pipeline, snapshots)}
        reconstructed = pipeline.decode_latents(latents["original"])
        latents["reconstructed"] = encode(pipeline, reconstructed)
        latents["generated"] = pipeline(
            num_models,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(derive_seed(seed, 4)),
            output_type="latent",
        ).parameters
        generated = pipeline.decode_latents(latents["generated"])
        groups.append(Group("reconstructed", reconstructed))
    groups.append(Group("generated", generated))
    if vae is not None:
        groups.append(Group("vae", vae, family="VAE"))
    if baseline_models:
        context = BaselineContext(
            snapshots[~heldout],
            scorer.layout.sizes,
            latents=None if pipeline is None else latents["original"][~heldout],
            decode=None if pipeline is None else pipeline.decode_latents,
        )
        groups += sample_baselines(context, baseline_models, seed)
    if hyper_representations:
        seen = snapshots[~heldout]
        groups += sample_hyper_representations(scorer, seen, pipeline.autoencoder, num_models, seed)

    if isinstance(scorer, Measurer):
        report = evaluate_measured(scorer, groups, heldout)
    else:
        report = evaluate(scorer, groups, heldout, seed)
        if pipeline is not None:
            report |= {"reverse_process": reverse_process(scorer, pipeline, num_inference_steps, seed)}
    if pipeline is not None:
        latent_dim = pipeline.autoencoder.config.latent_dim
        seen = snapshots[~heldout] if heldout.any() else snapshots
        report["reconstruction"] |= {
            "linear_r2_train": pca_r2_score(seen, seen, latent_dim),
            "linear_r2_heldout": pca_r2_score(seen, snapshots[heldout], latent_dim) if heldout.any() else None,
        }
        report = without_nan(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_figures(
        report,
        folder,
        originals=snapshots,
        generated=generated,
        tensor_sizes=scorer.layout.sizes,
        latents=latents,
        losses=losses,
    )
    write_report(report, folder)
    return report


@torch.no_grad()
def encode(pipeline: PDiffPipeline, parameters: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Parameters of shape `(N, D)` to latents of shape `(N, L)`, on the CPU."""
    autoencoder, in_parts = pipeline.autoencoder, InParts("networks")

    def encode_rows(rows: torch.Tensor) -> torch.Tensor:
        return autoencoder.encode(rows.to(autoencoder.device)).latents.cpu()

    return torch.cat([in_parts(encode_rows, batch) for batch in parameters.split(batch_size)])


def sample_baselines(context: BaselineContext, num_models: int, seed: int) -> list[Group]:
    """
    `num_models` networks of every standard baseline that `context` supports.

    Raises:
        ValueError: if they would take more than half of the free memory.
    """
    baselines = [baseline for baseline in standard_baselines() if baseline.supports(context)]
    needed = 4 * len(baselines) * num_models * context.snapshots.shape[1]
    free = psutil.virtual_memory().available
    if needed > free / 2:
        raise ValueError(
            f"{num_models} networks of {len(baselines)} baselines need {needed:,} bytes, more than half of the "
            f"{free:,} bytes of free memory; use --baseline_models {num_models * free // 2 // needed} at most"
        )

    def sample(baseline: Baseline) -> torch.Tensor:
        # The seed follows from the name, so that a new baseline leaves the networks (and scores) of the others alone.
        generator = torch.Generator().manual_seed(derive_seed(seed, *baseline.name.encode()))
        return baseline.sample(context, num_models, generator)

    return [Group(baseline.name, sample(baseline), baseline.family, baseline.value) for baseline in baselines]


def reverse_process(scorer: Scorer, pipeline: PDiffPipeline, num_inference_steps: int, seed: int) -> dict:
    """
    Test accuracy of the networks that the noisy latents of several samples decode to along the way, in one pass over
    the data (paper, figure 5b).
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, *b"trajectories"))
    noise = torch.randn(NUM_TRAJECTORIES, pipeline.denoiser.config.latent_dim, generator=generator)
    along = [noise * pipeline.scheduler.init_noise_sigma]

    def keep(pipe, step, timestep, tensors):
        along.append(tensors["latents"].cpu())
        return tensors

    pipeline(
        NUM_TRAJECTORIES,
        num_inference_steps=num_inference_steps,
        generator=generator,
        latents=noise,
        output_type="latent",
        callback_on_step_end=keep,
    )
    last = len(along) - 1
    steps = torch.linspace(0, last, min(last, MAX_TRAJECTORY_STEPS) + 1).round().int().tolist()
    parameters = pipeline.decode_latents(torch.cat([along[step] for step in steps]))  # (S x seeds, D)
    scores = scorer.score("test", parameters)
    accuracies = accuracy(scores.predictions, scores.labels).view(-1, NUM_TRAJECTORIES).T  # (seeds, S)
    return without_nan({"steps": steps, "accuracy": accuracies.tolist()})
