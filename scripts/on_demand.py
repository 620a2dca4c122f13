"""What the page shows of a generator with conditions: what a reader says of a task, and its network at work."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from PIL import Image
from torch import nn

from pdiff_hf import ParameterLayout
from pdiff_hf.evaluation.plots import plot_field
from pdiff_hf.evaluation.report import Report
from pdiff_hf.evaluation.scatter import sampling_error
from pdiff_hf.evaluation.score import ClassifierScores, Scorer, make_scorer
from pdiff_hf.models import ConditionEncoder
from pdiff_hf.models.condition import Condition
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.scripts.watch import LETTERS
from pdiff_hf.tasks.family import Family
from pdiff_hf.tasks.image_families import ImageFamily
from pdiff_hf.tasks.label_groups import GroupedFamily

EXAMPLES = 500  # test examples that the networks are run on
PICTURES = 24  # of them so many are shown
CHECKBOXES = 32  # a longer vector of bits is a text
GENERATED = "generated"
CSS = """
.at-work .row { display: grid; grid-template-columns: 9.5em 1fr 4.2em; align-items: center; gap: 8px; margin: 4px 0; }
.at-work .row > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
.at-work .track { height: 12px; background: var(--border-color-primary); border-radius: 3px; overflow: hidden; }
.at-work .track i { display: block; height: 100%; background: var(--body-text-color-subdued); }
.at-work .first { font-weight: 600; }
.at-work .first .track i { background: #D55E00; }
.at-work .note { font-size: 0.9em; margin: 6px 0; }
.at-work .images { display: grid; grid-template-columns: repeat(auto-fill, minmax(58px, 1fr)); gap: 8px; }
.at-work figure { margin: 0; text-align: center; border: 2px solid transparent; border-radius: 4px; padding: 2px; }
.at-work figure.wrong { border: 2px dashed var(--body-text-color); }
.at-work figure img { width: 100%; image-rendering: pixelated; display: block; }
.at-work figcaption { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Choice:
    """
    What a reader has chosen.

    Args:
        task (`dict`): The value of every field.
        told (`tuple[str, ...]`): The fields that the generator is told; it draws the others.
    """

    task: dict[str, Any]
    told: tuple[str, ...]

    @property
    def condition(self) -> dict[str, Any]:
        """What the generator is told."""
        return {name: self.task[name] for name in self.told}


def in_words(condition: Condition) -> str:
    """A condition in a sentence."""
    return ", ".join(f"{name} {_short(value)}" for name, value in condition.items()) or "nothing known of the task"


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = " ".join(f"{number:g}" for number in value[:CHECKBOXES])
        return f"[{shown}{' …' if len(value) > CHECKBOXES else ''}]"
    return value if isinstance(value, str) else f"{value:.4g}"


# ------------------------------------------------------------------------------------------------------------- controls


def first_choice(encoder: ConditionEncoder) -> Choice:
    """What the controls show at first."""
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
        raise ValueError(
            f"'{name}' must be {field}, and it is empty; take it out of what the generator is told instead"
        )
    if field.bounds or field.choices:
        return value
    if bits_of(encoder, name):
        return [float(i in value) for i in range(field.width)]
    try:
        return field.read(value)
    except ValueError as error:
        raise ValueError(f"'{name}' must be {field}: {error}") from error


def read_choice(encoder: ConditionEncoder, values: Sequence[Any], told: Sequence[str]) -> Choice:
    """
    What the controls say, one value for each field.

    Raises:
        ValueError: for a value that its field cannot have.
    """
    task = {name: from_control(encoder, name, value) for name, value in zip(encoder.fields, values, strict=True)}
    encoder.fields.table([task])
    return Choice(task, tuple(name for name in encoder.fields if name in told))


# -------------------------------------------------------------------------------------------------------------- at work


class AtWork:
    """
    Networks at work on the test data of a family's tasks.

    Args:
        family (`Family`): Of the tasks.
        model (`nn.Module`): The base model, on the device to compute on.
        layout (`ParameterLayout`): The tensors that are generated.
    """

    snapshots: torch.Tensor | None = None  # (K, D), those whose conditions are known
    conditions: torch.Tensor  # (K, width)

    def __init__(self, family: Family, model: nn.Module, layout: ParameterLayout):
        self.family, self.model, self.layout = family, model, layout
        self.device = next(model.parameters()).device

    def set_snapshots(self, parameters: torch.Tensor, table: torch.Tensor) -> None:
        """Networks of seen tasks, shape `(K, D)`, with their conditions, shape `(K, width)`."""
        known = self.family.fields.known(table).all(1)
        if known.any():
            self.snapshots, self.conditions = parameters[known], table[known]

    def nearest(self, choice: Choice) -> int | None:
        """Which snapshot is the last one of the seen task that is nearest in what is known."""
        if self.snapshots is None or not choice.told:
            return None
        fields = self.family.fields
        known = torch.tensor([name in choice.told for name in fields])[fields.feature_fields()]
        features = fields.features(torch.cat([fields.table([choice.task]), self.conditions]))[:, known]
        distances = (features[1:] - features[0]).square().sum(1)
        return int(torch.nonzero(distances == distances.min())[-1])

    def others(self, choice: Choice) -> dict[str, torch.Tensor]:
        """What a reader could have without a generator, parameters of shape `(D,)` by name."""
        networks = {"base model": self.layout.flatten(self.model.state_dict()).cpu()}
        nearest = self.nearest(choice)
        if nearest is not None and self.snapshots is not None:
            networks["nearest seen task"] = self.snapshots[nearest]
        return networks

    def scorer(self, choice: Choice) -> Scorer[ClassifierScores]:
        """Scores networks on the whole test data of one task."""
        return make_scorer(self.family.task(choice.task), self.model, self.layout)

    def reference(self, choice: Choice) -> tuple[str, ClassifierScores]:
        """What the accuracy of sampled networks is compared with: its name, and its scores on the test data."""
        name, parameters = list(self.others(choice).items())[-1]
        return name, self.scorer(choice).score("test", parameters.unsqueeze(0))

    @torch.no_grad()
    def predict(self, choice: Choice, parameters: torch.Tensor) -> tuple[dict, torch.Tensor]:
        """A batch of the task's test data, and what networks, shape `(N, D)`, predict on it, shape `(N, B)`."""
        total = self.family.num_examples("test")
        indices = torch.linspace(0, total - 1, min(EXAMPLES, total)).round().long()
        table = self.family.fields.table([choice.task]).to(self.device)
        batch = {name: values[0] for name, values in self.family.batch("test", table, indices).items()}
        models = NetworkRunner(self.model, self.layout)
        logits = [part for _, part in models(lambda call: self.family.predict(call, batch), parameters)]
        return batch, torch.cat(logits).argmax(-1)

    def show(self, choice: Choice, parameters: torch.Tensor) -> str:
        """
        HTML: the accuracy of a network of shape `(D,)` beside those that need no generator, and some test images with
        what it predicts.
        """
        networks = {GENERATED: parameters} | self.others(choice)
        batch, predicted = self.predict(choice, torch.stack(list(networks.values())))
        right = predicted == batch["labels"]
        accuracies = dict(zip(networks, (100 * right.double().mean(1)).tolist(), strict=True))
        error = sampling_error(accuracies[GENERATED], right.shape[1])
        notes = [f"Accuracy on {right.shape[1]} test examples of this task, ± {error:.1f} for the first."]
        nearest = self.nearest(choice)
        if nearest is not None:
            condition = self.family.fields.conditions(self.conditions[nearest : nearest + 1])[0]
            notes.append(f"The nearest seen task: {in_words(condition)}.")
        shown = torch.linspace(0, right.shape[1] - 1, min(PICTURES, right.shape[1])).round().long()
        parts = [
            *(_bar(name, value, name == GENERATED) for name, value in accuracies.items()),
            f'<p class="note">{html.escape(" ".join(notes))}</p>',
            *self._pictures({name: values[shown] for name, values in batch.items()}, predicted[0][shown]),
        ]
        return "".join(parts)

    def _pictures(self, batch: Mapping[str, torch.Tensor], predicted: torch.Tensor) -> list[str]:
        if not isinstance(self.family, ImageFamily):
            return ['<p class="note">Its examples are no images.</p>']
        examples = self.family.base.load_split("test")
        preparation = examples.preparation
        mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (preparation.mean, preparation.std))
        pixels = (batch["pixel_values"].cpu() * std + mean).round().clamp(0, 255).byte()
        names = self.class_names
        pairs = [(names[int(a)], names[int(b)]) for a, b in zip(predicted, batch["labels"], strict=True)]
        return ['<div class="images">', *map(_picture, pixels, pairs), "</div>"]

    @property
    def class_names(self) -> list[str]:
        if isinstance(self.family, GroupedFamily):
            return ["negative", "positive"]
        assert isinstance(self.family, ImageFamily)
        return list(map(str, self.family.base.class_names))


def _bar(name: str, accuracy: float, is_first: bool) -> str:
    return (
        f'<div class="row{" first" if is_first else ""}"><span>{name}</span>'
        f'<span class="track"><i style="width:{accuracy:.1f}%"></i></span><span>{accuracy:.1f} %</span></div>'
    )


def _picture(pixels: torch.Tensor, names: tuple[str, str]) -> str:
    """An image, uint8 of shape `(C, H, W)`, with the name of the class that is predicted, and of the true one."""
    predicted, true = map(html.escape, names)
    mode, array = ("L", pixels[0]) if len(pixels) == 1 else ("RGB", pixels[:3].movedim(0, -1))
    file = io.BytesIO()
    Image.fromarray(array.contiguous().numpy(), mode).save(file, "PNG")
    source = base64.b64encode(file.getvalue()).decode()
    is_right = predicted == true
    caption = f"✓ {predicted}" if is_right else f"✗ {predicted}<br>is {true}"
    return (
        f'<figure class="{"right" if is_right else "wrong"}"><img src="data:image/png;base64,{source}" alt="{true}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def frame(choice: Choice, shown: str) -> str:
    """HTML: for which condition what follows is."""
    told, task = html.escape(in_words(choice.condition)), html.escape(in_words(choice.task))
    text = f"A new network for <b>{told}</b>: the first that <i>Sample</i> gives."
    untold = [name for name in choice.task if name not in choice.told]
    if untold:
        text += f" The generator draws {html.escape(', '.join(untold))} from the seen tasks; here the task has {task}."
    return f'<div class="at-work"><p class="note">{text}</p>{shown}</div>'


# -------------------------------------------------------------------------------------------------------------- reports


@rc_context(LETTERS)
def draw_field(report: Report, path: Path) -> str:
    """Draws the accuracies of a report along a field to `path`, if it has them; returns what they are."""
    plot_field(report, path)
    return about_field(report)


def about_field(report: Report) -> str:
    """Markdown: what the figure of `draw_field` shows."""
    field = next((name for name in report.conditions if name in report.fields), None)
    if field is None:
        return "The report has no accuracies along a field."
    fixed = {name: value for name, value in report.conditions[field][0].items() if name != field}
    rest = f"; {in_words(fixed)}" if fixed else ""
    return f"From the report: accuracy on tasks along *{field}*{rest}."


def describe_scores(at_work: AtWork, choice: Choice, scores: ClassifierScores) -> str:
    """Markdown: the accuracies of networks that were sampled here, on the task that they were sampled for."""
    others = at_work.others(choice)
    values = at_work.scorer(choice).score("test", torch.stack(list(others.values()))).values
    beside = ", ".join(f"the {name} {value:.2f} %" for name, value in zip(others, values.tolist(), strict=True))
    accuracy, num_examples = scores.values, len(scores.labels)
    return (
        f"**{len(accuracy)} networks sampled here** for {in_words(choice.task)}: accuracy {accuracy.mean():.2f} % on "
        f"average, from {accuracy.min():.2f} to {accuracy.max():.2f} %, on the {num_examples:,} test examples of this "
        f"task (± {sampling_error(accuracy.mean().item(), num_examples):.2f}). There, {beside}."
    )


def as_code(condition: Condition) -> str:
    """A condition as Python has it."""
    shown = {name: [round(x, 6) for x in v] if isinstance(v, list) else v for name, v in condition.items()}
    return json.dumps(shown, ensure_ascii=False)
