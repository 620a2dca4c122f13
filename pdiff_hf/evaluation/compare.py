"""Compares generated networks with the snapshots and with trivial generators: groups of networks to one report."""

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
from ..utils.files import replacing, without_nan, write_json
from ..utils.reports import REPORT_VERSION
from .audit import AuditRow, audit_group, audit_verdict
from .baselines import BaselineContext
from .figures import draw_figures
from .frontier import VERDICTS, Bootstrap, FrontierGroup, FrontierRow, frontier_sentence
from .geometry import Rows, Yardstick, mean_of
from .metrics import METRICS, Evidence, ensemble_metrics, max_iou, nearest_in_predictions
from .render import CURVE, format_report, summarise
from .sampling import (
    Group,
    Passes,
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
from .scores import ClassifierScores, Metric, Scores
from .scoring import CHUNK_BYTES, Scorer
from .tuned_baselines import TunedBaselines
from .verdict import break_even, find_warnings, write_verdict

logger = logging.getLogger(__name__)

MORE_STEPS = 5  # times as many denoising steps are tried where generated networks are worse than snapshots
MORE_STEPS_MODELS = 20
# Those of the generator's own curve, with all baselines.
TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def compare_generator(
    scorer: Scorer,
    snapshots: Tensor,
    generator: PDiffPipeline | Tensor,
    folder: str | os.PathLike,
    *,
    heldout: Tensor | None = None,
    num_models: int = 200,
    score_models: int | None = None,
    tuning: Tuning | None = None,
    baseline_models: int = 20,
    baselines: str = "all",
    extra_groups: Iterable[Group] = (),
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    latents: Tensor | None = None,
    seed: int = 0,
) -> dict:
    """
    Compares generated networks with the snapshots and with trivial generators, and writes the report and its figures.

    Args:
        scorer (`Scorer`): For the base model and its task, from `scoring.make_scorer`.
        snapshots (`torch.Tensor`): Shape `(K, D)`, K at least 2; may lie in a file, and is not copied.
        generator (`PDiffPipeline` or `torch.Tensor`): A pipeline, sampled as its config says, or the parameters of
            generated networks, shape `(N, D)`. What needs latents (reconstructions, kernel density) needs a pipeline.
        folder (`str` or `os.PathLike`): Receives `report.json`, `report.md` and figures.
        heldout (`torch.Tensor`, *optional*): bool of shape `(K,)`: snapshots that no generator has seen. Baselines are
            not made from them either.
        num_models (`int`, *optional*, defaults to 200): Networks to sample from a pipeline.
        score_models (`int`, *optional*): Compare no more than so many of the generated networks, drawn at random.
        tuning (`Tuning`, *optional*): How a pipeline was tuned; trivial generators with the same feedback are added.
        baseline_models (`int`, *optional*, defaults to 20): Networks of each baseline setting; 0 for no baselines.
        baselines (`str`, *optional*, defaults to `"all"`): Or `few`, one setting of each family.
        extra_groups (`Iterable[Group]`, *optional*): Further groups, each made when it is asked for.
        losses (`Mapping`, *optional*): For the figure of losses, see `draw_figures`.
        latents (`torch.Tensor`, *optional*): Shape `(K, L)`, the snapshots' latents if they are known already.
        seed (`int`, *optional*, defaults to 0): Of sampling, baselines and bootstrap.

    Returns:
        `dict`: What `report.json` holds, see `report_schema.json`.

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
    families: list[Iterator[Group]] = []
    in_tuned = 0
    if baseline_models:
        trivial = sample_baselines(context, baseline_models, seed, baselines, folder)
        families.append(
            dataclasses.replace(group, parameters=contracted(group.parameters, products)) for group in trivial
        )
        if pipeline is not None and tuning is not None:
            assert latents is not None
            tuned = TunedBaselines(
                scorer, pipeline.autoencoder, seen, latents[~heldout], tuning, baseline_models, baselines, seed
            )
            families.append(tuned.groups())
            in_tuned = tuned.count
        if pipeline is not None and baselines == "all":
            families.append(_sample_temperatures(pipeline, baseline_models, folder, seed))
    chosen = torch.randperm(num_generated, generator=named_generator(seed, "score_models"))[:num_scored].sort().values
    figures: dict[str, Tensor] | None = None
    reconstruction = None
    if isinstance(generator, Tensor):
        generated = generator if num_scored == num_generated else generator[chosen]
    else:
        assert latents is not None
        (generated_latents,) = generator(
            num_models,
            generator=named_generator(seed, "generated"),
            output_type="latent",
            return_dict=False,
        )
        generated_latents = generated_latents[chosen]
        figures = {"snapshots": latents, "generated": generated_latents}
    folder.mkdir(parents=True, exist_ok=True)  # nothing before this has left anything behind
    in_baselines = baseline_models * len(supported_baselines(context, baselines))
    _announce(scorer, 2 * len(snapshots) + 1 + num_scored + in_baselines + in_tuned)
    if isinstance(generator, PDiffPipeline) and latents is not None:
        generated = decode(generator, generated_latents, folder)
        reconstruction = reconstruct(generator, snapshots, latents, heldout, folder)

    def groups() -> Iterator[Group]:
        yield Group("snapshots", snapshots)
        yield Group("mean", contracted(mean_of(vectors).float()[None], products))
        if reconstruction is not None:
            yield Group("reconstructed", reconstruction.parameters)
        yield Group("generated", generated, feedback=None if tuning is None else Passes(tuning.passes))
        for family in (*families, extra_groups):
            yield from family

    report = compare(scorer, groups(), reconstruction, seed, products)
    report["num_generated"] = num_generated
    if tuning is not None and pipeline is not None:
        report["tuning"] = tuning.to_dict() | {
            "temperature": pipeline.config.temperature,
            "break_even": break_even(report),
        }
    if pipeline is not None and scorer.classifies:
        report["reverse_process"] = reverse_process(scorer, pipeline, folder, seed)
    if pipeline is not None and report["difference"]["verdict"] == "worse":
        report["more_steps"] = _try_more_steps(scorer, pipeline, folder, seed)
    report = without_nan(report)
    report["warnings"] = find_warnings(report)
    report["verdict"] = write_verdict(report)
    report["summary"] = summarise(report)
    sizes = scorer.layout.sizes
    draw_figures(
        report, folder, snapshots=snapshots, generated=generated, tensor_sizes=sizes, latents=figures, losses=losses
    )
    write_report(report, folder)
    return report


def compare(
    scorer: Scorer,
    groups: Iterable[Group],
    reconstruction: Reconstruction | None = None,
    seed: int = 0,
    products: AdapterProducts | None = None,
) -> dict:
    """
    Scores groups of networks on the validation and the test split, and compares the generated one with the others.

    Args:
        scorer (`Scorer`): For the base model and its task.
        groups (`Iterable[Group]`): `snapshots` first; made and let go one after the other.
        reconstruction (`Reconstruction`, *optional*): Of the group `reconstructed`.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        products (`AdapterProducts`, *optional*): Distances are between these, where they are given.

    Returns:
        `dict`: The numbers of a report, which may be nan.
    """
    scored = _scored(scorer, groups)
    groups_of_report = _Groups(scorer.metric, products, *next(scored))
    for group, validation, test in scored:
        groups_of_report.add(group, validation, test)
    rows, audits, places = groups_of_report.rows, groups_of_report.audits, groups_of_report.places
    bootstrap = Bootstrap(groups_of_report.wrong_snapshots, scorer.metric.sign, named_generator(seed, "bootstrap"))
    compared = [place for place in places.values() if place.family not in (None, CURVE)]
    frontier_rows = bootstrap.frontier(places["generated"], compared)
    generated_audit = next(audit for audit in audits if audit.name == "generated")
    baseline_audits = [audit for audit in audits if places[audit.name] in compared]
    explained = None
    if reconstruction is not None:
        same = places["snapshots"].values[reconstruction.rows]
        lost = places["reconstructed"].values.nanmean() - same.nanmean()
        explained = reconstruction.explained | {"score_difference": lost.item()}
    report = {
        "version": REPORT_VERSION,
        "metric": dataclasses.asdict(scorer.metric),
        "num_parameters": scorer.layout.num_parameters,
        "splits": {split: scorer.num_examples(split) for split in ("validation", "test")},
        "groups": rows,
        "difference": dataclasses.asdict(bootstrap.difference(places["generated"], places["snapshots"])),
        "reconstruction": explained,
        "frontier": {
            "sentence": frontier_sentence(frontier_rows),
            "rows": [dataclasses.asdict(row) for row in frontier_rows],
        },
        "audit": {
            "verdict": audit_verdict(generated_audit, baseline_audits),
            "rows": [dataclasses.asdict(audit) | {"copies": audit.copies} for audit in audits],
        },
    }
    curve = [place for place in places.values() if place.family == CURVE]
    if curve:
        report["temperatures"] = [_place_on_curve(bootstrap.frontier(place, compared)) for place in curve]
    return report


def _place_on_curve(rows: Sequence[FrontierRow]) -> dict:
    """The generator at one temperature, and its verdicts on plain and on tuned settings of trivial generators."""
    counts = {
        kind: {verdict: sum(r.verdict == verdict and r.tuned == tuned for r in rows[1:]) for verdict in VERDICTS}
        for kind, tuned in (("plain", False), ("tuned", True))
    }
    fields = ("value", "num_models", "score", "max_iou")
    return {name: getattr(rows[0], name) for name in fields} | counts


class _Groups:
    """What is kept of every group, and what all groups are compared with: the snapshots, the first of them."""

    def __init__(
        self, metric: Metric, products: AdapterProducts | None, snapshots: Group, validation: Tensor, test: Scores
    ):
        self.metric, self.products = metric, products
        self.rows: list[dict[str, Any]] = []
        self.audits: list[AuditRow] = []
        self.places: dict[str, FrontierGroup] = {}
        self.yardstick = Yardstick(expanded(snapshots.parameters, products))
        self.wrong_snapshots = self.snapshots_iou = None
        if isinstance(test, ClassifierScores):
            self.wrong_snapshots = test.wrong
            self.snapshots_iou = max_iou(test.wrong, test.wrong, exclude_self=True)
        self.add(snapshots, validation, test)

    def add(self, group: Group, validation: Tensor, test: Scores) -> None:
        own = not self.rows
        place = self.yardstick.place(None if own else expanded(group.parameters, self.products))
        wrong = similarity = None
        if isinstance(test, ClassifierScores) and self.wrong_snapshots is not None:
            wrong = test.wrong
            similarity = nearest_in_predictions(wrong, self.wrong_snapshots, own)
        audit = audit_group(group.name, place, self.yardstick.nearest, similarity, self.snapshots_iou)
        iou = torch.empty(0) if similarity is None else similarity[0]
        evidence = Evidence(test.values, validation, self.metric.sign, test, iou, place)
        row: dict[str, Any] = {
            "name": group.name,
            "family": group.family,
            "value": group.value,
            "n": len(evidence.values),
        }
        if group.feedback is not None:
            row |= {"feedback": dataclasses.asdict(group.feedback)}
        row |= {"num_undefined": int(test.undefined.sum())}
        row |= {m.key: m.function(evidence) for m in METRICS if wrong is not None or not m.classifiers_only}
        row |= {"scores": evidence.values.tolist()}
        if isinstance(test, ClassifierScores):
            row |= {"ensembles": ensemble_metrics(test.log_probs, test.labels)}
        self.rows.append(row)
        self.audits.append(audit)
        self.places[group.name] = FrontierGroup(
            group.name, evidence.values, wrong, group.family, group.value, group.feedback is not None
        )


def _scored(scorer: Scorer, groups: Iterable[Group]) -> Iterator[tuple[Group, Tensor, Scores]]:
    """Each group with its metric on validation data and its scores on test data; as many groups as fit go together,
    because every pass over the data computes the frozen part of the network anew."""

    def flush(batch: list[Group]) -> Iterator[tuple[Group, Tensor, Scores]]:
        vectors = [row for group in batch for row in group.parameters]
        validation = scorer.score("validation", vectors).values
        test = scorer.score("test", vectors)
        start = 0
        for group in batch:
            part = slice(start, start + len(group.parameters))
            start = part.stop
            yield group, validation[part], test[part]

    most = min(scorer.chunk_size, CHUNK_BYTES // (4 * scorer.layout.num_parameters))
    batch: list[Group] = []
    for group in groups:
        if batch and sum(len(g.parameters) for g in [*batch, group]) > most:
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
        "; --score_models and --baseline_models take fewer" if seconds > 600 else "",
    )


def _sample_temperatures(pipeline: PDiffPipeline, num_models: int, folder: Path, seed: int) -> Iterator[Group]:
    """The generator at other temperatures, from the noise that its own group has."""
    for value in TEMPERATURES:
        if value != pipeline.config.temperature:
            (latents,) = pipeline(
                num_models,
                temperature=value,
                generator=named_generator(seed, "generated"),
                output_type="latent",
                return_dict=False,
            )
            yield Group(f"generated {value}", decode(pipeline, latents, folder), CURVE, value)


def _try_more_steps(scorer: Scorer, pipeline: PDiffPipeline, folder: Path, seed: int) -> dict:
    """The score of some networks that were sampled in more denoising steps."""
    steps = min(MORE_STEPS * pipeline.config.num_inference_steps, pipeline.scheduler.config.num_train_timesteps)
    (latents,) = pipeline(
        MORE_STEPS_MODELS,
        num_inference_steps=steps,
        generator=named_generator(seed, "generated"),
        output_type="latent",
        return_dict=False,
    )
    values = scorer.score("test", decode(pipeline, latents, folder)).values
    return {"num_inference_steps": steps, "n": len(values), "score_mean": values.nanmean().item()}


def write_report(report: dict, folder: str | os.PathLike) -> None:
    """Writes `report.json` and `report.md` into `folder`; the latter shows the figures that are there."""
    folder = Path(folder)
    write_json(folder / "report.json", report)
    with replacing(folder / "report.md") as part:
        part.write_text(format_report(report, [path.name for path in folder.glob("*.png")]), encoding="utf-8")
