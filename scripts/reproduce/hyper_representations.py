"""The generators that the paper compares with in its Table 7: hyper-representations and SANE.

- S_KDE30 (Schürholt et al., "Hyper-Representations as Generative Models", 2022, arXiv 2209.14733): a kernel density
  over the latents of the best 30% of the models, for each latent coordinate on its own, and the decoder.
- SANE_KDE30 (Schürholt et al., "Towards Scalable and Versatile Weight Space Learning", 2024, arXiv 2406.09997): the
  same over codes of pieces of the network, its tokens, with one kernel density for all coordinates of a token.
- SANE_SUB (as above): candidates from such a density around a few models, its prompts, of which those are kept that do
  best on validation data. It is not iterated; that is another of their samplers.

Sources are what the authors released: `sample` in `ghrp/sampling_auxiliaries/sample_finetune_auxiliaries.py` of
github.com/HSG-AIML/NeurIPS_2022-Generative_Hyper_Representations, and `sample_models` and `subsample_model_evaluation`
in `SANE/sampling/` of github.com/HSG-AIML/SANE. From these are the Gaussian kernels, their bandwidths, what one density
is for, the rule for the best 30%, and that SANE_SUB draws five candidates for each that it keeps, by their validation
accuracy. What differs here:

- The models are snapshots of one run, as p-diff has them, not a zoo that was trained from many initialisations.
- Encoder and decoder are this library's. The latents of S_KDE30 are those that the denoiser is trained on. The codes of
  a token are the principal components that the autoencoder sees of it, and are decoded exactly: no transformer of their
  own is trained for either.
- A bandwidth is in standard deviations of each coordinate over the models that the density is made from, where theirs
  is absolute in units of their latents, which have no counterpart here.
- Coordinates (S_KDE30) and tokens (SANE) are drawn independently of each other, as a density of each for itself says.
  The released code seeds every one of these draws alike, with which scikit-learn picks the same model and the same
  noise for all of them: what it returns are single models of the zoo plus noise.
- The best are found on validation data. S_KDE30 takes accuracies on test data, which would favour it in a report.
- The prompts of SANE_SUB are the best five snapshots. The released example takes a whole data set of models; with all
  snapshots as prompts its networks were less accurate here.
- Running statistics of batch norm are those of the base model, as for every group of a report; SANE recomputes them.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import psutil
import torch
from torch import Generator, Tensor

from pdiff_hf.evaluation.baselines import latent_kde
from pdiff_hf.evaluation.geometry import Matrix
from pdiff_hf.evaluation.groups import Group, named_generator
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.models import ParameterAutoencoder
from pdiff_hf.utils.memory import InParts

FAMILY = "hyper-representations"
NAMES = ("S_KDE30", "SANE_SUB", "SANE_KDE30")
BEST = 0.3  # share of the models
GLOBAL_BANDWIDTH = 0.002
TOKEN_BANDWIDTH = 0.2
NUM_CANDIDATES = 5  # of SANE_SUB, for each network that is kept
NUM_PROMPTS = 5
BATCH_SIZE, BATCH_NUMBERS = 64, 2**26  # networks that are encoded or decoded at once, and parameters of them all


def s_kde30(
    snapshots: Matrix,
    scores: Tensor,
    autoencoder: ParameterAutoencoder,
    num_models: int,
    generator: Generator,
    bandwidth: float = GLOBAL_BANDWIDTH,
) -> Tensor:
    """
    Decoded samples of a Gaussian kernel density for each latent coordinate of the best 30% of the snapshots.

    Args:
        snapshots (`torch.Tensor` or `Rows`): Shape `(K, D)`, K at least 2.
        scores (`torch.Tensor`): Shape `(K,)`, on validation data, larger being better.
        autoencoder (`ParameterAutoencoder`): On the device to compute on.
        num_models (`int`): n.
        generator (`torch.Generator`): Source of randomness, on the CPU.
        bandwidth (`float`, *optional*, defaults to 0.002): Of the kernel, in standard deviations of each coordinate.

    Returns:
        `torch.Tensor`: Shape `(n, D)`, on the CPU.

    Raises:
        ValueError: if there are fewer than 2 snapshots, or not as many scores as snapshots.
    """
    best = best_snapshots(snapshots, scores)
    latents = _apply(lambda rows: autoencoder.encode(rows).latents, snapshots, best, autoencoder)
    drawn = [latent_kde(column, num_models, bandwidth, generator) for column in latents.split(1, dim=1)]
    indices = torch.arange(num_models)
    return _apply(lambda rows: autoencoder.decode(rows).sample, torch.cat(drawn, dim=1), indices, autoencoder)


def sane_kde30(
    snapshots: Matrix,
    scores: Tensor,
    autoencoder: ParameterAutoencoder,
    num_models: int,
    generator: Generator,
    bandwidth: float = TOKEN_BANDWIDTH,
) -> Tensor:
    """
    Decoded samples of a Gaussian kernel density for each token of the best 30% of the snapshots.

    An autoencoder without tokens (`token_size=None`) sees every parameter by itself: each is a token then.

    Arguments, result and errors are those of [`s_kde30`]; `bandwidth` is in standard deviations of each coordinate of a
    token's code, 0.2 by default.
    """
    codes = _apply(autoencoder.tokenize, snapshots, best_snapshots(snapshots, scores), autoencoder)
    return _decode(_sample_tokens(codes, num_models, bandwidth, generator), autoencoder)


def sane_sub(
    snapshots: Matrix,
    scores: Tensor,
    autoencoder: ParameterAutoencoder,
    num_models: int,
    generator: Generator,
    score: Callable[[Tensor], Tensor],
    num_prompts: int = NUM_PROMPTS,
    num_candidates: int = NUM_CANDIDATES,
    bandwidth: float = TOKEN_BANDWIDTH,
) -> Tensor:
    """
    The best of candidates from a Gaussian kernel density for each token of the best few snapshots, the prompts.

    Arguments, result and errors are those of [`sane_kde30`], and:

    Args:
        score (`Callable`): From parameters, shape `(n, D)`, to scores on validation data, shape `(n,)`.
        num_prompts (`int`, *optional*, defaults to 5): How many of the best snapshots the density is made from.
        num_candidates (`int`, *optional*, defaults to 5): Candidates for each of the `num_models` that are kept.

    Returns:
        `torch.Tensor`: Shape `(n, D)`, the best first; equally good ones in the order in which they were drawn.
    """
    _check(snapshots, scores)
    if num_prompts < 2 or num_candidates < 1:
        raise ValueError(
            f"`num_prompts` must be at least 2 and `num_candidates` at least 1, got {num_prompts} and {num_candidates}"
        )
    prompts = scores.argsort(descending=True, stable=True)[:num_prompts]
    codes = _apply(autoencoder.tokenize, snapshots, prompts, autoencoder)
    candidates = _sample_tokens(codes, num_models * num_candidates, bandwidth, generator)
    # As many at once as are kept: all candidates may be more than fits into memory, where their codes do.
    of_candidates = torch.cat([score(_decode(part, autoencoder)) for part in candidates.split(num_models)])
    kept = of_candidates.argsort(descending=True, stable=True)[:num_models]
    return _decode(candidates[kept], autoencoder)


def sample_hyper_representations(
    scorer: Scorer, snapshots: Matrix, autoencoder: ParameterAutoencoder, num_models: int, seed: int
) -> Iterator[Group]:
    """
    `num_models` networks of each of the three, as groups of a report, one after the other.

    Args:
        scorer (`Scorer`): Its validation scores choose among the snapshots and among candidates.
        snapshots (`torch.Tensor` or `Rows`): Shape `(K, D)`, those that generators see.
        autoencoder (`ParameterAutoencoder`): Of the generator that they are compared with.
        num_models (`int`): Networks of each.
        seed (`int`): Of the run.

    Raises:
        ValueError: if those of one would take more than half of the free memory.
    """
    needed, free = 4 * num_models * snapshots.shape[1], psutil.virtual_memory().available
    if needed > free / 2:
        raise ValueError(
            f"{num_models} networks of each of {', '.join(NAMES)} need {needed:,} bytes, more than half of the "
            f"{free:,} bytes of free memory; use --num_models {num_models * free // 2 // needed} at most"
        )

    def score(parameters: Matrix) -> Tensor:
        values = scorer.metric.sign * scorer.score("validation", parameters).values
        return values.nan_to_num(nan=-math.inf)

    def groups() -> Iterator[Group]:
        scores = score(snapshots)
        samplers: tuple[Callable[..., Tensor], ...] = (s_kde30, partial(sane_sub, score=score), sane_kde30)
        for name, sample in zip(NAMES, samplers, strict=True):
            sampled = sample(snapshots, scores, autoencoder, num_models, named_generator(seed, name))
            yield Group(name, sampled, sweep=FAMILY, value=name)

    return groups()


def best_snapshots(snapshots: Matrix, scores: Tensor) -> Tensor:
    """
    Indices of the snapshots at or above the 70% quantile of their scores, with all that tie there; at least 2, because
    one has no spread that a kernel's width could be a part of.
    """
    _check(snapshots, scores)
    # Not interpolated: networks without a score have one that is infinitely bad.
    threshold = torch.minimum(scores.quantile(1 - BEST, interpolation="higher"), scores.topk(2).values[-1])
    return (scores >= threshold).nonzero().flatten()


def _sample_tokens(codes: Tensor, num_models: int, bandwidth: float, generator: Generator) -> Tensor:
    """Codes of shape `(K, C, S)` to new ones, `(n, C, S)`: tokens independently, the C coordinates of one together."""
    return torch.stack([latent_kde(code, num_models, bandwidth, generator) for code in codes.unbind(2)], dim=2)


@torch.no_grad()
def _apply(
    function: Callable[[Tensor], Tensor], rows: Matrix, indices: Tensor, autoencoder: ParameterAutoencoder
) -> Tensor:
    """A function of the autoencoder, of some rows, on its device and as many at once as its memory holds."""
    in_parts = InParts("networks")
    size = max(1, min(BATCH_SIZE, BATCH_NUMBERS // autoencoder.layout.num_parameters))

    def on_device(part: Tensor) -> Tensor:
        return function(part.to(autoencoder.device)).cpu()

    return torch.cat([in_parts(on_device, rows[part]) for part in indices.split(size)])


def _decode(codes: Tensor, autoencoder: ParameterAutoencoder) -> Tensor:
    """Codes of tokens to parameters, shape `(n, D)`."""
    return _apply(autoencoder.detokenize, codes, torch.arange(len(codes)), autoencoder)


def _check(snapshots: Matrix, scores: Tensor) -> None:
    if len(snapshots.shape) != 2 or len(snapshots) < 2 or scores.shape != snapshots.shape[:1]:
        raise ValueError(
            "needs a matrix of at least 2 snapshots and a score for each, got shapes "
            f"{tuple(snapshots.shape)} and {tuple(scores.shape)}"
        )
