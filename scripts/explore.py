"""What the page shows: a generator and what is known of it, sampling, figures, and the archive of networks."""

import os
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from queue import SimpleQueue

import torch
import yaml
from accelerate.utils import send_to_device
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors.torch import save
from transformers import PreTrainedModel

from pdiff_hf import LayoutError, PDiffPipeline
from pdiff_hf.evaluation.figures import scatter_group
from pdiff_hf.evaluation.metrics import max_iou
from pdiff_hf.evaluation.plots import (
    GENERATED,
    ScatterGroup,
    plot_accuracy_vs_similarity,
    plot_reverse_process,
    sampling_error,
)
from pdiff_hf.evaluation.scores import ClassifierScores
from pdiff_hf.evaluation.scoring import Scorer, make_scorer
from pdiff_hf.networks.adapters import has_adapters
from pdiff_hf.run.export import save_network
from pdiff_hf.run.recipe import Recipe
from pdiff_hf.run.task import make_task
from pdiff_hf.snapshots import load_snapshots, parameter_matrix
from pdiff_hf.tasks import ClassificationTask, take
from pdiff_hf.tasks.labels import LabelledTask
from pdiff_hf.utils import names
from pdiff_hf.utils.reports import load_report

MAX_BYTES = 2**30  # of all networks that are sampled at once, and of their archive
WATCHED = 5  # networks whose way through the reverse process is drawn
WATCHED_EXAMPLES = 500  # test examples for the accuracy along the way
HEAT_MAP_ROWS, HEAT_MAP_COLUMNS = 50, 512
# For the figures of a report, so that a phone shows legible letters, and legends still fit.
LETTERS = {"font.size": 12, "legend.handlelength": 1.2, "legend.handletextpad": 0.5, "legend.columnspacing": 1.0}
FIRST_SCORED = 10  # networks that are drawn first, because the reader waits for them
SCHEDULERS = {
    "DPM-Solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}),
    "DDIM": (DDIMScheduler, {"clip_sample": False}),  # latents are not images between -1 and 1
    "DDPM": (DDPMScheduler, {"clip_sample": False}),
}


@dataclass
class Source:
    """
    What is known of a generator.

    Args:
        pipe (`PDiffPipeline`): The generator.
        location (`str`): Of the pipeline, as `from_pretrained` takes it.
        dataset (`str`, *optional*): What its networks were trained on.
        report (`dict`, *optional*): Its `report.json`.
        scorer (`Scorer`, *optional*): Of the run's task; with it come the run's `snapshots`, shape `(K, D)`.
        snapshots (`torch.Tensor`, *optional*): See there.
        missing (`list[str]`): What is not available, in words for the reader.
    """

    pipe: PDiffPipeline
    location: str = ""
    dataset: str | None = None
    report: dict | None = None
    scorer: Scorer | None = None
    snapshots: torch.Tensor | None = None
    missing: list[str] = field(default_factory=list)

    @cached_property
    def snapshot_scores(self) -> ClassifierScores:
        """Of the snapshots on the test split; a run that was evaluated has them already."""
        return self.scorer.score("test", self.snapshots)

    @property
    def has_whole_networks(self) -> bool:
        """Whether what is generated can be saved as networks that `from_pretrained` loads."""
        return isinstance(self.pipe.base_model, PreTrainedModel)


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
    source = Source(pipe, str(pipeline))
    where = folder if is_local else name
    if recipe := _find_file(where, "recipe.yaml"):
        source.dataset = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("dataset")
    try:
        if path := _find_file(where, f"{names.EVALUATION}/{names.REPORT}"):
            source.report = load_report(path)
        else:
            source.missing.append("its report: it has not been evaluated")
    except ValueError as error:
        source.missing.append(f"its report: {one_line(error)}")
    if source.report is not None and "max_iou" not in source.report["groups"][0]:
        source.report = None
        source.missing.append("its report, which is not one of classifiers: see report.md beside the pipeline")
    if not is_local:
        source.missing.append(
            "the accuracy of what is sampled here: a repository has no snapshots to compare with. Open the run's folder"
        )
    elif recipe is None:
        source.missing.append("the accuracy of what is sampled here: the folder is not that of a run")
    else:
        try:
            _load_task(source, folder)
        except (ValueError, OSError, TypeError) as error:
            source.missing.append(f"the accuracy of what is sampled here: {one_line(error)}")
    return source


def _find_file(where: Path | str, path: str) -> Path | None:
    """A file of a folder or of a repository on the Hub, if it is there."""
    if isinstance(where, Path):
        return where / path if (where / path).is_file() else None
    try:
        return Path(hf_hub_download(where, path))
    except EntryNotFoundError:
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
    source.scorer = make_scorer(task, model, layout, folder / names.SCORES, recipe.recomputes_statistics)
    source.snapshots = parameter_matrix(snapshots, layout)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"


# -------------------------------------------------------------------------------------------------------- what is shown


@rc_context(LETTERS)
def compare(source: Source, path: Path, scores: ClassifierScores | None = None) -> str:
    """
    Draws similarities and accuracies to `path`, if there are any, and returns what the reader needs to know about them.

    Args:
        scores (`ClassifierScores`, *optional*): Of networks that were sampled here, on the test split.
    """
    report, others = source.report, []
    if report is not None:
        baselines = [group for group in report["groups"] if group["family"] is not None]
        others = [scatter_group(report, group["name"], group["family"]) for group in baselines]
        generated = scatter_group(report, "generated", "generated, report")
    if scores is None:
        if report is None:
            rest = " yet; sample, to see how these networks do." if source.scorer else "."
            return f"There is nothing to compare: there is no report{rest}"
        snapshots, num_examples = scatter_group(report, "snapshots", "snapshots"), report["splits"]["test"]
        text = f"The {len(generated.accuracy)} networks of the report on {num_examples:,} test examples. "
        text += "Those that you sample will be " if source.scorer else "Networks that are sampled here are not "
        text += "in this figure." if source.scorer else "in this figure: see above."
    else:
        if report is not None:
            others.append(generated)
        known, num_examples = source.snapshot_scores, len(scores.labels)
        snapshots = ScatterGroup("snapshots", known.values, max_iou(known.wrong, known.wrong, exclude_self=True))
        generated = ScatterGroup("sampled here", scores.values, max_iou(scores.wrong, known.wrong))
        mean = snapshots.accuracy.mean().item()
        text = (
            f"**{len(scores.values)} networks sampled here:** accuracy {scores.values.mean():.2f} % on average, from "
            f"{scores.values.min():.2f} to {scores.values.max():.2f} %; the snapshots have {mean:.2f} %, to which "
            f"{num_examples:,} test examples give ± {sampling_error(mean, num_examples):.2f}. Maximum IoU with a "
            f"snapshot {generated.max_iou.nanmean():.3f} on average."
        )
    plot_accuracy_vs_similarity(path, {"": (snapshots, generated, others)}, num_examples)
    return text


def draw_heat_map(source: Source, parameters: torch.Tensor, path: Path) -> None:
    """
    Draws how far the parameters of networks, shape `(N, D)`, lie from the mean of the snapshots, in units of each
    tensor's standard deviation; below those of the snapshots where they are available.
    """
    autoencoder = source.pipe.autoencoder
    groups = {"sampled": parameters} | ({} if source.snapshots is None else {"snapshots": source.snapshots})
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


def write_zip(source: Source, parameters: torch.Tensor, path: Path, whole: bool) -> None:
    """
    Every network as a folder that `from_pretrained` loads, or else its generated tensors as a safetensors file; and how
    to load them.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # weights do not get smaller
        archive.writestr("README.md", how_to_load(source, whole))
        for i, row in enumerate(parameters):
            tensors = {name: t.clone() for name, t in source.pipe.autoencoder.layout.unflatten(row).items()}
            if not whole:
                archive.writestr(f"network-{i:05d}.safetensors", save(tensors))
                continue
            with tempfile.TemporaryDirectory() as folder:
                save_network(source.pipe.make_model(tensors), Path(folder))
                for file in sorted(Path(folder).iterdir()):
                    archive.write(file, f"network-{i:05d}/{file.name}")


def how_to_load(source: Source, whole: bool) -> str:
    """Markdown: what reads the files of `write_zip`."""
    if whole and has_adapters(source.pipe.base_model):
        lines = [
            "from peft import PeftModel",
            "",
            'network = PeftModel.from_pretrained(base, "network-00000")  # base: the network without adapters',
        ]
    elif whole:
        model = type(source.pipe.base_model).__name__
        lines = [
            "import pdiff_hf  # for its own architectures",
            f"from transformers import {model}",
            "",
            f'network = {model}.from_pretrained("network-00000")',
        ]
    else:
        lines = [
            "from pdiff_hf import PDiffPipeline",
            "from safetensors.torch import load_file",
            "",
            'tensors = load_file("network-00000.safetensors")',
        ]
        if source.pipe.base_model is None:
            lines += ["network.load_state_dict(tensors, strict=False)  # a network of your own"]
            del lines[0]
        else:
            lines += [f'network = PDiffPipeline.from_pretrained("{source.location}").make_model(tensors)']
    return "\n".join(["Unpack the archive, then:", "", "```python", *lines, "```", ""])


class Watcher:
    """
    What is drawn of the reverse process: of a few networks at every step the distance to the mean of the snapshots, in
    standard deviations (1 is where snapshots lie), and the accuracy on some test examples if there is a task.
    """

    def __init__(self, source: Source):
        self.source = source
        self.steps: list[int] = []
        self.distances: list[torch.Tensor] = []
        self.accuracies: list[torch.Tensor] = []
        if source.scorer is not None:
            task, scores = source.scorer.task, source.snapshot_scores
            split = task.load_split("test")
            chosen = _evenly(len(split), WATCHED_EXAMPLES)
            self.batch = send_to_device(task.collate(take(split, chosen.tolist())), source.pipe.device)
            self.snapshots = 100 * (~scores.wrong[:, chosen]).double().mean().item()

    @torch.no_grad()
    def add(self, step: int, latents: torch.Tensor) -> None:
        """Latents of shape `(n, L)` after so many steps."""
        autoencoder, scorer = self.source.pipe.autoencoder, self.source.scorer
        parameters = autoencoder.decode(latents).sample
        self.steps.append(step)
        self.distances.append(autoencoder.normalize(parameters).square().mean(1).sqrt().cpu())
        if scorer is not None:
            labels = self.batch["labels"]
            whole = scorer.complete(parameters)
            logits = [part for _, part in scorer.models(lambda call: scorer.task.predict(call, self.batch), whole)]
            self.accuracies.append(100 * (torch.cat(logits).argmax(-1) == labels).double().mean(-1).cpu())

    @rc_context(LETTERS)
    def draw_distances(self, path: Path) -> None:
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")  # as the figure of the accuracies beside it
        axes = figure.subplots()
        axes.plot(self.steps, torch.stack(self.distances), color=GENERATED, alpha=0.6, marker=".")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("denoising steps taken")
        axes.set_ylabel("distance to the snapshots' mean (std)")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)

    @rc_context(LETTERS)
    def draw_accuracies(self, path: Path) -> None:
        accuracies, num_examples = torch.stack(self.accuracies, 1), len(self.batch["labels"])
        plot_reverse_process(path, self.steps, accuracies, self.snapshots, num_examples)


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


def check_size(source: Source, num_models: int, whole: bool = False) -> None:
    """Raises a `ValueError` if the networks, or the archive of whole ones, would be too large together."""
    size = 4 * source.pipe.autoencoder.layout.num_parameters
    if whole:
        size = sum(t.numel() * t.element_size() for t in source.pipe.base_model.state_dict().values())
    if size * num_models > MAX_BYTES:
        raise ValueError(
            f"{num_models} networks of {size / 2**20:.1f} MiB are more than this page samples at once; choose "
            f"{MAX_BYTES // size} at most, or use scripts/generate.py"
        )
