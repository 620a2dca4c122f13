"""What the page shows: a generator and what is known of it, sampling, its comparison, and the archive of networks."""

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
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from matplotlib import rc_context
from safetensors.torch import save
from transformers import PreTrainedModel

from pdiff_hf import LayoutError, PDiffPipeline
from pdiff_hf.evaluation import Kind
from pdiff_hf.evaluation.metrics import max_iou
from pdiff_hf.evaluation.plots import plot_frontier
from pdiff_hf.evaluation.report import Report
from pdiff_hf.evaluation.scatter import ScatterGroup, plot_accuracy_vs_similarity, sampling_error, scatter_group
from pdiff_hf.evaluation.score import ClassifierScores, Scorer, make_scorer
from pdiff_hf.models.condition import Condition
from pdiff_hf.networks.adapters import has_adapters
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.export import save_network
from pdiff_hf.run.task import make_family, make_task
from pdiff_hf.scripts.on_demand import AtWork, as_code, draw_field
from pdiff_hf.scripts.watch import LETTERS
from pdiff_hf.snapshots import load_snapshots, parameter_matrix
from pdiff_hf.snapshots.dataset import condition_table
from pdiff_hf.tasks import ClassificationTask
from pdiff_hf.tasks.labels import LabelledTask
from pdiff_hf.utils import names

MAX_BYTES = 2**30  # of all networks that are sampled at once, and of their archive
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
        report (`Report`, *optional*): Its report.
        scorer (`Scorer`, *optional*): Of the run's task; with it come `snapshots`, shape `(K, D)`.
        at_work (`AtWork`, *optional*): Of a run's family of tasks, in place of `scorer`.
        snapshots (`torch.Tensor`, *optional*): Of the run.
        num_steps (`int`): Of denoising, for a start.
        missing (`list[str]`): What is not available, in words for the reader.
    """

    pipe: PDiffPipeline
    location: str = ""
    dataset: str | None = None
    report: Report | None = None
    scorer: Scorer | None = None
    at_work: AtWork | None = None
    snapshots: torch.Tensor | None = None
    num_steps: int = 20
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
    source = Source(pipe, str(pipeline), num_steps=pipe.config.num_inference_steps)
    where = folder if is_local else name
    if recipe := _find_file(where, "recipe.yaml"):
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        source.dataset = settings.get("dataset")
    try:
        if path := _find_file(where, f"{names.EVALUATION}/{names.REPORT}"):
            source.report = Report.load(path)
        else:
            source.missing.append("its report: it has not been evaluated")
    except ValueError as error:
        source.missing.append(f"its report: {one_line(error)}")
    measured = {} if source.report is None else source.report.generated.measures
    if source.report is not None and not is_conditional(source) and not {"max_iou", "nearness"} & measured.keys():
        source.report = None
        source.missing.append("its report, which is not one of classifiers: see report.md beside the pipeline")
    what = "the accuracy of what is sampled here"
    if not is_local:
        source.missing.append(f"{what}: a repository has no snapshots to compare with. Open the run's folder")
    elif recipe is None:
        source.missing.append(f"{what}: the folder is not that of a run")
    else:
        try:
            _load_task(source, folder)
        except (ValueError, OSError, TypeError, ImportError) as error:
            source.missing.append(f"{what}: {one_line(error)}")
    return source


def is_conditional(source: Source) -> bool:
    """Whether the report is on members of a family."""
    return source.report is not None and bool(source.report.fields)


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
    recipe = load_config(folder / "recipe.yaml")
    if recipe.family is not None:
        return _load_family(source, folder, recipe)
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


def _load_family(source: Source, folder: Path, recipe: PDiffConfig) -> None:
    """What runs networks on the tasks of a run's family, and the networks of its seen tasks."""
    encoder, layout = source.pipe.condition_encoder, source.pipe.autoencoder.layout
    family = make_family(recipe, make_task(recipe))
    if encoder is None or family.fields.to_dict() != encoder.fields.to_dict():
        raise ValueError(f"the recipe's family has the fields {family.fields}, and the generator others")
    family.num_examples("test")  # so that data which are not there are known now
    model = source.pipe.base_model or family.load_saved(folder / names.BASE_MODEL).to(source.pipe.device)
    source.at_work = AtWork(family, model, layout)
    try:
        snapshots, found = load_snapshots(recipe.snapshots or folder / names.SNAPSHOTS)
        if found != layout:
            raise LayoutError("the snapshots beside the pipeline are of other tensors")
        source.snapshots = parameter_matrix(snapshots, layout)
        source.at_work.set_snapshots(source.snapshots, condition_table(snapshots, family.fields))
    except (ValueError, OSError) as error:
        source.missing.append(f"the networks of seen tasks: {one_line(error)}")


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
    if is_conditional(source):  # of many tasks: they cannot share a figure with networks of one
        return draw_field(report, path)
    if report is not None and "nearness" in report.generated.measures:  # of data
        plot_frontier(report, path)
        return " ".join(report.verdict)
    if report is not None:
        compared = report.of_kind(Kind.BASELINE, Kind.OPPONENT)
        others = [scatter_group(report, group.name, group.sweep or group.name) for group in compared]
        generated = scatter_group(report, report.generated.name, "generated, report")
    if scores is None:
        if report is None:
            rest = " yet; sample, to see how these networks do." if source.scorer else "."
            return f"There is nothing to compare: there is no report{rest}"
        snapshots, num_examples = scatter_group(report, "snapshots", "snapshots"), report.splits["test"]
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


def write_zip(
    source: Source, parameters: torch.Tensor, path: Path, whole: bool, condition: Condition | None = None
) -> None:
    """
    Every network as a folder that `from_pretrained` loads, or else its generated tensors as a safetensors file; and how
    to load them.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # weights do not get smaller
        archive.writestr(_readable("README.md"), how_to_load(source, whole, condition))
        for i, row in enumerate(parameters):
            tensors = {name: t.clone() for name, t in source.pipe.autoencoder.layout.unflatten(row).items()}
            if not whole:
                archive.writestr(_readable(f"network-{i:05d}.safetensors"), save(tensors))
                continue
            with tempfile.TemporaryDirectory() as folder:
                save_network(source.pipe.make_model(tensors), Path(folder))
                for file in sorted(Path(folder).iterdir()):
                    archive.writestr(_readable(f"network-{i:05d}/{file.name}"), file.read_bytes())


def _readable(name: str) -> zipfile.ZipInfo:
    """A file of an archive that is not for its owner alone when it is unpacked."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    return info


def how_to_load(source: Source, whole: bool, condition: Condition | None = None) -> str:
    """Markdown: what reads the files of `write_zip`; of a generator with conditions also what makes more of them."""
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
    text = "\n".join(["Unpack the archive, then:", "", "```python", *lines, "```", ""])
    if condition is None:
        return text
    lines = [
        "from pdiff_hf import PDiffPipeline",
        "",
        f'pipe = PDiffPipeline.from_pretrained("{source.location}")',
        f"condition = {as_code(condition)}",
        "tensors = pipe(8, condition=condition).parameters",
    ]
    return "\n".join(
        [text, "They were made for this condition. To make more of them:", "", "```python", *lines, "```", ""]
    )


# --------------------------------------------------------------------------------------------------------- what is done


class Closed(Exception):
    """Ends sampling that nobody waits for any more."""


def make_scheduler(name: str, source: Source) -> SchedulerMixin:
    """For the same diffusion as the pipeline's own."""
    scheduler_class, settings = SCHEDULERS[name]
    return scheduler_class.from_config(source.pipe.scheduler.config, **settings)


def with_scheduler(source: Source, name: str) -> PDiffPipeline:
    """A pipeline of one's own, because another reader may have chosen another scheduler."""
    parts, scheduler = source.pipe, make_scheduler(name, source)
    pipe = PDiffPipeline(
        parts.autoencoder,
        parts.denoiser,
        scheduler,
        condition_encoder=parts.condition_encoder,
        temperature=parts.config.temperature,
        guidance_scale=parts.config.guidance_scale,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_latents(
    source: Source, num_models: int, num_steps: int, scheduler: str, seed: int, condition: Condition | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields, while the pipeline runs, how many steps are done, and the latents, shape `(N, L)`."""
    pipe = with_scheduler(source, scheduler)
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
            pipe(
                num_models,
                num_steps,
                generator,
                condition=condition,
                output_type="latent",
                callback_on_step_end=after_step,
            )
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
