"""The report on networks for a single task."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.products import AdapterProducts, contracted, expanded
from ..pipelines import PDiffPipeline
from ..training.ensembles import Tuning
from ..utils.files import without_nan
from ..utils.reports import TEST
from .baselines import BaselineContext
from .compare import BETTER, WORSE, Bootstrap, Sample
from .finish import finish, sampling_of, save_report
from .geometry import Rows, Yardstick, mean_of
from .groups import (
    Cost,
    Group,
    Kind,
    Reconstruction,
    decode,
    encode,
    named_generator,
    reconstruct,
    reverse_process,
    room_for,
    sample_baselines,
    supported_baselines,
)
from .memorisation import find_copies
from .metrics import METRICS, GroupEvidence, ensemble_metrics, max_iou, nearest_in_predictions
from .report import GroupRow, Report
from .score import CHUNK_BYTES, ClassifierScores, Scorer, Scores
from .tuned_baselines import TunedBaselines
from .verdict import break_even

logger = logging.getLogger(__name__)

MORE_STEPS = 5  # times as many denoising steps are tried where generated networks are worse than snapshots
MORE_STEPS_MODELS = 20
# Those of the generator's own curve, with all baselines.
TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
CURVE = "generated at other temperatures"
MEAN = "mean of the snapshots"


def evaluate_task(
    scorer: Scorer,
    snapshots: Tensor,
    generator: PDiffPipeline | Tensor,
    folder: str | os.PathLike,
    *,
    heldout: Tensor | None = None,
    num_models: int = 200,
    score_models: int | None = None,
    tuning: Tuning | None = None,
    untuned: PDiffPipeline | None = None,
    baseline_models: int = 20,
    baselines: str = "all",
    extra_groups: Iterable[Group] = (),
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    latents: Tensor | None = None,
    settings: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    seed: int = 0,
) -> Report:
    """
    The report on networks for one task, which is written to `folder` with its figures.

    Args:
        scorer (`Scorer`): For the base model and its task, from `make_scorer`.
        snapshots (`torch.Tensor`): Shape `(K, D)`, K at least 2; may lie in a file, and is not copied.
        generator (`PDiffPipeline` or `torch.Tensor`): A pipeline, sampled as its config says, or the parameters of
            generated networks, shape `(N, D)`. What needs latents (reconstructions, kernel density) needs a pipeline.
        folder (`str` or `os.PathLike`): Receives the report and its figures.
        heldout (`torch.Tensor`, *optional*): bool of shape `(K,)`: snapshots that no generator has seen. Baselines are
            not made from them either.
        num_models (`int`, *optional*, defaults to 200): Networks to sample from a pipeline.
        score_models (`int`, *optional*): Compare no more than so many of the generated networks, drawn at random.
        tuning (`Tuning`, *optional*): How a pipeline was tuned; opponents with the same feedback are added.
        untuned (`PDiffPipeline`, *optional*): The generator before it was tuned.
        baseline_models (`int`, *optional*, defaults to 20): Networks of each baseline setting; 0 for no baselines.
        baselines (`str`, *optional*, defaults to `"all"`): Or `few`, one setting of each sweep.
        extra_groups (`Iterable[Group]`, *optional*): Further groups, each made when it is asked for.
        losses (`Mapping`, *optional*): The loss at every step, by panel and curve, for a figure.
        latents (`torch.Tensor`, *optional*): Shape `(K, L)`, the snapshots' latents if they are known already.
        settings (`Mapping`, *optional*): To be kept in the report.
        warnings (`Sequence[str]`, *optional*): What else a reader has to know.
        seed (`int`, *optional*, defaults to 0): Of sampling, baselines and bootstrap.

    Raises:
        ValueError: if the networks of a baseline would not fit on the disk, or the scores into memory.
    """
    pipeline = generator if isinstance(generator, PDiffPipeline) else None
    folder = Path(folder)
    heldout = torch.zeros(len(snapshots), dtype=torch.bool) if heldout is None else heldout
    products = None if pipeline is None else pipeline.autoencoder.products
    vectors = expanded(snapshots, products)
    seen = Rows(vectors, ~heldout)
    if pipeline is not None and latents is None:
        latents = encode(pipeline, snapshots)
    context = BaselineContext(
        seen,
        scorer.layout.sizes if products is None else products.layout.sizes,
        latents=None if latents is None else latents[~heldout],
        decode=None if pipeline is None else lambda latents: expanded(decode(pipeline, latents, folder), products),
        room=lambda count, length: room_for(count, length, folder),
    )
    num_generated = len(generator) if isinstance(generator, Tensor) else num_models
    num_scored = min(num_generated, score_models or num_generated)
    trivial: list[Iterable[Group]] = []
    in_tuned = 0
    if baseline_models:
        plain = sample_baselines(context, baseline_models, seed, baselines, folder)
        trivial.append(dataclasses.replace(one, networks=contracted(one.networks, products)) for one in plain)
        if pipeline is not None and tuning is not None:
            assert latents is not None
            tuned = TunedBaselines(
                scorer, pipeline.autoencoder, seen, latents[~heldout], tuning, baseline_models, baselines, seed
            )
            trivial.append(tuned.groups())
            in_tuned = tuned.count
        if pipeline is not None and baselines == "all":
            trivial.append(_sample_temperatures(pipeline, baseline_models, folder, seed))
    chosen = torch.randperm(num_generated, generator=named_generator(seed, "score_models"))[:num_scored].sort().values
    figures: dict[str, Tensor] | None = None
    reconstruction = None
    if isinstance(generator, Tensor):
        generated = generator if num_scored == num_generated else generator[chosen]
    else:
        assert latents is not None
        figures = {"snapshots": latents, "generated": _sample_latents(generator, num_models, seed)[chosen]}
    folder.mkdir(parents=True, exist_ok=True)  # nothing before this has left anything behind
    in_baselines = baseline_models * len(supported_baselines(context, baselines))
    _announce(scorer, 2 * len(snapshots) + 1 + num_scored + in_baselines + in_tuned)
    if pipeline is not None and figures is not None:
        generated = decode(pipeline, figures["generated"], folder)
        reconstruction = reconstruct(pipeline, snapshots, figures["snapshots"], heldout, folder)

    def groups() -> Iterator[Group]:
        yield Group("snapshots", snapshots, Kind.SNAPSHOTS)
        yield Group(MEAN, contracted(mean_of(vectors).float()[None], products), sweep="mean")
        if reconstruction is not None:
            yield Group("reconstructed", reconstruction.parameters, Kind.CONTROL)
        cost = None if tuning is None else Cost(tuning.passes)
        yield Group("generated", generated, Kind.GENERATED, cost=cost)
        if untuned is not None:
            before = decode(untuned, _sample_latents(untuned, num_models, seed)[chosen], folder)
            yield Group("generator by weights", before, Kind.VARIANT, cost=Cost())
        for more in (*trivial, extra_groups):
            yield from more

    report = compare_groups(scorer, groups(), reconstruction, seed, products)
    report.num_generated, report.settings = num_generated, dict(settings or {})
    if pipeline is not None:
        report.sampling = sampling_of(pipeline)
        if tuning is not None:
            report.tuning = tuning.to_dict() | {"break_even": break_even(report)}
        if scorer.classifies:
            report.reverse_process = reverse_process(lambda p: scorer.score(TEST, p).values, pipeline, folder, seed)
        if report.group("snapshots").verdict == WORSE:
            report.more_steps = _try_more_steps(scorer, pipeline, folder, seed)
    finish(report)
    report.warnings = [*warnings, *report.warnings]
    sizes = scorer.layout.sizes
    save_report(report, folder, losses, snapshots=snapshots, generated=generated, tensor_sizes=sizes, latents=figures)
    return report


def compare_groups(
    scorer: Scorer,
    groups: Iterable[Group],
    reconstruction: Reconstruction | None = None,
    seed: int = 0,
    products: AdapterProducts | None = None,
) -> Report:
    """
    Scores groups of networks on the validation and the test split, and compares the generated one with the others.

    Args:
        scorer (`Scorer`): For the base model and its task.
        groups (`Iterable[Group]`): Snapshots first; made and let go one after the other.
        reconstruction (`Reconstruction`, *optional*): Of the group `reconstructed`.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        products (`AdapterProducts`, *optional*): Distances are between these, where they are given.

    Returns:
        `Report`: Its numbers, which may be nan; without words.
    """
    scored = _scored(scorer, groups)
    first = next(scored)
    table = _Table(scorer, products, *first)
    for group, validation, test in scored:
        table.add(group, validation, test)
    noise = named_generator(seed, "bootstrap")
    bootstrap = Bootstrap(table.num_units, scorer.metric.sign, noise, table.wrong_snapshots)
    report = Report(
        scorer.metric,
        scorer.layout.num_parameters,
        table.rows,
        splits={split: scorer.num_examples(split) for split in ("validation", "test")},
    )
    places = {row.name: bootstrap.place(table.samples[row.name]) for row in table.rows}
    own = places[report.generated.name]
    for row in table.rows:
        place = places[row.name]
        row.measures |= {"score_interval": place["score_interval"], "max_iou_interval": place["max_iou_interval"]}
        if row.kind in (Kind.SNAPSHOTS, Kind.BASELINE, Kind.OPPONENT, Kind.ORACLE):
            row.comparisons = {TEST: bootstrap.compare(own, place, row.kind != Kind.SNAPSHOTS)}
    if reconstruction is not None:
        same = table.samples["snapshots"].values[reconstruction.rows]
        lost = table.samples["reconstructed"].values.nanmean() - same.nanmean()
        report.reconstruction = reconstruction.explained | {"score_difference": lost.item()}
    for row in report.of_kind(Kind.VARIANT):
        if row.sweep == CURVE:
            report.temperatures.append(_place_on_curve(row, places, report, bootstrap))
    return report


def _place_on_curve(row: GroupRow, places: Mapping[str, Any], report: Report, bootstrap: Bootstrap) -> dict[str, Any]:
    """The generator at one temperature, and how many plain and tuned settings of others it is better than."""
    counts = {}
    for name, kind in (("plain", Kind.BASELINE), ("tuned", Kind.OPPONENT)):
        found = [bootstrap.compare(places[row.name], places[other.name], True) for other in report.of_kind(kind)]
        counts[name] = {word: sum(one.verdict == word for one in found) for word in (BETTER, WORSE)}
        counts[name]["too close to call"] = len(found) - sum(counts[name].values())
    measures = {"score": row.measures["score_mean"], "max_iou": row.measures.get("max_iou")}
    return {"value": row.value, "num_models": row.n} | measures | counts


class _Table:
    """What is kept of every group, and what all groups are compared with: the snapshots, the first of them."""

    def __init__(
        self, scorer: Scorer, products: AdapterProducts | None, snapshots: Group, validation: Tensor, test: Scores
    ):
        self.metric, self.products = scorer.metric, products
        self.rows: list[GroupRow] = []
        self.samples: dict[str, Sample] = {}
        self.yardstick = Yardstick(expanded(snapshots.networks, products))
        self.wrong_snapshots = self.snapshots_iou = None
        self.num_units = 0
        if isinstance(test, ClassifierScores):
            self.wrong_snapshots, self.num_units = test.wrong, test.wrong.shape[1]
            self.snapshots_iou = max_iou(test.wrong, test.wrong, exclude_self=True)
        self.add(snapshots, validation, test)

    def add(self, group: Group, validation: Tensor, test: Scores) -> None:
        own = not self.rows
        place = self.yardstick.place(None if own else expanded(group.networks, self.products))
        wrong = similarity = None
        if isinstance(test, ClassifierScores) and self.wrong_snapshots is not None:
            wrong = test.wrong
            similarity = nearest_in_predictions(wrong, self.wrong_snapshots, own)
        copies = find_copies(place, self.yardstick.nearest, similarity, self.snapshots_iou)
        iou = torch.empty(0) if similarity is None else similarity[0]
        evidence = GroupEvidence(test.values, validation, self.metric.sign, test, iou, place)
        is_classifier = isinstance(test, ClassifierScores)
        row = GroupRow(
            group.name,
            group.kind,
            group.sweep,
            group.value,
            n=len(test.values),
            num_undefined=int(test.undefined.sum()),
            cost=group.cost,
            note=group.note,
            tried=dict(group.tried or {}),
            sets={TEST: {"scores": [without_nan(test.values.tolist())]}},
            measures={m.key: m.function(evidence) for m in METRICS if is_classifier or not m.classifiers_only},
            ensembles=ensemble_metrics(test.log_probs, test.labels) if isinstance(test, ClassifierScores) else [],
            memorisation=dataclasses.asdict(copies) | {"copies": copies.copies},
        )
        self.rows.append(row)
        self.samples[group.name] = Sample(test.values, wrong)


def _scored(scorer: Scorer, groups: Iterable[Group]) -> Iterator[tuple[Group, Tensor, Scores]]:
    """Each group with its metric on validation data and its scores on test data; as many groups as fit go together,
    because every pass over the data computes the frozen part of the network anew."""

    def flush(batch: list[Group]) -> Iterator[tuple[Group, Tensor, Scores]]:
        vectors = [row for group in batch for row in group.networks]
        validation = scorer.score("validation", vectors).values
        test = scorer.score("test", vectors)
        start = 0
        for group in batch:
            part = slice(start, start + len(group.networks))
            start = part.stop
            yield group, validation[part], test[part]

    most = min(scorer.chunk_size, CHUNK_BYTES // (4 * scorer.layout.num_parameters))
    batch: list[Group] = []
    for group in groups:
        if batch and sum(len(g.networks) for g in [*batch, group]) > most:
            yield from flush(batch)
            batch = []
        batch.append(group)
    yield from flush(batch)


def _announce(scorer: Scorer, num_networks: int) -> None:
    seconds = scorer.estimate(num_networks)
    units = ((7200, 3600, "h"), (120, 60, "min"), (0, 1, "s"))
    time = next(f"{seconds / size:.0f} {unit}" for least, size, unit in units if seconds >= least)
    logger.info(
        "scoring: about %s for up to %s networks, less those that were scored before%s",
        time,
        f"{num_networks:,}",
        "; --num_models and --baseline_models take fewer" if seconds > 600 else "",
    )


def _sample_latents(pipeline: PDiffPipeline, num_models: int, seed: int, **changes: Any) -> Tensor:
    """Latents of the networks that a report is about, shape `(num_models, L)`."""
    noise = named_generator(seed, "generated")
    (latents,) = pipeline(num_models, generator=noise, output_type="latent", return_dict=False, **changes)
    return latents


def _sample_temperatures(pipeline: PDiffPipeline, num_models: int, folder: Path, seed: int) -> Iterator[Group]:
    """The generator at other temperatures, from the noise that its own group has."""
    for value in TEMPERATURES:
        if value != pipeline.config.temperature:
            latents = _sample_latents(pipeline, num_models, seed, temperature=value)
            yield Group(f"generated {value}", decode(pipeline, latents, folder), Kind.VARIANT, CURVE, value)


def _try_more_steps(scorer: Scorer, pipeline: PDiffPipeline, folder: Path, seed: int) -> dict:
    """The score of some networks that were sampled in more denoising steps."""
    steps = min(MORE_STEPS * pipeline.config.num_inference_steps, pipeline.scheduler.config.num_train_timesteps)
    latents = _sample_latents(pipeline, MORE_STEPS_MODELS, seed, num_inference_steps=steps)
    values = scorer.score("test", decode(pipeline, latents, folder)).values
    return {"num_inference_steps": steps, "n": len(values), "score_mean": values.nanmean().item()}
