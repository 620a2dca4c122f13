"""Networks for a single task: what they are compared with, and how groups of them are scored."""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import encode_in_batches
from ..models.products import contracted, expanded
from ..pipelines import PDiffPipeline
from ..training.ensembles import Tuning
from ..utils.files import free_space, without_nan
from ..utils.seeds import named_seed
from .baselines import BaselineContext, standard_baselines
from .compare import WORSE
from .decoded import decode, reverse_process, room_for, sample
from .geometry import Rows, Yardstick, exact_distances, mean_of, pca_r2_score
from .groups import Group, Pending, named_generator
from .memorisation import find_copies
from .metrics import ensemble_metrics, max_iou, measures, nearest_in_predictions
from .report import GroupRow, Report
from .report_data import Cost, Kind
from .score import CHUNK_BYTES, Scorer, Scores

MORE_STEPS = 5  # times as many denoising steps are tried where generated networks are worse than snapshots
MORE_STEPS_MODELS = 20
# Those of the generator's own curve, with all baselines.
TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MEAN = "mean of the snapshots"


class SingleTask:
    """
    Networks for a single task, beside free alternatives. They are scored on validation and test data, many of them in
    each pass.

    Args:
        scorer (`Scorer`): For the base model and its task.
        generator, snapshots, num_models, baselines, untuned, seed: Those of [`evaluate`]. What needs latents
            (reconstructions, kernel density) needs a pipeline. Snapshots may lie in a file, and are not copied.
        folder (`Path`): For what is too large for memory.
        heldout (`torch.Tensor`, *optional*): bool of shape `(K,)`: snapshots that no generator has seen. Baselines are
            not made from them either.
        baseline_models (`int`, *optional*, defaults to 20): Networks of each baseline setting; 0 for no baselines.
        latents (`torch.Tensor`, *optional*): Shape `(K, L)`, the snapshots' latents if they are known already.
        tuning (`Tuning`, *optional*): How the pipeline was tuned.

    Raises:
        ValueError: if the networks of a baseline would not fit on the disk, or the scores into memory.
    """

    def __init__(
        self,
        scorer: Scorer,
        generator: PDiffPipeline | Tensor,
        snapshots: Tensor,
        folder: Path,
        *,
        num_models: int = 200,
        baselines: str,
        untuned: PDiffPipeline | None = None,
        seed: int,
        heldout: Tensor | None = None,
        baseline_models: int = 20,
        latents: Tensor | None = None,
        tuning: Tuning | None = None,
    ):
        self.scorer, self.snapshots, self.folder, self.num_models = scorer, snapshots, folder, num_models
        self.baselines, self.baseline_models, self.seed = baselines, baseline_models, seed
        self.untuned, self.tuning, self.metric = untuned, tuning, scorer.metric
        self.wrong = dict[str, Tensor]()
        self.pipeline = generator if isinstance(generator, PDiffPipeline) else None
        self.products = None if self.pipeline is None else self.pipeline.autoencoder.products
        self.heldout = torch.zeros(len(snapshots), dtype=torch.bool) if heldout is None else heldout
        self.vectors = expanded(snapshots, self.products)
        self.seen = Rows(self.vectors, ~self.heldout)
        self._check_disk()
        self.latents: dict[str, Tensor] = {}
        if self.pipeline is not None:
            known = encode_in_batches(self.pipeline.autoencoder, snapshots) if latents is None else latents
            self.latents = {"snapshots": known, "generated": sample(self.pipeline, num_models, seed)}
        folder.mkdir(parents=True, exist_ok=True)  # nothing before this has left anything behind
        self.num_generated = len(generator) if isinstance(generator, Tensor) else num_models
        if isinstance(generator, Tensor):
            self.generated = generator
        else:
            self.generated = decode(generator, self.latents["generated"], folder)

    def _check_disk(self) -> None:
        needed, free = 4 * self.baseline_models * self.seen.shape[1], free_space(self.folder)
        if needed > free / 2:
            raise ValueError(
                f"{self.baseline_models} networks of a baseline need {needed:,} bytes, more than half of the {free:,} "
                f"bytes that are free for '{self.folder}'; use --baseline_models "
                f"{self.baseline_models * free // 2 // needed} at most"
            )

    def facts(self) -> dict[str, Any]:
        """What a report says of the networks and the data, whatever the scores."""
        splits = {split: self.scorer.num_examples(split) for split in ("validation", "test")}
        return {"splits": splits, "num_generated": self.num_generated}

    @property
    def figures(self) -> dict[str, Any]:
        """What figures show beside the report's numbers."""
        products = self.products  # factors say little: those of the same adapter differ
        shown = {"snapshots": self.vectors, "generated": expanded(self.generated, products)}
        layout = self.scorer.layout if products is None else products.layout
        return shown | {"latents": self.latents, "tensor_sizes": layout.sizes}

    # ---- groups

    def groups(self) -> Iterator[Group]:
        """All groups, the snapshots first; each is made when it is asked for."""
        yield Group("snapshots", self.snapshots, Kind.SNAPSHOTS)
        yield Group(MEAN, contracted(mean_of(self.vectors).float()[None], self.products), sweep="mean")
        if self.pipeline is not None:
            self._reconstruct(self.pipeline)
            yield Group("reconstructed", self._reconstructed, Kind.CONTROL)
        cost = None if self.tuning is None else Cost(self.tuning.passes)
        yield Group("generated", self.generated, Kind.GENERATED, cost=cost)
        if self.untuned is not None:
            before = decode(self.untuned, sample(self.untuned, self.num_models, self.seed), self.folder)
            yield Group("generator by weights", before, Kind.VARIANT, cost=Cost())
        if not self.baseline_models:
            return
        for one in standard_baselines(self.baselines):
            if one.supports(self.context):
                # The seed follows from the name, so that a new baseline leaves the networks of the others alone.
                vectors = one.sample(self.context, self.baseline_models, named_generator(self.seed, one.name))
                yield Group(one.name, contracted(vectors, self.products), sweep=one.sweep, value=one.value)
        if self.pipeline is not None and self.baselines == "all":
            yield from self._sample_temperatures(self.pipeline)

    @cached_property
    def context(self) -> BaselineContext:
        """What baselines are made from."""
        decoded = None if self.pipeline is None else partial(decode, self.pipeline, folder=self.folder)
        return BaselineContext(
            self.seen,
            self.scorer.layout.sizes if self.products is None else self.products.layout.sizes,
            latents=self.latents["snapshots"][~self.heldout] if self.latents else None,
            decode=decoded and (lambda latents: expanded(decoded(latents), self.products)),
            room=partial(room_for, folder=self.folder),
        )

    def _sample_temperatures(self, pipeline: PDiffPipeline) -> Iterator[Group]:
        """The generator at other temperatures, from the noise that its own group has."""
        for value in TEMPERATURES:
            if value != pipeline.config.temperature:
                latents = sample(pipeline, self.baseline_models, self.seed, temperature=value)
                networks = decode(pipeline, latents, self.folder)
                yield Group(f"generated {value}", networks, Kind.VARIANT, "generated at other temperatures", value)

    def _reconstruct(self, pipeline: PDiffPipeline) -> None:
        """
        Decodes the latents of all snapshots. Keeps the networks of the held-out ones, or of all if none is held out, in
        `_reconstructed`, shape `(n, D)`, which these are in `_rows`, and in `explained` shares of the variance around
        the mean of the seen snapshots: `r2_train` and `r2_heldout` of the autoencoder, `linear_r2_train` and
        `linear_r2_heldout` of as many principal components.
        """
        mean, any_heldout = mean_of(self.seen), bool(self.heldout.any())
        self._rows = (self.heldout if any_heldout else ~self.heldout).nonzero().flatten()
        self._reconstructed = room_for(len(self._rows), self.snapshots.shape[1], self.folder)
        total = exact_distances(self.vectors, mean[None], torch.zeros(len(self.vectors), dtype=torch.long)).square()
        errors, kept, chosen = [], 0, torch.arange(len(self.vectors))
        for block in pipeline.decode_in_blocks(self.latents["snapshots"]):
            these, chosen = chosen[: len(block)], chosen[len(block) :]
            errors.append(exact_distances(expanded(block, self.products), self.vectors, these).square())
            wanted = block[torch.isin(these, self._rows)]
            self._reconstructed[kept : kept + len(wanted)] = wanted
            kept += len(wanted)
        error = torch.cat(errors)
        length = pipeline.autoencoder.config.latent_dim
        self.explained: dict[str, float | None] = {}
        for name, which in (("train", ~self.heldout), ("heldout", self.heldout)):
            # nan or infinite where nothing varies
            of_autoencoder = (1 - error[which].sum() / total[which].sum()).item()
            rows = self.seen if name == "train" else Rows(self.vectors, which)
            known = name == "train" or any_heldout
            self.explained[f"r2_{name}"] = of_autoencoder if known else None
            self.explained[f"linear_r2_{name}"] = pca_r2_score(self.seen, rows, length) if known else None

    # ---- scores

    def rows(self, groups: Iterable[Pending]) -> Iterator[GroupRow]:
        """Each group with its scores; keeps where networks err, bool of shape `(N, U)`, if they are classifiers."""
        yardstick = wrong_snapshots = snapshots_iou = None
        for group, validation, test in self._scored(groups):
            own = yardstick is None
            vectors = expanded(group.networks, self.products)
            yardstick = yardstick or Yardstick(vectors)
            place = yardstick.place(None if own else vectors)
            similarity = None
            ensembles: list[dict[str, Any]] = []
            if self.scorer.classifies:
                wrong, ensembles = test.wrong, ensemble_metrics(test.log_probs, test.labels)
                self.wrong[group.name] = wrong
                if own:
                    wrong_snapshots, snapshots_iou = wrong, max_iou(wrong, wrong, exclude_self=True)
                assert wrong_snapshots is not None
                similarity = nearest_in_predictions(wrong, wrong_snapshots, own)
            of_classifiers = () if similarity is None else (test, similarity[0])
            yield group.row(
                len(test.values),
                num_undefined=int(test.undefined.sum()),
                sets={"test": {"scores": [without_nan(test.values.tolist())]}},
                measures=without_nan(measures(test.values, validation, self.metric.sign, place, *of_classifiers)),
                ensembles=ensembles,
                memorisation=find_copies(place, yardstick.nearest, similarity, snapshots_iou),
            )

    def _scored(self, groups: Iterable[Pending]) -> Iterator[tuple[Group, Tensor, Scores]]:
        """Each group with its metric on validation data and its scores on test data; as many groups as fit go together,
        because every pass over the data computes the frozen part of the network anew."""

        def flush(batch: list[Group]) -> Iterator[tuple[Group, Tensor, Scores]]:
            vectors = [row for group in batch for row in group.networks]
            validation = self.scorer.score("validation", vectors).values
            test = self.scorer.score("test", vectors)
            start = 0
            for group in batch:
                part = slice(start, start + len(group.networks))
                start = part.stop
                yield group, validation[part], test[part]

        most = min(self.scorer.chunk_size, CHUNK_BYTES // (4 * self.scorer.layout.num_parameters))
        batch: list[Group] = []
        for _, make in groups:
            group = make()
            if batch and sum(len(g.networks) for g in [*batch, group]) > most:
                yield from flush(batch)
                batch = []
            batch.append(group)
        yield from flush(batch)

    # ---- what else is measured

    def complete(self, report: Report) -> None:
        """Adds comparisons, and what is measured of a pipeline alone."""
        report.compare(self.wrong, named_seed(self.seed, "bootstrap"))
        if self.pipeline is None:
            return
        lost = report.group("reconstructed").mean()
        known = report.group("snapshots").sets["test"]["scores"][0]
        same = [known[row] for row in self._rows if known[row] is not None]
        difference = lost - math.fsum(same) / len(same) if lost is not None and same else math.nan
        report.reconstruction = without_nan(self.explained | {"score_difference": difference})
        if self.tuning is not None:
            report.tuning = self.tuning.to_dict()
        if self.scorer.classifies:
            report.reverse_process = reverse_process(
                lambda networks: self.scorer.score("test", networks).values, self.pipeline, self.folder, self.seed
            )
        if report.group("snapshots").verdict == WORSE:
            report.more_steps = self._try_more_steps(self.pipeline)

    def _try_more_steps(self, pipeline: PDiffPipeline) -> dict[str, Any]:
        """The score of some networks that were sampled in more denoising steps."""
        steps = min(MORE_STEPS * pipeline.config.num_inference_steps, pipeline.scheduler.config.num_train_timesteps)
        latents = sample(pipeline, MORE_STEPS_MODELS, self.seed, num_inference_steps=steps)
        values = self.scorer.score("test", decode(pipeline, latents, self.folder)).values
        return {"num_inference_steps": steps, "n": len(values), "score_mean": values.nanmean().item()}
