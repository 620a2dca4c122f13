"""What the page shows of networks at work: what a reader says of a task, and what a network for it answers."""

import base64
import copy
import html
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from pdiff_hf import ParameterLayout
from pdiff_hf.evaluation.metrics import accuracy
from pdiff_hf.evaluation.scatter import sampling_error
from pdiff_hf.evaluation.score import Scorer, Scores
from pdiff_hf.models import ConditionEncoder
from pdiff_hf.models.condition import Condition
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.snapshots.zoo import ZooArguments, train_specialists
from pdiff_hf.tasks import ClassificationTask, predict_logits
from pdiff_hf.tasks.family import Family
from pdiff_hf.tasks.label_groups import LabelGroups
from pdiff_hf.tasks.task import evenly, load_batch
from pdiff_hf.training import Loop
from pdiff_hf.utils.seeds import named_seed

PICTURES = 24  # test examples that are shown
EXAMPLES = 2000  # of the task of a family networks are judged on no more, in a report as well
CHECKBOXES = 32  # a longer vector of bits is a text
TRAINED = "trained on the task"
CSS = """
.at-work .row { display: grid; grid-template-columns: 10.5em 1fr 4.2em; align-items: center; gap: 8px; margin: 4px 0; }
.at-work .row > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
.at-work .track { height: 12px; background: var(--border-color-primary); border-radius: 3px; overflow: hidden; }
.at-work .track i { display: block; height: 100%; background: var(--body-text-color-subdued); }
.at-work .first { font-weight: 600; }
.at-work .first .track i { background: #D55E00; }
.at-work .note { font-size: 0.9em; margin: 6px 0; }
.at-work .images { display: grid; grid-template-columns: repeat(auto-fill, minmax(50px, 1fr)); gap: 6px; }
.at-work .texts { display: grid; gap: 4px; }
.at-work figure { margin: 0; text-align: center; border: 2px solid transparent; border-radius: 4px; padding: 2px; }
.at-work figure.wrong { border: 2px dashed var(--body-text-color); }
.at-work figure img { width: 100%; image-rendering: pixelated; display: block; }
.at-work figcaption { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Choice:
    """What a reader has chosen; nothing, where a generator takes no conditions."""

    task: dict[str, Any] = field(default_factory=dict)  # the value of every field
    told: tuple[str, ...] = ()  # the fields that the generator is told; it samples the others

    @property
    def condition(self) -> dict[str, Any]:
        """What the generator is told."""
        return {name: self.task[name] for name in self.told}

    @property
    def told_or_none(self) -> dict[str, Any] | None:
        """The condition for a pipeline, of a generator that takes none: None."""
        return self.condition if self.task else None


def in_words(condition: Condition) -> str:
    """A condition in a sentence."""
    return ", ".join(f"{name} {_short(value)}" for name, value in condition.items()) or "any task"


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = " ".join(f"{number:g}" for number in value[:CHECKBOXES])
        return f"[{shown}{' …' if len(value) > CHECKBOXES else ''}]"
    return value if isinstance(value, str) else f"{value:.4g}"


def first_choice(encoder: ConditionEncoder | None) -> Choice:
    """What the controls show at first."""
    if encoder is None:
        return Choice()
    seen = encoder.seen[encoder.seen_known.all(1)].cpu()
    kept = encoder.fields.conditions(seen[:1])[0] if len(seen) else {}

    # Examples of numbers lie on the steps of their sliders; vectors say little unless they were seen.
    task = {name: field.example() for name, field in encoder.fields.items()}
    task |= {name: kept[name] for name, value in task.items() if name in kept and isinstance(value, list)}
    for name, said in (encoder.config.seen_texts or {}).items():
        task[name] = next(filter(None, said["texts"]), task[name])
    return Choice(task, tuple(encoder.fields))


def bits_of(encoder: ConditionEncoder, name: str) -> bool:
    """Whether the vectors of a field are few bits, as far as is known from the seen conditions."""
    values = encoder.seen[:, encoder.fields.columns[name]]
    return values.numel() > 0 and values.shape[1] <= CHECKBOXES and bool(((values == 0) | (values == 1)).all())


def to_control(encoder: ConditionEncoder, name: str, value: Any) -> Any:
    """A value as its control has it: of bits the indices of those that are set, of other vectors a text."""
    if not isinstance(value, list):
        return value
    if bits_of(encoder, name):
        return [i for i, bit in enumerate(value) if bit]
    return " ".join(f"{number:g}" for number in value)


def from_control(encoder: ConditionEncoder, name: str, value: Any) -> Any:
    """The inverse of `to_control`."""
    field = encoder.fields[name]
    if value is None:
        raise ValueError(f"'{name}' must be {field}, and it is empty; untick 'told' instead")
    if field.bounds or field.choices:
        return value
    if bits_of(encoder, name):
        return [float(i in value) for i in range(field.width)]
    try:
        return field.read(value)
    except ValueError as error:
        raise ValueError(f"'{name}' must be {field}: {error}") from error


def read_choice(encoder: ConditionEncoder, values: Sequence[Any], told: Sequence[bool]) -> Choice:
    """
    What the controls say, a value for each field, and whether the generator is told it.

    Raises:
        ValueError: for a value that its field cannot have.
    """
    task = {name: from_control(encoder, name, value) for name, value in zip(encoder.fields, values, strict=True)}
    encoder.fields.table([task])
    return Choice(task, tuple(name for name, is_told in zip(encoder.fields, told, strict=True) if is_told))


@dataclass(eq=False)
class AtWork:
    """Networks at work on the test data of the tasks of a family, of which a single task is one."""

    family: Family  # of classification tasks
    model: nn.Module  # the base model, on the device to compute on
    layout: ParameterLayout  # the tensors that are generated
    cache: Path | None = None  # where scores of networks for a single task are kept
    recompute_statistics: bool = False  # of batch norm, for each network
    zoo: ZooArguments | None = None  # how a network is trained on one of the tasks of a family
    seed: int = 0  # of that training
    snapshots: torch.Tensor | None = None  # (K, D)
    conditions: torch.Tensor | None = None  # (K, width), all known
    _trained: dict = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)  # on the files of `cache`

    def task(self, choice: Choice) -> ClassificationTask:
        return self.family.task({name: choice.task[name] for name in self.family.fields})  # type: ignore[return-value]

    @cached_property
    def snapshot_scores(self) -> Scores:
        """Of a single task; a run that was evaluated has them already."""
        return self.score(Choice(), self.snapshots)

    @torch.no_grad()
    def score(self, choice: Choice, parameters: torch.Tensor, most: int | None = None) -> Scores:
        """Scores on the test examples of a task that a report looks at, or on `most` of them, without probabilities."""
        cache = None if self.family.fields else self.cache
        scorer = Scorer(self.task(choice), self.model, self.layout, cache, self.recompute_statistics)
        if not self.family.fields and most is None:
            with self._lock:
                return scorer.score("test", parameters)
        most = min(most or EXAMPLES, self.family.num_examples("test"))
        predictions, true = torch.empty(len(parameters), most).long(), torch.empty(most).long()
        whole = scorer.complete(parameters)
        for rows, examples, logits, labels in predict_logits(scorer.task, scorer.models, "test", whole, most):
            predictions[rows, examples], true[examples] = logits.argmax(-1).cpu(), labels.cpu()
        return Scores(accuracy(predictions, true), predictions, labels=true)

    def nearest(self, choice: Choice) -> int | None:
        """Which snapshot is the last one of the seen task that is nearest in what is known."""
        fields = self.family.fields
        if self.conditions is None or not choice.told or not fields:
            return None
        known = torch.tensor([name in choice.told for name in fields])[fields.feature_fields()]
        own = fields.table([{name: choice.task[name] for name in fields}])
        features = fields.features(torch.cat([own, self.conditions]))[:, known]
        distances = (features[1:] - features[0]).square().sum(1)
        return int(torch.nonzero(distances == distances.min())[-1])

    def train(self, choice: Choice) -> None:
        """Trains a network on the task itself, as for a report, while others are shown; the last one is kept."""
        if self._trained.get("task") != choice.task:
            loop, family = Loop(Accelerator(), named_seed(self.seed, "oracles")), copy.copy(self.family)
            networks = NetworkRunner(copy.deepcopy(self.model), self.layout)
            table = family.fields.table([choice.task])
            network = train_specialists(loop, family, networks, table, replace(self.zoo, num_snapshots=1))[-1][0]
            self._trained = {"task": choice.task, "network": network}

    def others(self, choice: Choice) -> dict[str, float]:
        """What a reader could have without a generator, with its accuracy; what was learned from comes first."""
        networks, nearest = {}, self.nearest(choice)
        if nearest is not None:
            networks["nearest snapshot"] = self.snapshots[nearest]
        networks["base model"] = self.layout.flatten(self.model.state_dict()).cpu()
        if (kept := self._trained).get("task") == choice.task:
            networks[TRAINED] = kept["network"]
        scores = self.score(choice, torch.stack(list(networks.values())))
        found = dict(zip(networks, scores.values.tolist(), strict=True))
        if self.snapshots is not None and not self.family.fields:
            found = {"snapshots": self.snapshot_scores.values.nanmean().item()} | found
        return found

    def show(self, choice: Choice, parameters: torch.Tensor, train: bool = False) -> tuple[str, str]:
        """
        HTML: some test examples with what a network of shape `(D,)` answers, and its accuracy beside others. With
        `train` there is room for that of a network trained on the task.
        """
        scores = self.score(choice, parameters.unsqueeze(0))
        accuracy, count = scores.values.item(), len(scores.labels)
        shown = evenly(count, PICTURES)
        figures = self._figures(choice, evenly(self.family.num_examples("test"), count)[shown], scores[:1], shown)
        others = self.others(choice)
        bars = {"generated": accuracy} | ({TRAINED: others.get(TRAINED)} if train else {}) | others
        notes = f"Accuracy on {count:,} test examples of this task, ± {sampling_error(accuracy, count):.1f}."
        if (nearest := self.nearest(choice)) is not None:
            condition = self.family.fields.conditions(self.conditions[nearest : nearest + 1])[0]
            notes += f" The nearest snapshot is for {in_words(condition)}."
        return figures, "".join(_bar(*bar) for bar in bars.items()) + f'<p class="note">{html.escape(notes)}</p>'

    def _figures(self, choice: Choice, rows: torch.Tensor, scores: Scores, shown: torch.Tensor) -> str:
        """HTML of the test examples `rows`, which are the columns `shown` of the scores of one network."""
        task, base = self.task(choice), getattr(self.family, "base", None)
        batch = load_batch(task, "test", rows.tolist(), torch.device("cpu"))
        preparation = getattr(base.load_split("test"), "preparation", None) if base else None
        kind, bodies = "texts", [""] * len(rows)
        if "pixel_values" in batch and preparation is not None:
            mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (preparation.mean, preparation.std))
            pixels = (batch["pixel_values"].cpu() * std + mean).round().clamp(0, 255).byte()
            kind, bodies = "images", list(map(_picture, pixels))
        elif "input_ids" in batch:
            texts = base.processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
            bodies = list(map(html.escape, texts))
        names = ("negative", "positive") if isinstance(self.family, LabelGroups) else getattr(base, "class_names", None)
        figures = []
        for body, pair in zip(
            bodies, zip(scores.predictions[0][shown], scores.labels[shown], strict=True), strict=True
        ):
            answer, label = (html.escape(str(names[int(i)] if names else int(i))) for i in pair)
            mark, caption = ("right", f"✓ {answer}") if answer == label else ("wrong", f"✗ {answer}<br>is {label}")
            figures.append(f'<figure class="{mark}">{body}<figcaption>{caption}</figcaption></figure>')
        return f'<div class="{kind}">{"".join(figures)}</div>'

    def describe(self, choice: Choice, scores: Scores) -> str:
        """Markdown: the accuracies of networks that were sampled here, on the task that they were sampled for."""
        beside = ", ".join(f"{name} {value:.2f} %" for name, value in self.others(choice).items())
        values, count = scores.values, len(scores.labels)
        what = f" for {in_words(choice.task)}" if choice.task else ""
        return (
            f"**{len(values)} networks sampled here**{what}: accuracy {values.mean():.2f} % on average, from "
            f"{values.min():.2f} to {values.max():.2f} %, on {count:,} test examples "
            f"(± {sampling_error(values.mean().item(), count):.2f}). Beside them: {beside}."
        )


def _bar(name: str, accuracy: float | None) -> str:
    value, mark = "…" if accuracy is None else f"{accuracy:.1f} %", " first" if name == "generated" else ""
    bar = f'<span class="track"><i style="width:{accuracy or 0:.1f}%"></i></span>'
    return f'<div class="row{mark}"><span>{name}</span>{bar}<span>{value}</span></div>'


def _picture(pixels: torch.Tensor) -> str:
    """HTML of an image, uint8 of shape `(C, H, W)`."""
    mode, array = ("L", pixels[0]) if len(pixels) == 1 else ("RGB", pixels[:3].movedim(0, -1))
    file = io.BytesIO()
    Image.fromarray(array.contiguous().numpy(), mode).save(file, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="">'


def frame(shown: str, choice: Choice | None = None) -> str:
    """HTML of a part of the page, below a line that says for which choice a network is."""
    text = ""
    if choice is not None:
        what = f" for <b>{html.escape(in_words(choice.condition))}</b>" if choice.task else ""
        text = f'<p class="note">A new network{what}: the first that <i>Sample</i> gives.'
        if untold := ", ".join(name for name in choice.task if name not in choice.told):
            task = html.escape(in_words(choice.task))
            text += f" The generator samples {html.escape(untold)} from the seen tasks; here the task has {task}."
        text += "</p>"
    return f'<div class="at-work">{text}{shown}</div>'


def as_code(condition: Condition) -> str:
    """A condition as Python has it."""
    shown = {name: [round(x, 6) for x in v] if isinstance(v, list) else v for name, v in condition.items()}
    return json.dumps(shown, ensure_ascii=False)
