"""
A page to explore a generator in the browser.

    pip install -e ".[app]"
    python scripts/app.py outputs/digits             # a run: its task and snapshots are used as well
    python scripts/app.py user/generator             # a Hub id, with the report in its repository

As a Space: this file beside an `app.py` of its own, with `build_app("user/generator").launch(**LAUNCH)` in it.
"""

import argparse
import html
import os
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

import gradio as gr
import pandas as pd
import torch
import yaml
from accelerate.utils import send_to_device
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from matplotlib.figure import Figure
from safetensors.torch import save
from transformers.utils import logging as transformers_logging

from pdiff_hf import LayoutError, PDiffPipeline
from pdiff_hf.evaluation.metrics import accuracy, max_iou
from pdiff_hf.evaluation.plots import GENERATED, OTHERS, SNAPSHOTS
from pdiff_hf.evaluation.render import format_summary
from pdiff_hf.evaluation.scores import ClassifierScores
from pdiff_hf.evaluation.scoring import Scorer, make_scorer
from pdiff_hf.run.recipe import Recipe
from pdiff_hf.run.task import make_task
from pdiff_hf.snapshots import load_snapshots, parameter_matrix
from pdiff_hf.tasks import ClassificationTask, take
from pdiff_hf.tasks.labels import LabelledTask
from pdiff_hf.utils import names
from pdiff_hf.utils.reports import load_report

MAX_MODELS = 500
MAX_STEPS = 1000
MAX_BYTES = 2**30  # of all networks that are sampled at once
WATCHED = 5  # networks whose way through the reverse process is drawn
WATCHED_STEPS = 40  # of a longer process so many are drawn
WATCHED_EXAMPLES = 500  # test examples for the accuracy along the way
HEAT_MAP_ROWS, HEAT_MAP_COLUMNS = 50, 512
SCHEDULERS = {
    "DPM-Solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}),
    "DDIM": (DDIMScheduler, {"clip_sample": False}),  # latents are not images between -1 and 1
    "DDPM": (DDPMScheduler, {"clip_sample": False}),
}
# Colour, marker and size of a group of networks.
STYLES = {
    "snapshots": (SNAPSHOTS, "o", 18),
    "baselines (mean of each)": (OTHERS[0], "s", 26),
    "generated for the report": (OTHERS[1], "^", 26),
    "sampled here": (GENERATED, "*", 60),
}
# Fonts of the reader's own machine: the page asks no other server for anything.
LAUNCH = {
    "theme": gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    "css": "table { display: block; overflow-x: auto; white-space: nowrap; }"
    ".picture img { max-height: 65vh; object-fit: contain; }",
    "footer_links": [],
    "ssr_mode": False,
}
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


@dataclass
class Source:
    """
    What is known of a generator.

    Args:
        pipe (`PDiffPipeline`): The generator.
        report (`dict`, *optional*): Its `report.json`.
        scorer (`Scorer`, *optional*): Of the run's task; with it come the run's `snapshots`, shape `(K, D)`.
        snapshots (`torch.Tensor`, *optional*): See there.
        missing (`list[str]`): What is not available, in words for the reader.
    """

    pipe: PDiffPipeline
    report: dict | None = None
    scorer: Scorer | None = None
    snapshots: torch.Tensor | None = None
    missing: list[str] = field(default_factory=list)


@lru_cache(maxsize=2)
def load_source(name: str) -> Source:
    """
    Args:
        name (`str`): Folder of a run or of a pipeline, or a Hub id.

    Raises:
        ValueError, OSError, HTTPError: if there is no generator.
    """
    if not name:
        raise ValueError("name a generator: a Hub id such as user/generator, or a folder")
    folder = Path(name)
    is_local = folder.is_dir()
    if is_local and "SPACE_ID" in os.environ:
        raise ValueError("a Space reads no folders; name a Hub id")
    if is_local and (folder / PDiffPipeline.config_name).is_file():
        pipeline, folder = folder, folder.resolve().parent
    else:
        pipeline = names.generator_folder(folder) if is_local else name
    if is_local and not (Path(pipeline) / PDiffPipeline.config_name).is_file():
        raise ValueError(f"'{name}' holds neither a pipeline nor a run with a finished one")
    pipe = PDiffPipeline.from_pretrained(pipeline, use_safetensors=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    source = Source(pipe)
    try:
        source.report = _load_report(folder if is_local else name)
        if source.report is None:
            source.missing.append("its report: it has not been evaluated")
    except ValueError as error:
        source.missing.append(f"its report: {_one_line(error)}")
    if source.report is not None and "max_iou" not in source.report["groups"][0]:
        source.report = None
        source.missing.append("its report, which is not one of classifiers: see report.md beside the pipeline")
    if not is_local:
        source.missing.append(
            "the accuracy of what is sampled here: a repository has no snapshots to compare with. Open the run's folder"
        )
    elif not (folder / "recipe.yaml").is_file():
        source.missing.append("the accuracy of what is sampled here: the folder is not that of a run")
    else:
        try:
            _load_task(source, folder)
        except (ValueError, OSError, TypeError) as error:
            source.missing.append(f"the accuracy of what is sampled here: {_one_line(error)}")
    return source


def _load_report(where: Path | str) -> dict | None:
    path = f"{names.EVALUATION}/{names.REPORT}"
    try:
        path = Path(where, path) if isinstance(where, Path) else hf_hub_download(where, path)
        return load_report(path)
    except (EntryNotFoundError, FileNotFoundError):
        return None


def _load_task(source: Source, folder: Path) -> None:
    """The snapshots of a run, and what scores networks on its task."""
    recipe = Recipe(**yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    snapshots, layout = load_snapshots(recipe.snapshots or folder / names.SNAPSHOTS)
    if layout != source.pipe.autoencoder.layout:
        raise LayoutError("the snapshots beside the pipeline are of other tensors")
    task = make_task(recipe)
    if not isinstance(task, ClassificationTask):
        raise ValueError(f"networks for {recipe.task} are not classifiers; scripts/evaluate.py measures them")
    model = source.pipe.base_model or task.load_saved(folder / names.BASE_MODEL).to(source.pipe.device)
    if isinstance(task, LabelledTask):
        task.align(model.config)
    source.scorer = make_scorer(task, model, layout, cache_dir=folder / names.SCORES)
    source.snapshots = parameter_matrix(snapshots, layout)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"


def _message(error: BaseException) -> gr.Error:
    return gr.Error(html.escape(_one_line(error)), print_exception=False)


# -------------------------------------------------------------------------------------------------------- what is shown


def describe(name: str, source: Source) -> str:
    """Markdown: what the generator makes, how it did, and what is not available here."""
    layout, base_model = source.pipe.autoencoder.layout, source.pipe.base_model
    what = "a network that is not part of it"
    if base_model is not None:
        what = f"`{getattr(base_model.config, 'architecture', base_model.config.model_type)}`"
    lines = [f"**`{name}`** generates {layout.num_parameters:,} parameters in {len(layout.names)} tensors of {what}."]
    if source.report is not None:
        lines.append(f"**Verdict of its report:** {source.report['verdict']}")
    lines += [f"*Not available:* {text}." for text in source.missing]
    return "\n\n".join(lines)


def compare(
    source: Source, scores: ClassifierScores | None = None
) -> tuple[dict[str, tuple[list[float], list[float]]], str]:
    """
    Similarities and accuracies by group, a point a network (of the baselines, a point a setting), and what the reader
    needs to know about them.

    Args:
        scores (`ClassifierScores`, *optional*): Of networks that were sampled here, on the test split.
    """
    points: dict[str, tuple[list[float], list[float]]] = {}
    if source.report is not None:
        groups = {group["name"]: group for group in source.report["groups"]}
        iou = {row["name"]: row["iou"] for row in source.report["audit"]["rows"]}
        baselines = [group for group in groups.values() if group["family"] is not None]
        points["snapshots"] = iou["snapshots"], groups["snapshots"]["scores"]
        if baselines:
            means = [group["max_iou"] for group in baselines], [group["score_mean"] for group in baselines]
            points["baselines (mean of each)"] = means
        points["generated for the report"] = iou["generated"], groups["generated"]["scores"]
    if scores is None:
        if not points:
            rest = " yet; sample, to see how these networks do." if source.scorer else "."
            return points, f"There is nothing to compare: there is no report{rest}"
        return points, "" if source.scorer else "Networks that are sampled here are not in this figure: see above."
    originals = source.scorer.score("test", source.snapshots)
    of_originals = accuracy(originals.predictions, originals.labels)
    points["snapshots"] = max_iou(originals.wrong, originals.wrong, exclude_self=True).tolist(), of_originals.tolist()
    accuracies, similarities = accuracy(scores.predictions, scores.labels), max_iou(scores.wrong, originals.wrong)
    points["sampled here"] = similarities.tolist(), accuracies.tolist()
    text = (
        f"**{len(accuracies)} networks sampled here:** test accuracy {accuracies.mean():.2f} % on average, from "
        f"{accuracies.min():.2f} to {accuracies.max():.2f} %; the originals have {of_originals.mean():.2f} %. Maximum "
        f"similarity to an original {similarities.nanmean():.3f} on average."
    )
    return points, text


def draw_points(points: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    """Draws what `compare` returns."""
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")  # small, so that a phone shows legible letters
    axes = figure.subplots()
    for name, (similarities, accuracies) in points.items():
        colour, marker, size = STYLES[name]
        # A report has None for what cannot be said of a network that never errs.
        known = [(x, y) for x, y in zip(similarities, accuracies, strict=True) if x is not None]
        axes.scatter(*zip(*known, strict=True), s=size, c=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
    axes.margins(0.06)
    axes.set_xlabel("maximum IoU of wrong predictions to the originals\n(left: less similar)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=200)


def draw_heat_map(source: Source, parameters: torch.Tensor, path: Path) -> None:
    """
    Draws how far the parameters of networks, shape `(N, D)`, lie from the mean of the snapshots, in units of each
    tensor's standard deviation; below those of the snapshots where they are available.
    """
    autoencoder = source.pipe.autoencoder
    groups = {"sampled": parameters} | ({} if source.snapshots is None else {"originals": source.snapshots})
    columns = _evenly(parameters.shape[1], HEAT_MAP_COLUMNS)
    figure = Figure(figsize=(5.4, 1.8 * len(groups) + 0.8), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        rows = group[_evenly(len(group), HEAT_MAP_ROWS)].to(autoencoder.device)
        values = autoencoder.normalize(rows)[:, columns.to(autoencoder.device)].cpu()
        image = axes.imshow(values, cmap="PuOr", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
        axes.set_yticks([])
        axes.set_ylabel(f"{name}\n({len(rows)} of {len(group)})")
    ticks = torch.linspace(0, len(columns) - 1, min(5, len(columns))).long()
    axes.set_xticks(ticks.tolist(), [str(int(columns[tick])) for tick in ticks])
    axes.set_xlabel("index of the parameter")
    figure.colorbar(image, ax=panels, label="deviation (std)", extend="both", aspect=30)
    figure.savefig(path, dpi=200)


def _evenly(count: int, limit: int) -> torch.Tensor:
    """At most `limit` indices below `count`, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, limit)).round().long()


def write_zip(source: Source, parameters: torch.Tensor, path: Path) -> None:
    """The generated tensors of every network as a safetensors file of its own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # weights do not get smaller
        for i, row in enumerate(parameters):
            tensors = {name: t.clone() for name, t in source.pipe.autoencoder.layout.unflatten(row).items()}
            archive.writestr(f"network-{i:05d}.safetensors", save(tensors))


class Watcher:
    """
    What is drawn of the reverse process: of a few networks at every step the distance to the mean of the snapshots, in
    standard deviations (1 is where snapshots lie), and the accuracy on some test examples if there is a task.
    """

    def __init__(self, source: Source):
        self.source = source
        self.batch = None
        if source.scorer is not None:
            task = source.scorer.task
            split = task.load_split("test")
            batch = task.collate(take(split, _evenly(len(split), WATCHED_EXAMPLES).tolist()))
            self.batch = send_to_device(batch, source.pipe.device)
        self.distances, self.accuracies = [], []

    @torch.no_grad()
    def add(self, step: int, latents: torch.Tensor) -> None:
        """Latents of shape `(n, L)` after so many steps."""
        autoencoder = self.source.pipe.autoencoder
        parameters = autoencoder.decode(latents).sample
        distances = autoencoder.normalize(parameters).square().mean(1).sqrt().tolist()
        self.distances += [(step, str(i), value) for i, value in enumerate(distances)]
        if self.batch is not None:
            task, labels = self.source.scorer.task, self.batch["labels"]
            for rows, logits in self.source.scorer.models(lambda call: task.predict(call, self.batch), parameters):
                correct = (100 * (logits.argmax(-1) == labels).double().mean(-1)).round(decimals=2)
                numbers = range(rows.start, rows.stop)
                self.accuracies += [(step, str(i), v) for i, v in zip(numbers, correct.tolist(), strict=True)]

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        return (
            pd.DataFrame(self.distances, columns=["step", "network", "distance"]),
            pd.DataFrame(self.accuracies, columns=["step", "network", "accuracy"]),
        )


# --------------------------------------------------------------------------------------------------------- what is done


class Closed(Exception):
    """Ends sampling that nobody waits for any more."""


def make_scheduler(name: str, source: Source) -> SchedulerMixin:
    """For the same diffusion as the pipeline's own."""
    scheduler_class, settings = SCHEDULERS[name]
    return scheduler_class.from_config(source.pipe.scheduler.config, **settings)


def sample_latents(
    source: Source, num_models: int, num_steps: int, scheduler: str, seed: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields, while the pipeline runs, how many steps are done, and the latents, shape `(N, L)`."""
    # A pipeline of its own, because schedulers keep state, and another reader may sample as well.
    pipe = PDiffPipeline(source.pipe.autoencoder, source.pipe.denoiser, make_scheduler(scheduler, source))
    pipe.set_progress_bar_config(disable=True)
    steps: SimpleQueue[tuple[int, torch.Tensor] | BaseException | None] = SimpleQueue()
    closed = threading.Event()

    def after_step(pipe, step, timestep, values):
        if closed.is_set():
            raise Closed
        steps.put((step + 1, values["latents"].clone()))
        return values

    def run() -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            pipe(num_models, num_steps, generator, output_type="latent", callback_on_step_end=after_step)
            steps.put(None)
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            steps.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (item := steps.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()


def check_size(source: Source, num_models: int) -> None:
    """Raises a `ValueError` if the networks would be too large together."""
    size = 4 * source.pipe.autoencoder.layout.num_parameters
    if size * num_models > MAX_BYTES:
        raise ValueError(
            f"{num_models} networks of {size / 2**20:.0f} MiB are more than this page samples at once; choose "
            f"{MAX_BYTES // size} at most, or use scripts/generate.py"
        )


def build_app(pipeline_id: str = "") -> gr.Blocks:
    """
    The page.

    Args:
        pipeline_id (`str`, *optional*): The generator that it opens with: a Hub id, the folder of a run or of a
            pipeline. The reader can choose another one; folders not in a Space.
    """

    def open_generator(name):
        try:
            source = load_source(name.strip())
        except (ValueError, OSError, HTTPError) as error:
            raise _message(error) from error
        points, text = compare(source)
        report = "There is no report." if source.report is None else format_summary(source.report)
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder, "accuracy_vs_similarity.png")
            if points:
                draw_points(points, picture)
            yield {
                about: describe(name.strip(), source),
                comparison: gr.Image(picture if points else None, visible=bool(points)),
                comparison_text: text,
                report_text: report,
                accuracies: gr.LinePlot(visible=False),
                distances: gr.LinePlot(visible=False),
                heat: gr.Image(None, visible=False),
                download: gr.DownloadButton("Download networks", None, interactive=False),
                status: "",
            }

    def sample(name, num_models, num_steps, scheduler, seed):
        # All that is to be seen goes out each time, because a browser that falls behind leaves updates out.
        shown = {}
        try:
            source = load_source(name.strip())
            if None in (num_models, num_steps, seed):
                raise ValueError("networks, steps and seed must all be given")
            check_size(source, num_models)
            watcher = Watcher(source)
            every = -(-num_steps // WATCHED_STEPS)
            for step, latents in sample_latents(source, num_models, num_steps, scheduler, seed):
                if step % every == 0 or step == num_steps:
                    watcher.add(step, latents[:WATCHED])
                    far, right = watcher.tables()
                    shown[status] = f"Step {step} of {num_steps} …"
                    shown[distances] = gr.LinePlot(far, visible=True)
                    shown[accuracies] = gr.LinePlot(right, visible=len(right) > 0)
                    yield shown
            parameters = source.pipe.decode_latents(latents)
            done = f"Done: {num_models} networks in {num_steps} steps of {scheduler}, seed {seed}."
            # Gradio has copies of its own of all files when it asks for what follows.
            with tempfile.TemporaryDirectory() as folder:
                archive = Path(folder, "networks.zip")
                write_zip(source, parameters, archive)
                label = f"Download networks ({archive.stat().st_size / 1e6:.1f} MB)"
                shown[download] = gr.DownloadButton(label, archive, interactive=True)
                draw_heat_map(source, parameters, picture := Path(folder, "parameters.png"))
                shown[heat] = gr.Image(picture, visible=True)
                if source.scorer is not None:
                    shown[status] = "Scoring …"
                    yield shown
                    points, shown[comparison_text] = compare(source, source.scorer.score("test", parameters))
                    draw_points(points, picture := Path(folder, "accuracy_vs_similarity.png"))
                    shown[comparison] = gr.Image(picture, visible=True)
                shown[status] = done
                yield shown
        except (ValueError, OSError, HTTPError) as error:
            raise _message(error) from error

    with gr.Blocks(title="pdiff_hf: explore a generator", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown("# Explore a generator of neural networks")
        with gr.Row(equal_height=True):
            name = gr.Textbox(
                pipeline_id,
                label="Generator",
                placeholder="Hub id, or folder of a run or pipeline",
                scale=5,
                max_lines=1,
            )
            open_button = gr.Button("Open", scale=1, min_width=90)
        about = gr.Markdown()
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                num_models = gr.Slider(1, MAX_MODELS, 50, step=1, precision=0, label="Networks")
                num_steps = gr.Slider(1, MAX_STEPS, 20, step=1, precision=0, label="Denoising steps")
                scheduler = gr.Dropdown(list(SCHEDULERS), value="DPM-Solver++", label="Scheduler")
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
                with gr.Row():
                    sample_button = gr.Button("Sample", variant="primary", min_width=100, scale=2)
                    stop_button = gr.Button("Stop", min_width=80, scale=1)
                status = gr.Markdown()
                download = gr.DownloadButton("Download networks", interactive=False)
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Process"):
                    gr.Markdown(f"The first {WATCHED} networks that are sampled, decoded as they are denoised.")
                    line = {
                        "x": "step",
                        "color": "network",
                        "x_title": "denoising steps taken",
                        "visible": False,
                        "min_width": 280,
                    }
                    line |= {"color_map": {str(i): colour for i, colour in enumerate((GENERATED, *OTHERS))}}
                    with gr.Row():
                        distances = gr.LinePlot(
                            y="distance", y_title="std", label="Distance to the mean of the snapshots", **line
                        )
                        accuracies = gr.LinePlot(
                            y="accuracy", y_title="%", label=f"Accuracy on at most {WATCHED_EXAMPLES} examples", **line
                        )
                picture = {"show_label": False, "interactive": False, "buttons": ["download", "fullscreen"]}
                picture |= {"format": "png", "container": False, "visible": False, "elem_classes": "picture"}
                with gr.Tab("Accuracy"):
                    comparison_text = gr.Markdown()
                    comparison = gr.Image(**picture)
                with gr.Tab("Parameters"):
                    gr.Markdown("A row a network: how far its parameters lie from the mean of the snapshots.")
                    heat = gr.Image(**picture)
                with gr.Tab("Report"):
                    report_text = gr.Markdown()

        opened = [about, comparison, comparison_text, report_text, accuracies, distances, heat, download, status]
        gr.on([open_button.click, name.submit], open_generator, name, opened)
        if pipeline_id:
            app.load(open_generator, name, opened)
        sampling = sample_button.click(
            sample,
            [name, num_models, num_steps, scheduler, seed],
            [status, distances, accuracies, comparison, comparison_text, heat, download],
            show_progress="hidden",
            concurrency_limit=1,
        )
        stop_button.click(None, cancels=[sampling]).then(lambda: "Stopped.", None, status)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("pipeline", nargs="?", default="", help="Folder of a run or of a pipeline, or a Hub id.")
    parser.add_argument("--port", type=int, help="By default the first free one from 7860.")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    build_app(args.pipeline).launch(server_port=args.port, **LAUNCH)


if __name__ == "__main__":
    main()
