"""What the page shows: a generator and what is known of it, sampling, its comparison, and the archive of networks."""

import copy
import os
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace as changed
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from pdiff_hf import LayoutError, PDiffPipeline
from pdiff_hf.evaluation import Kind
from pdiff_hf.evaluation.metrics import max_iou
from pdiff_hf.evaluation.plots import plot_field, plot_frontier
from pdiff_hf.evaluation.report import Report
from pdiff_hf.evaluation.scatter import ScatterGroup, plot_accuracy_vs_similarity, scatter_group
from pdiff_hf.evaluation.score import Scores
from pdiff_hf.models.condition import Condition
from pdiff_hf.networks.adapters import has_adapters
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.collecting import zoo_arguments
from pdiff_hf.run.export import write_parameters
from pdiff_hf.scripts.on_demand import TRAINED, AtWork, Choice, as_code, in_words
from pdiff_hf.scripts.watch import LETTERS, drawing
from pdiff_hf.snapshots import load_snapshots, parameter_matrix
from pdiff_hf.snapshots.dataset import condition_table
from pdiff_hf.tasks import ClassificationTask
from pdiff_hf.tasks.data_task import DataTask
from pdiff_hf.tasks.labels import LabelledTask
from pdiff_hf.utils import names
from pdiff_hf.utils.terminal import shorten

MAX_BYTES = 2**30  # of all networks that are sampled at once, and of their archive
FIRST_SCORED = 10  # networks that are drawn first, because the reader waits for them
AS_SAVED = "the generator's own"
SCHEDULERS = {
    AS_SAVED: (None, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}),
    "DDIM": (DDIMScheduler, {"clip_sample": False}),  # latents are not images between -1 and 1
    "DDPM": (DDPMScheduler, {"clip_sample": False}),
}


@dataclass
class Source:
    """What is known of a generator."""

    pipe: PDiffPipeline
    location: str = ""  # as `from_pretrained` takes it
    dataset: str | None = None  # what its networks were trained on
    report: Report | None = None
    at_work: AtWork | None = None  # what runs classifiers whose data are there
    missing: list[str] = field(default_factory=list)  # what is not available, in words for the reader

    @property
    def snapshots(self) -> torch.Tensor | None:
        """Of a run, shape `(K, D)`."""
        return None if self.at_work is None else self.at_work.snapshots


@lru_cache(maxsize=2)
def load_source(name: str) -> Source:
    """From the folder of a run or of a pipeline, or a Hub id; without a generator, the error of `from_pretrained`."""
    if not name:
        raise ValueError("name a generator: a Hub id such as user/generator, or a folder")
    folder = Path(name)
    is_local = folder.is_dir()
    if is_local and "SPACE_ID" in os.environ:
        raise ValueError("a Space reads no folders; name a Hub id")
    pipe = PDiffPipeline.from_pretrained(name, use_safetensors=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    source = Source(pipe, name)
    if is_local:
        run = folder.resolve().parent if (folder / PDiffPipeline.config_name).is_file() else folder
    where = run if is_local else name
    recipe = _find_file(where, names.RECIPE)
    if recipe:
        source.dataset = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("dataset")
    try:
        if path := _find_file(where, f"{names.EVALUATION}/{names.REPORT}"):
            source.report = Report.load(path)
        else:
            source.missing.append("its report: it has not been evaluated")
    except ValueError as error:
        source.missing.append(f"its report: {shorten(str(error))}")
    what = "networks at work"
    if recipe is None:
        source.missing.append(f"{what}: there is no {names.RECIPE}, which says what they are for")
        return source
    try:
        _load_task(source, recipe, run if is_local else None)
    except Exception as error:  # whatever a class of the user's own raises
        source.missing.append(f"{what}: {shorten(str(error))}")
    return source


def _find_file(where: Path | str, path: str) -> Path | None:
    """A file of a folder or of a repository on the Hub, if it is there."""
    if isinstance(where, Path):
        return where / path if (where / path).is_file() else None
    try:
        return Path(hf_hub_download(where, path))
    except EntryNotFoundError:
        return None


def _load_task(source: Source, recipe_file: Path, folder: Path | None) -> None:
    """What runs networks on the task, or the tasks, of a recipe; and the snapshots in the folder of a run."""
    recipe, encoder, layout = load_config(recipe_file), source.pipe.condition_encoder, source.pipe.autoencoder.layout
    if folder is None and ":" in f"{recipe.task}{recipe.family or ''}":
        raise ValueError("they are for a task of their author's own, whose code is not run from a repository")
    task = recipe.make_task()
    if isinstance(task, DataTask):
        return  # a tab of their own shows data
    if not isinstance(task, ClassificationTask):
        raise ValueError(f"networks for {recipe.task} are not classifiers; scripts/evaluate.py measures them")
    family = recipe.make_family(task)
    if family.fields and (encoder is None or family.fields.to_dict() != encoder.fields.to_dict()):
        raise ValueError(f"the recipe's family has the fields {family.fields}, and the generator others")
    family.num_examples("test")  # so that data which are not there are known now
    model = source.pipe.base_model
    if model is None and folder is None:
        raise ValueError("the base model is not in the repository")
    model = model or family.load_saved(folder / names.BASE_MODEL).to(source.pipe.device)
    at_work = AtWork(family, model, layout, folder and folder / names.SCORES, recipe.recomputes_statistics)
    if family.fields:
        at_work.zoo, at_work.seed = zoo_arguments(recipe), recipe.seed
        rows = source.report.groups if source.report else ()
        if tried := next((row.tried for row in rows if row.name == TRAINED), None):
            at_work.zoo = changed(at_work.zoo, learning_rate=float(min(tried, key=tried.__getitem__)))
    elif isinstance(task, LabelledTask):
        task.align(model.config)
    source.at_work = at_work
    try:
        if folder is None:
            raise ValueError("they are not in the repository; a run's folder has them")
        snapshots, found = load_snapshots(recipe.snapshots or folder / names.SNAPSHOTS)
        if found != layout:
            raise LayoutError("those beside the pipeline are of other tensors")
        table = condition_table(snapshots, family.fields)
        known = family.fields.known(table).all(1)
        if known.any():
            at_work.snapshots, at_work.conditions = parameter_matrix(snapshots, layout)[known], table[known]
    except (ValueError, OSError) as error:
        source.missing.append(f"snapshots: {shorten(str(error))}")


def compare(source: Source, choice: Choice, path: Path, scores: Scores | None = None) -> str:
    """
    Draws similarities and accuracies, or for a family accuracies along a field, to `path`, if there are any, and
    returns what the reader needs to know about them.

    Args:
        scores (`Scores`, *optional*): Of networks that were sampled here for `choice`, on the test split.
    """
    report, at_work = source.report, source.at_work
    texts = [] if scores is None or at_work is None else [at_work.describe(choice, scores)]
    with drawing(**LETTERS):
        if report is not None and report.fields:
            plot_field(report, path)
            if along := next((name for name in report.conditions if name in report.fields), None):
                rest = in_words({k: v for k, v in report.conditions[along][0].items() if k != along})
                texts.append(f"From the report: accuracy on tasks along *{along}*; {rest}.")
        elif report is not None and "nearness" in report.generated.measures:  # of data
            plot_frontier(report, path)
            texts.extend(report.verdict)
        elif report is not None and "max_iou" in report.generated.measures:
            compared = report.of_kind(Kind.BASELINE, Kind.OPPONENT)
            others = [scatter_group(report, group.name, group.sweep or group.name) for group in compared]
            generated = scatter_group(report, report.generated.name, "generated, report")
            snapshots = scatter_group(report, "snapshots", "snapshots")
            if scores is not None and at_work is not None and at_work.snapshots is not None:
                others.append(generated)
                similarity = max_iou(scores.wrong, at_work.snapshot_scores.wrong)
                generated = ScatterGroup("sampled here", scores.values, similarity)
                texts.append(f"Their similarity to the nearest snapshot is {similarity.nanmean():.3f} on average.")
            elif scores is None:
                count = len(generated.accuracy)
                texts.append(f"The {count} networks of the report on {report.splits['test']:,} test examples.")
            plot_accuracy_vs_similarity(path, {"": (snapshots, generated, others)}, report.splits["test"])
    return "\n\n".join(texts) or "There is nothing to compare yet."


def write_zip(
    source: Source, parameters: torch.Tensor, path: Path, whole: bool, condition: Condition | None = None
) -> None:
    """Networks as `scripts/generate.py` writes them, whole or their generated tensors alone, and how to load them."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w") as archive:  # weights do not get smaller
        write_parameters(source.pipe, source.pipe.autoencoder.layout, parameters, Path(folder), not whole)
        Path(folder, "README.md").write_text(how_to_load(source, whole, condition), encoding="utf-8")
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(file.relative_to(folder).as_posix())
            info.external_attr = 0o644 << 16  # whatever the umask here, readers can read what they unpack
            archive.writestr(info, file.read_bytes())


def how_to_load(source: Source, whole: bool, condition: Condition | None = None) -> str:
    """Markdown: what reads the files of `write_zip`; of a generator with conditions also what makes more of them."""
    pipe, model = f'PDiffPipeline.from_pretrained("{source.location}")', type(source.pipe.base_model)
    first = '"network-00000' + ('"' if whole else '.safetensors"')
    if whole and has_adapters(source.pipe.base_model):
        what = "from peft import PeftModel\n\n"
        what += f"network = PeftModel.from_pretrained(base, {first})  # base: without adapters"
    elif whole:
        library, name = model.__module__.partition(".")[0], model.__name__
        what = f"import pdiff_hf  # for its own architectures\nfrom {library} import {name}\n\n"
        what += f"network = {name}.from_pretrained({first})"
    elif source.pipe.base_model is None:
        what = f"from safetensors.torch import load_file\n\ntensors = load_file({first})\n"
        what += "network.load_state_dict(tensors, strict=False)  # your network"
    else:
        what = "from pdiff_hf import PDiffPipeline\nfrom safetensors.torch import load_file\n\n"
        what += f"network = {pipe}.make_model(load_file({first}))"
    text = f"Unpack the archive, then:\n\n```python\n{what}\n```\n"
    if condition is None:
        return text
    what = f"from pdiff_hf import PDiffPipeline\n\npipe = {pipe}\ncondition = {as_code(condition)}\n"
    what += "tensors = pipe(8, condition=condition).parameters"
    return f"{text}\nThey were made for this condition. To make more of them:\n\n```python\n{what}\n```\n"


def with_scheduler(source: Source, name: str) -> PDiffPipeline:
    """A copy of the pipeline with a scheduler for the same diffusion; another reader may have chosen another."""
    pipe, own = copy.copy(source.pipe), source.pipe.scheduler
    scheduler_class, settings = SCHEDULERS[name]
    pipe.scheduler = (scheduler_class or type(own)).from_config(own.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_latents(
    source: Source,
    num_models: int,
    num_steps: int,
    temperature: float,
    scheduler: str = AS_SAVED,
    seed: int = 0,
    condition: Condition | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields, while the pipeline runs, how many steps are done, and the latents, shape `(N, L)`."""
    if None in (num_models, num_steps, temperature, seed):
        raise ValueError("networks, steps, temperature and seed must all be given")
    pipe = with_scheduler(source, scheduler)
    steps: SimpleQueue[tuple[int, torch.Tensor] | BaseException | None] = SimpleQueue()
    closed = threading.Event()

    def after_step(pipe, step, timestep, values):
        if closed.is_set():
            raise GeneratorExit  # nobody waits for it any more
        steps.put((step + 1, values["latents"].clone()))
        return values

    def run() -> None:
        noise, how = torch.Generator().manual_seed(seed), {"temperature": temperature, "output_type": "latent"}
        try:
            pipe(num_models, num_steps, noise, condition=condition, callback_on_step_end=after_step, **how)
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
            f"{num_models} networks of {size / 2**20:.1f} MiB are more than this page takes at once; choose "
            f"{MAX_BYTES // size} at most, or use scripts/generate.py"
        )
