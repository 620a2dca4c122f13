"""A tab of the page for generators whose networks are data: draw, choose a class, any resolution, half of a datum."""

import base64
import html
import io
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from pdiff_hf import DataTask, PDiffPipeline
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.run.cli import load_config
from pdiff_hf.utils import names

DRAWN, CANDIDATES, SHOWN = 12, 4096, 4
SIGMA = 0.5  # of half a datum: how far what is near enough may be
SIDE = 96  # pixels on the page
PARTS = {"upper half": (0, 1), "lower half": (0, -1), "left half": (1, 1), "right half": (1, -1)}
ANY = "any"
STYLE = "display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:10px"


@dataclass
class DataAtWork:
    """A generator of data, with the data that it was made from."""

    pipe: PDiffPipeline
    task: DataTask

    @cached_property
    def networks(self) -> NetworkRunner:
        return NetworkRunner(self.pipe.need_base_model("a datum"), self.pipe.autoencoder.layout)

    @cached_property
    def train(self) -> torch.Tensor:
        """Training data, flat, shape `(N, P C)`."""
        return self.task.data(self.task.signals("train")).flatten(1)

    @cached_property
    def candidates(self) -> torch.Tensor:
        """Networks to choose from where half of a datum is known, shape `(n, D)`."""
        (found,) = self.pipe(
            CANDIDATES, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False
        )
        return found

    def words(self) -> tuple[str, list[str]]:
        """The first field of words, and its words."""
        fields = [] if self.pipe.condition_encoder is None else self.pipe.condition_encoder.fields.items()
        return next(((name, list(field.choices)) for name, field in fields if field.choices), ("", []))

    def nearest(self, outputs: torch.Tensor) -> torch.Tensor:
        """The training data that outputs `(N, P, C)` are nearest to, as signals."""
        found = torch.cdist(self.task.data(outputs).flatten(1), self.train).argmin(1)
        return self.task.signals("train")[found]

    def draw(self, word: str, guidance: float, resolution: int, seed: int) -> str:
        """HTML: new data, each beside the training datum that it is nearest to."""
        name, words = self.words()
        condition = {name: word} if word in words else None
        guided = {"guidance_scale": guidance} if self.pipe.denoiser.knows_no_condition else {}
        generator = torch.Generator().manual_seed(int(seed))
        (found,) = self.pipe(
            DRAWN, generator=generator, condition=condition, output_type="pt", return_dict=False, **guided
        )
        nearest = self.nearest(self.task.render_all(self.networks, found))
        large = self.task.render_all(self.networks, found, self.task.coordinates(int(resolution)))
        pairs = zip(self._pictures(large), self._pictures(nearest), strict=True)
        cells = (f'<figure>{new}<div style="height:4px"></div>{old}</figure>' for new, old in pairs)
        about = (
            "<p>Above what is generated, at that resolution, and below the training datum that is nearest to it.</p>"
        )
        return f'{about}<div style="{STYLE}">{"".join(cells)}</div>'

    def complete(self, number: int, part: str) -> str:
        """HTML: a held-out datum, the half of it that is known, and what networks say of the rest."""
        coordinates, signal = self.task.coordinates(), self.task.signals("test")[int(number)]
        axis, sign = PARTS[part]
        known = sign * coordinates[:, axis] < 0
        output = self.pipe.posterior(
            {"coordinates": coordinates[known], "labels": signal[known]},
            num_candidates=1,
            candidates=self.candidates,
            loss="mse",
            sigma=SIGMA,
            generator=torch.Generator().manual_seed(0),
        )
        outputs = self.task.render_all(self.networks, output.parameters)
        mean = (output.weights[:, None, None] * outputs).sum(0)
        half = torch.where(known.unsqueeze(1), signal, torch.zeros_like(signal))
        shown = {"held-out datum": signal, "known": half, "posterior mean": mean}
        order = output.weights.argsort(descending=True)[:SHOWN]
        shown |= {f"network {i + 1}": outputs[row] for i, row in enumerate(order.tolist())}
        shown |= {"nearest training datum": self.nearest(signal[None])[0]}
        pictures = self._pictures(torch.stack(list(shown.values())))
        cells = (
            f"<figure>{picture}<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, picture in zip(shown, pictures, strict=True)
        )
        return f'<div style="{STYLE}">{"".join(cells)}</div>'

    def _pictures(self, outputs: torch.Tensor) -> list[str]:
        images = self.task.images(outputs)
        if images is None:
            return ["<i>no image</i>"] * len(outputs)
        return [_picture(image) for image in images]


def _picture(image: torch.Tensor) -> str:
    pixels = (255 * image).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" style="width:{SIDE}px;image-rendering:pixelated" src="data:image/png;base64,{data}">'


def load_data(name: str) -> DataAtWork | None:
    """Of the folder of a run whose networks are data, with its latest generator; None for anything else."""
    files = [Path(name, names.RECIPE), Path(name, names.PIPELINE, "model_index.json")]
    if not name or not all(file.is_file() for file in files):
        return None
    return _load_data(name, *(file.stat().st_mtime_ns for file in files))


@lru_cache(maxsize=2)
def _load_data(name: str, *changed: int) -> DataAtWork | None:
    """What a folder holds whose files were `changed` then."""
    try:
        config = load_config(Path(name, names.RECIPE))
        task = None if config.is_of_data is False or config.family is not None else config.make_task()
    except Exception:  # such as data that have gone: the page says why networks are not at work
        return None
    if not isinstance(task, DataTask):
        return None
    pipe = PDiffPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    if pipe.base_model is None:
        pipe = PDiffPipeline.from_pretrained(name, base_model=task.load_saved(Path(name, names.BASE_MODEL)))
    return DataAtWork(pipe, task)


def data_tab(name: gr.Textbox, opened: Any, tabs: gr.Tabs) -> None:
    """
    Adds the tab, to be called among the others.

    Args:
        name (`gr.Textbox`): What the reader has named.
        opened: A component that changes when a generator has been opened.
        tabs (`gr.Tabs`): Of the page, of which this one is shown first where there are data.
    """
    with gr.Tab("Data", id="data", visible=False) as tab:
        with gr.Row():
            word = gr.Dropdown([ANY], value=ANY, label="condition", interactive=True, min_width=120)
            guidance = gr.Slider(1, 4, 1, step=0.5, label="guidance", min_width=120)
            resolution = gr.Slider(4, 64, 32, step=4, precision=0, label="resolution", min_width=120)
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="seed", min_width=80)
        drawn = gr.HTML()
        with gr.Row():
            number = gr.Slider(0, 1, 0, step=1, precision=0, label="held-out datum", min_width=160)
            part = gr.Radio(list(PARTS), value="upper half", label="what is known of it")
        completed = gr.HTML()
    settings, half = [word, guidance, resolution, seed], [number, part]

    def reopen(where: str) -> dict[Any, Any]:
        data = load_data(where.strip())
        if data is None:
            return {tab: gr.Tab(visible=False), drawn: "", completed: ""}
        _, words = data.words()
        return {
            tab: gr.Tab(visible=True),
            tabs: gr.Tabs(selected="data"),
            word: gr.Dropdown([ANY, *words], value=ANY),
            guidance: gr.Slider(interactive=data.pipe.denoiser.knows_no_condition),
            number: gr.Slider(maximum=len(data.task.signals("test")) - 1, value=0),
            drawn: data.draw(ANY, 1, 32, 0),
            completed: data.complete(0, "upper half"),
        }

    def draw(where: str, *values: Any) -> str:
        data = load_data(where.strip())
        return "" if data is None or None in values else data.draw(*values)

    def complete(where: str, *values: Any) -> str:
        data = load_data(where.strip())
        return "" if data is None or None in values else data.complete(*values)

    latest: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
    opened.change(reopen, name, [tab, tabs, *settings[:2], number, drawn, completed], show_progress="hidden")
    gr.on([box.input for box in settings], draw, [name, *settings], drawn, **latest)
    gr.on([box.input for box in half], complete, [name, *half], completed, **latest)
