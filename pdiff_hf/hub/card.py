"""The model card of a generator, from what its folders hold."""

import json
import os
import re
from importlib.metadata import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..layout import ParameterLayout
from ..models.condition import Field, Fields
from ..utils.reports import FIGURES, generated_group, load_report

TEMPLATE = Path(__file__).with_name("card.md.jinja")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Settings of a run that say where it lives, on which machine, and who pushed it.
PRIVATE_KEYS = (
    "output_dir",
    "stages",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "checkpointing_steps",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
)
MAX_LISTED_TENSORS = 20


class HubError(RuntimeError):
    """Something cannot be pushed; the message says why, and what to do. A repository never holds half of a push."""


def make_model_card(
    pipeline: str | os.PathLike,
    repo_id: str,
    *,
    run: str | os.PathLike | None = None,
    license: str = "apache-2.0",
) -> ModelCard:
    """
    The card of a generator. `pipeline_tag` is `other`: the Hub has no tag for the generation of networks, and those of
    images or of classification would offer the repository for what it cannot do.

    Args:
        pipeline (`str` or `os.PathLike`): Folder of the saved pipeline.
        repo_id (`str`): Where it is published, `namespace/name`.
        run (`str` or `os.PathLike`, *optional*): The run's folder, for results, figures and recipe.
        license (`str`, *optional*, defaults to `"apache-2.0"`): An identifier of the Hub's list.

    Raises:
        HubError: if the run's report is of another version of this library.
    """
    pipeline = Path(pipeline)
    layout = ParameterLayout.from_dict(read_json(pipeline / "autoencoder" / "config.json")["layout"])
    base_config = read_json(pipeline / "base_model" / "config.json")
    encoder_config = read_json(pipeline / "condition_encoder" / "config.json")
    fields = Fields(encoder_config["fields"]) if encoder_config else None
    recipe: dict = {}
    report, figures = None, list[dict]()
    if run is not None:
        recipe = published_recipe(Path(run)) if Path(run, "recipe.yaml").is_file() else {}
        report, figures = _read_report(Path(run, "evaluation"))

    name = repo_id.rpartition("/")[2]
    data = ModelCardData(
        license=license,
        library_name="pdiff_hf",
        pipeline_tag="other",
        tags=["diffusers", "pdiff-hf", "neural-network-diffusion", "neural-network-weights", "arxiv:2402.13144"],
        base_model=_base_model(pipeline, layout, recipe),
        datasets=_hub_id((recipe.get("dataset") or "").partition(":")[0]),
        metrics=None if report is None else [report["metric"]["name"]],
        model_name=None if report is None else name,
        eval_results=None if report is None else _eval_results(report, recipe),
    )
    network = recipe.get("model") or base_config.get("architecture") or base_config.get("model_type")
    dataset = recipe.get("dataset")
    tensors = list(zip(layout.names, layout.shapes, strict=True))
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        network=f"`{network}`" if network else "a network that is not part of it",
        trained_on="scikit-learn's digits" if dataset == "digits" else f"`{dataset}`",
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
        repository=metadata("pdiff_hf").json.get("home_page"),
        complete=bool(base_config or _reference(pipeline)),
        fields=fields,
        num_seen=encoder_config.get("num_seen", 0),
        condition="" if fields is None else ", ".join(f'"{name}": {_example(fields[name])}' for name in fields),
        settings=recipe,
        report=report,
        figures=figures,
        num_parameters=layout.num_parameters,
        tensors=tensors[:MAX_LISTED_TENSORS],
        num_left_out=max(0, len(tensors) - MAX_LISTED_TENSORS),
    )


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds; nothing if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def published_recipe(folder: Path) -> dict:
    """The recipe of a run without what concerns this machine or the push; local folders by their names only."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe = {key: value for key, value in recipe.items() if key not in PRIVATE_KEYS}
    return _without_paths(recipe)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    is_local = isinstance(value, str) and (value.startswith(("/", ".", "~")) or os.path.exists(value))
    return Path(value).name if is_local else value


def _reference(pipeline: Path) -> dict:
    """Where on the Hub the base model is, of a generator of adapters that names it."""
    return read_json(pipeline / "model_index.json").get("base_model_reference") or {}


def _base_model(pipeline: Path, layout: ParameterLayout, recipe: dict) -> str | None:
    """The Hub's id of the base model, which the adapters' own configurations may know better than the recipe."""
    of_adapters = [config.get("base_model_name_or_path") or "" for config in layout.adapters.values()]
    names = [_reference(pipeline).get("id") or "", *of_adapters, recipe.get("model") or ""]
    return next(filter(None, map(_hub_id, names)), None)


def _hub_id(name: str) -> str | None:
    """`name` if it can be an id of the Hub. Local folders have been cut to their last part, which has no slash."""
    return name if HUB_ID.fullmatch(name) else None


def _read_report(folder: Path) -> tuple[dict | None, list[dict]]:
    """The report, and title and path in the repository of every figure that there is."""
    if not (folder / "report.json").is_file():
        return None, []
    try:
        report = load_report(folder / "report.json")
    except ValueError as error:
        raise HubError(str(error)) from error
    present = [name for name in FIGURES if (folder / name).is_file()]
    return report, [{"title": FIGURES[name], "path": f"evaluation/{name}"} for name in present]


def _example(field: Field) -> str:
    """A value of a field, as Python has it."""
    value = field.example()
    if isinstance(value, list):
        return f"{value[:1]} + {value[1:2]} * {len(value) - 1}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else f"{value:g}"


def _eval_results(report: dict, recipe: dict) -> list[EvalResult]:
    task = recipe.get("task", "image_classification").replace("_", "-")
    dataset = recipe.get("dataset") or "unknown"
    metric = report["metric"]["name"]
    title = f"{metric} ({report['metric']['unit']})" if report["metric"]["unit"] else metric
    generated = generated_group(report)
    values: dict[str, tuple[str, float | None]] = {}
    if report["fields"]:
        for name, scores in generated["sets"].items():
            if name not in report["fields"]:  # tasks along a field are for a figure
                mean = fmean(fmean(row) for row in scores["scores"])
                values[f"Mean {title} on {len(scores['scores'])} unseen tasks ({name})"] = metric, mean
    else:
        measures = generated["measures"]
        values = {
            f"Mean {title} of {generated['n']} networks": (metric, measures["score_mean"]),
            f"{title} of the network chosen on validation data": (metric, measures.get("score_best")),
            "Mean similarity of errors to the nearest snapshot, lower is newer": ("iou", measures.get("max_iou")),
        }
    return [
        EvalResult(
            task_type=task,
            task_name=f"{task.replace('-', ' ').capitalize()} by the generated networks",
            dataset_type=dataset.partition(":")[0],
            dataset_name=dataset,
            dataset_config=dataset.partition(":")[2] or None,
            dataset_split="test",
            metric_type=kind,
            metric_value=round(value, 4),
            metric_name=name,
        )
        for name, (kind, value) in values.items()
        if value is not None
    ]
