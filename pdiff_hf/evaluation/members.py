"""The report on networks for members of a family of tasks."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from ..models.autoencoder import LARGE
from ..models.products import AdapterProducts
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..snapshots.zoo import ZooArguments
from ..tasks.family import Family
from ..training.tune import seen_tasks
from ..utils.files import without_nan, write_json
from ..utils.reports import TEST
from ..utils.seeds import named_seed
from .closed_forms import closed_forms
from .compare import Bootstrap, Sample
from .finish import finish, sampling_of, save_report
from .groups import Cost, Group, Kind, decode, encode, named_generator, reverse_process
from .opponents import Pending, Regime, oracles
from .report import GroupRow, Report
from .score import MemberScorer

NUM_MEMBERS = {"validation": 32, TEST: 48}
SHOWN_SNAPSHOTS = 200  # of them, so many are encoded for a figure


def evaluate_members(
    family: Family,
    networks: NetworkRunner,
    generator: PDiffPipeline | Tensor,
    snapshots: Tensor,
    table: Tensor,
    folder: str | os.PathLike | None,
    *,
    sets: Mapping[str, Tensor] | None = None,
    validation: Tensor | None = None,
    num_models: int = 4,
    untuned: PDiffPipeline | None = None,
    cost: Cost | None = None,
    of_snapshots: Cost | None = None,
    of_base: int = 0,
    zoo: ZooArguments | None = None,
    factors: Sequence[int] = (1,),
    regime: Regime | None = None,
    products: AdapterProducts | None = None,
    more: Iterable[Pending] = (),
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    settings: Mapping[str, Any] | None = None,
    cache: str | os.PathLike | None = None,
    num_examples: int = 2000,
    seed: int = 0,
) -> Report:
    """
    The report on networks for unseen members of a family, which is written to `folder` with its figures by the main
    process. All processes take part, because opponents are trained; one that was stopped goes on with its cache.

    Args:
        networks (`NetworkRunner`): Runs the networks.
        generator (`PDiffPipeline` or `torch.Tensor`): A pipeline, or networks for the `test` members.
        snapshots (`torch.Tensor`), table (`torch.Tensor`): Shape `(K, D)`, and their conditions, `(K, width)`.
        sets (`Mapping[str, torch.Tensor]`, *optional*): Tables of unseen conditions; the verdict is about `test`. By
            default members that no snapshot is of.
        validation (`torch.Tensor`, *optional*): Conditions of the members that settings are chosen on.
        num_models (`int`, *optional*, defaults to 4): Networks for each member.
        untuned (`PDiffPipeline`, *optional*): The generator before it was tuned.
        cost (`Cost`, *optional*), of_snapshots (`Cost`, *optional*), of_base (`int`, *optional*): Of the generator, of
            the snapshots alone, and of the base model.
        zoo (`ZooArguments`, *optional*): How the networks of members were trained, and oracles are.
        factors (`Sequence[int]`, *optional*): Oracles are trained for so many times as many steps.
        regime (`Regime`, *optional*): What opponents may be trained on; by default the members with snapshots.
        products (`AdapterProducts`, *optional*): Of adapters that are compared by their products.
        more (`Iterable[Pending]`, *optional*): Further groups.
        losses (`Mapping`, *optional*): For a figure.
        settings (`Mapping`, *optional*): To be kept in the report.
        cache (`str` or `os.PathLike`, *optional*): A file that keeps the rows that are done.
        num_examples (`int`, *optional*, defaults to 2000): Of the test split, for each member.
        seed (`int`, *optional*, defaults to 0).
    """
    fields, state = family.fields, PartialState()
    pipeline = generator if isinstance(generator, PDiffPipeline) else None
    known = fields.known(table).all(1)
    table, snapshots = table[known], snapshots[known]
    if sets is None or validation is None:
        keys = [family.key(condition) for condition in fields.conditions(table)]
        found = family.split(NUM_MEMBERS, named_seed(seed, "tasks"), without=keys)
        sets = {TEST: fields.table(found[TEST])} if sets is None else sets
        validation = fields.table(found["validation"]) if validation is None else validation
    if products is None and pipeline is not None:
        products = pipeline.autoencoder.products
    size = sum(tensor.numel() for tensor in networks.model.parameters())
    cost, of_snapshots = cost or Cost(), of_snapshots or Cost()
    if regime is None:
        device = state.device
        regime = Regime(
            family,
            networks,
            Accelerator(),
            lambda args: seen_tasks(family, args, table, device),
            len(table),
            validation,
            seed,
        )
    base = networks.base_parameters()

    def own(
        source: PDiffPipeline | Tensor, name: str, kind: Kind, shuffled: bool = False, cost: Cost = cost
    ) -> Pending:
        answer = _sample_for(source, family, num_models, seed, shuffled)
        return name, lambda: Group(name, answer, kind, cost=cost, size=size)

    def groups() -> Iterator[Pending]:
        yield own(generator, "generated", Kind.GENERATED)
        if untuned is not None:
            yield own(untuned, "generator by weights", Kind.VARIANT, cost=of_snapshots)
        if pipeline is not None:
            yield own(pipeline, "generated, shuffled conditions", Kind.CONTROL, shuffled=True)
        yield from closed_forms(
            family, networks, snapshots, table, validation, of_snapshots, size, seed=seed, products=products
        )
        expand_base = lambda _, rows: base.expand(len(rows), -1)  # noqa: E731
        yield "base model", lambda: Group("base model", expand_base, cost=Cost(of_base), size=size)
        if (told := family.prompted(networks.model)) is not None:
            in_prompt = "base model, told in its prompt"
            yield in_prompt, lambda: Group(in_prompt, told, cost=Cost(of_base), size=size)
        yield from oracles(regime, zoo or ZooArguments(), of_base, factors, size)
        yield from more

    rows = _member_rows(family, networks, sets, groups(), num_examples, cache)
    report = Report(
        MemberScorer.metric,
        networks.layout.num_parameters,
        rows,
        splits={
            "validation": family.num_examples("validation"),
            "test": min(num_examples, family.num_examples("test")),
        },
        fields=fields.to_dict(),
        conditions={name: fields.conditions(rows_of) for name, rows_of in sets.items()},
        sampling={} if pipeline is None else sampling_of(pipeline),
        settings=dict(settings or {}) | {"seed": seed},
    )
    if pipeline is not None and state.is_main_process and folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        figures = _watch(report, pipeline, family, networks, snapshots, sets[TEST], Path(folder), num_examples, seed)
    else:
        figures = {}
    compare_members(report)
    if folder is not None and state.is_main_process:
        save_report(report, folder, losses, **figures)
    return report


def _watch(
    report: Report,
    pipeline: PDiffPipeline,
    family: Family,
    networks: NetworkRunner,
    snapshots: Tensor,
    table: Tensor,
    folder: Path,
    num_examples: int,
    seed: int,
) -> dict[str, Any]:
    """The reverse process for some members, and what the figures of parameters and latents show."""
    conditions = family.fields.conditions(table)
    watched = conditions if networks.layout.num_parameters < LARGE else conditions[:1]
    device = next(networks.model.parameters()).device
    scorer = MemberScorer(family, networks, table[: len(watched)].to(device), num_examples)
    report.reverse_process = reverse_process(
        lambda parameters: scorer.score(TEST, parameters).values[:, 0], pipeline, folder, seed, watched
    )
    noise = named_generator(seed, "generated")
    (latents,) = pipeline(generator=noise, condition=conditions, output_type="latent", return_dict=False)
    shown = snapshots[torch.linspace(0, len(snapshots) - 1, min(len(snapshots), SHOWN_SNAPSHOTS)).round().long()]
    return {
        "snapshots": shown,
        "generated": decode(pipeline, latents, folder),
        "tensor_sizes": networks.layout.sizes,
        "latents": {"snapshots": encode(pipeline, shown), "generated": latents},
    }


def _member_rows(
    family: Family,
    networks: NetworkRunner,
    sets: Mapping[str, Tensor],
    groups: Iterable[Pending],
    num_examples: int,
    cache: str | os.PathLike | None,
) -> list[GroupRow]:
    """The groups with their scores; of those in the cache, nothing is done."""
    path = None if cache is None else Path(cache)
    kept = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    PartialState().wait_for_everyone()  # until every process knows what is kept
    device = next(networks.model.parameters()).device
    scorers = {name: MemberScorer(family, networks, table.to(device), num_examples) for name, table in sets.items()}
    rows: dict[str, GroupRow] = {}
    for name, make in groups:
        if name in kept:
            rows[name] = GroupRow(**kept[name])
            continue
        group = make()
        found: dict[str, dict[str, list]] = {}
        for set_name, scorer in scorers.items():
            answer = group.networks
            if not isinstance(answer, nn.Module):
                answer = answer(set_name, sets[set_name])
            scores = scorer.score("test", answer, group.vote)
            found[set_name] = {"scores": scores.values.tolist(), "losses": scores.losses.tolist()}
        means = torch.tensor(found[TEST]["scores"]).double().mean(1)
        rows[name] = GroupRow(
            name,
            group.kind,
            group.sweep,
            group.value,
            n=len(found[TEST]["scores"][0]),
            cost=group.cost,
            size=group.size,
            note=group.note,
            tried=dict(group.tried or {}),
            sets=found,
            measures={"score_mean": means.mean().item(), "score_std": means.std().item()},
        )
        if path is not None and PartialState().is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            done = {row.name: dataclasses.asdict(row) | {"kind": row.kind.value} for row in rows.values()}
            write_json(path, without_nan(kept | done))
    return list(rows.values())


def compare_members(report: Report) -> None:
    """Fills in comparisons, paired over the members of each set, and then the words."""
    own = report.generated
    for set_name in report.conditions:
        count = len(own.sets[set_name]["scores"])
        bootstrap = Bootstrap(count, report.metric.sign, torch.Generator().manual_seed(0))
        places = {}
        for row in report.groups:
            means = torch.tensor(row.scores(set_name), dtype=torch.float64)
            places[row.name] = bootstrap.place(Sample(means, means[None]))
        for row in report.groups:
            if row is not own:
                row.comparisons[set_name] = bootstrap.compare(places[own.name], places[row.name])
    finish(report)


def _sample_for(
    source: PDiffPipeline | Tensor, family: Family, num_models: int, seed: int, shuffled: bool
) -> Callable[[str, Tensor], Tensor]:
    """
    What gives networks for a table of conditions, always with the same noise, shape `(M, num_models, D)`; where they
    are shuffled, those for the condition before.
    """
    if isinstance(source, Tensor):
        return lambda _, table: source
    source.set_progress_bar_config(disable=True)

    def sample(_: str, table: Tensor) -> Tensor:
        conditions = family.fields.conditions(table.roll(1, 0) if shuffled else table)
        noise = torch.Generator().manual_seed(named_seed(seed, "evaluate"))
        (parameters,) = source(num_models, generator=noise, condition=conditions, output_type="pt", return_dict=False)
        return parameters.unflatten(0, (len(table), num_models))

    return sample
