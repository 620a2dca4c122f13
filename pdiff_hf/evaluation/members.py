"""Networks for members of a family of tasks: what they are compared with, and how groups of them are scored."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from ..models import encode_in_batches
from ..models.autoencoder import LARGE
from ..models.products import AdapterProducts, expanded
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..snapshots.zoo import ZooArguments
from ..tasks.family import Family
from ..training.tune import seen_tasks
from ..utils.files import write_json
from ..utils.reports import TEST
from ..utils.seeds import named_seed
from .closed_forms import closed_forms
from .decoded import decode, reverse_process, sample
from .groups import Group, Pending
from .member_score import MemberScorer
from .opponents import Regime, oracles
from .report import GroupRow, Report
from .report_data import Cost, Kind

NUM_VALIDATION_MEMBERS, NUM_TEST_MEMBERS = 32, 48
SHOWN_SNAPSHOTS = 200  # of them, so many are encoded for a figure


@dataclass(frozen=True)
class Spent:
    """
    Passes that were needed before the first unseen task; see [`Cost`].

    Args:
        base (`int`): For the base model.
        snapshots (`int`): For the snapshots, with the base model.
        generator (`int`): For the generator, with the snapshots.
    """

    base: int = 0
    snapshots: int = 0
    generator: int = 0


class Members:
    """
    Networks for unseen members of a family, beside what answers to a condition without a generator. All processes take
    part, because opponents are trained; an evaluation that was stopped continues with its cache.

    Args:
        family (`Family`), networks (`NetworkRunner`): The tasks, and what runs networks on them.
        generator, snapshots, num_models, baselines, untuned, seed: Those of [`evaluate`].
        table (`torch.Tensor`): The conditions of the snapshots, shape `(K, width)`.
        folder (`Path`, *optional*): For what is too large for memory; without one there is nothing for figures.
        sets (`Mapping[str, torch.Tensor | int]`, *optional*): Conditions of members that no snapshot is of, shape
            `(M, width)`, or how many to draw: settings are chosen on `validation`, and the verdict is about `test`. By
            default 32 and 48, and as many for each of the family's own test sets.
        spent (`Spent`, *optional*): What the generator took.
        zoo (`ZooArguments`, *optional*): How the networks of members were trained, and oracles are; with all baselines,
            others for five times as many steps.
        regime (`Regime`, *optional*): What opponents may be trained on; by default the members with snapshots.
        products (`AdapterProducts`, *optional*): Of adapters that are compared by their products; by default the
            pipeline's.
        cache (`str` or `os.PathLike`, *optional*): A file that keeps the rows that are done.
        num_examples (`int`, *optional*, defaults to 2000): Of the test split, for each member.
    """

    metric = MemberScorer.metric

    def __init__(
        self,
        family: Family,
        networks: NetworkRunner,
        generator: PDiffPipeline | Tensor,
        snapshots: Tensor,
        table: Tensor,
        folder: Path | None,
        *,
        num_models: int = 4,
        baselines: str,
        untuned: PDiffPipeline | None = None,
        seed: int,
        sets: Mapping[str, Tensor | int] | None = None,
        spent: Spent | None = None,
        zoo: ZooArguments | None = None,
        regime: Regime | None = None,
        products: AdapterProducts | None = None,
        cache: str | os.PathLike | None = None,
        num_examples: int = 2000,
    ):
        fields = family.fields
        known = fields.known(table).all(1)
        self.table, self.snapshots = table[known], snapshots[known]
        self.family, self.networks, self.generator, self.untuned = family, networks, generator, untuned
        self.num_models, self.baselines, self.seed, self.num_examples = num_models, baselines, seed, num_examples
        self.folder, self.figures = folder, dict[str, Any]()
        self.spent, self.zoo = spent or Spent(), zoo or ZooArguments()
        self.cache = None if cache is None else Path(cache)
        self.products = products
        if products is None and isinstance(generator, PDiffPipeline):
            self.products = generator.autoencoder.products
        wanted = {"validation": NUM_VALIDATION_MEMBERS} | dict(
            dict.fromkeys([TEST, *family.test_sets], NUM_TEST_MEMBERS) if sets is None else sets
        )
        sizes = {name: size for name, size in wanted.items() if isinstance(size, int)}
        given = {name: rows for name, rows in wanted.items() if isinstance(rows, Tensor)}
        known_ones = fields.conditions(torch.cat([self.table, *given.values()]))
        drawn = family.split(sizes, named_seed(seed, "tasks"), without=list(map(family.key, known_ones)))
        self.sets = {name: given[name] if name in given else fields.table(drawn[name]) for name in wanted}
        validation = self.sets.pop("validation")
        self.regime = regime or Regime(
            family,
            networks,
            Accelerator(),
            lambda args: seen_tasks(family, args, self.table, PartialState().device),
            len(self.table),
            validation,
            seed,
        )

    def facts(self) -> dict[str, Any]:
        """What a report says of the tasks and their data, whatever the scores."""
        family = self.family
        num_test = min(self.num_examples, family.num_examples("test"))
        return {
            "splits": {"validation": family.num_examples("validation"), "test": num_test},
            "fields": family.fields.to_dict(),
            "conditions": {name: family.fields.conditions(table) for name, table in self.sets.items()},
        }

    def groups(self) -> Iterator[Pending]:
        """All groups; each is made when it is asked for."""

        def own(source: PDiffPipeline | Tensor, name: str, kind: Kind, passes: int, shuffled: bool = False) -> Pending:
            return name, lambda: Group(name, self._answers(source, shuffled), kind, cost=Cost(passes))

        spent, base = self.spent, self.networks.base_parameters()
        yield own(self.generator, "generated", Kind.GENERATED, spent.generator)
        if self.untuned is not None:
            yield own(self.untuned, "generator by weights", Kind.VARIANT, spent.snapshots)
        if isinstance(self.generator, PDiffPipeline):
            yield own(self.generator, "generated, shuffled conditions", Kind.CONTROL, spent.generator, shuffled=True)
        yield from closed_forms(self.regime, self.snapshots, self.table, Cost(spent.snapshots), self.products)
        yield "base model", lambda: Group("base model", lambda _, t: base.expand(len(t), -1), cost=Cost(spent.base))
        if (told := self.family.prompted(self.networks.model)) is not None:
            name = "base model, told in its prompt"
            yield name, partial(Group, name, told, cost=Cost(spent.base))
        yield from oracles(self.regime, self.zoo, spent.base, (1,) if self.baselines == "few" else (1, 5))

    def _answers(self, source: PDiffPipeline | Tensor, shuffled: bool) -> Callable[[str, Tensor], Tensor]:
        """
        What gives networks for a table of conditions, always with the same noise, shape `(M, num_models, D)`; where
        they are shuffled, those for the condition before.
        """
        if isinstance(source, Tensor):
            return lambda _, table: source
        source.set_progress_bar_config(disable=True)

        def networks(_: str, table: Tensor) -> Tensor:
            told = self.family.fields.conditions(table.roll(1, 0) if shuffled else table)
            found = sample(source, self.num_models, self.seed, told, "pt", "evaluate")
            return found.unflatten(0, (len(table), self.num_models))

        return networks

    def rows(self, groups: Iterable[Pending]) -> Iterator[GroupRow]:
        """Each group with its scores; of those in the cache, nothing is done."""
        kept: dict[str, Any] = {}
        if self.cache is not None and self.cache.is_file():
            kept = json.loads(self.cache.read_text(encoding="utf-8"))
        PartialState().wait_for_everyone()  # until every process knows what is kept
        model = self.networks.model
        device, size = next(model.parameters()).device, sum(tensor.numel() for tensor in model.parameters())
        scorers = {
            name: MemberScorer(self.family, self.networks, table.to(device), self.num_examples)
            for name, table in self.sets.items()
        }
        for name, make in groups:
            if name in kept:
                yield GroupRow(**kept[name])
                continue
            group, sets = make(), dict[str, dict[str, list]]()
            for set_name, scorer in scorers.items():
                answer = group.networks
                if not isinstance(answer, nn.Module):
                    answer = answer(set_name, self.sets[set_name])
                scores = scorer.score("test", answer, group.vote)
                sets[set_name] = {"scores": scores.values.tolist(), "losses": scores.losses.tolist()}
            means = torch.tensor(sets[TEST]["scores"]).double().mean(1)
            measures = {"score_mean": means.mean().item(), "score_std": means.std().item()}
            row = group.row(len(sets[TEST]["scores"][0]), sets=sets, measures=measures)
            row.size = row.size or size
            kept[name] = row.to_dict()
            if self.cache is not None and PartialState().is_main_process:
                write_json(self.cache, kept)
            yield row

    def complete(self, report: Report) -> None:
        """Adds comparisons, the reverse process for some members, and what figures of parameters and latents show."""
        report.compare()
        pipeline, layout, folder = self.generator, self.networks.layout, self.folder
        if isinstance(pipeline, Tensor) or folder is None or not PartialState().is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        told = self.family.fields.conditions(self.sets[TEST])
        watched = told if layout.num_parameters < LARGE else told[:1]
        device = next(self.networks.model.parameters()).device
        table = self.sets[TEST][: len(watched)].to(device)
        scorer = MemberScorer(self.family, self.networks, table, self.num_examples)
        report.reverse_process = reverse_process(
            lambda networks: scorer.score("test", networks).values[:, 0], pipeline, folder, self.seed, watched
        )
        latents = sample(pipeline, 1, self.seed, told)
        count = min(len(self.snapshots), SHOWN_SNAPSHOTS)
        shown = self.snapshots[torch.linspace(0, len(self.snapshots) - 1, count).round().long()]
        products = pipeline.autoencoder.products  # factors say little: those of the same adapter differ
        self.figures = {
            "snapshots": expanded(shown, products),
            "generated": expanded(decode(pipeline, latents, folder), products),
            "tensor_sizes": (layout if products is None else products.layout).sizes,
            "latents": {"snapshots": encode_in_batches(pipeline.autoencoder, shown), "generated": latents},
        }
