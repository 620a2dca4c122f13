"""
To the Hub: trained generators with a model card, and parameter data sets.

It reads folders only, as `PDiffPipeline.save_pretrained`, a run and `SnapshotWriter` leave them, so that the pipeline
can use it as well. What is published is chosen by name; nothing else in a folder ever leaves the machine.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ..layout import ParameterLayout
from ..run.recipe import RunSection

PIPELINE_FILE = "pipeline.py"
FIGURES = (".png", ".svg")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# The rest of the section says where the run lives and who pushed it.
PUBLISHED_RUN_KEYS = ("seed", "mixed_precision", "gradient_accumulation_steps")
MAX_LISTED_TENSORS = 20


class HubError(RuntimeError):
    """Something cannot be pushed; the message says why, and what to do. A repository never holds half of a push."""


def push_run_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    license: str = "apache-2.0",
    commit_message: str = "Upload PDiffPipeline",
) -> CommitInfo:
    """
    Pushes the generator of a run in one commit: the pipeline's components, its code as `pipeline.py`, the report, the
    figures, the recipe, and a model card made from them, which takes the place of the card that the repository has.

    Args:
        folder (`str` or `os.PathLike`): A run's `output_dir`.
        repo_id (`str`): `name`, `user/name` or `organization/name`. Created if it does not exist.
        private (`bool`, *optional*): Whether a new repository is private.
        revision (`str`, *optional*): Branch to push to; created from `main` if it does not exist.
        token (`str`, *optional*): By default the one of `hf auth login`, or of `HF_TOKEN`.
        license (`str`, *optional*, defaults to `"apache-2.0"`): For the card; that of the base model and of the data
            may ask for another one.
        commit_message (`str`, *optional*, defaults to `"Upload PDiffPipeline"`).

    Returns:
        `CommitInfo`: The address of the commit, as a string with attributes.

    Raises:
        HubError: if the run has no finished pipeline, its report belongs to another one, `private` is asked for and the
            repository is public, or the Hub refuses or cannot be reached. A failed push can be repeated.
    """
    folder = Path(folder)
    pipeline = folder / "pipeline"
    files = pipeline_files(pipeline)
    if (folder / "recipe.yaml").is_file():
        files["recipe.yaml"] = yaml.safe_dump(published_recipe(folder), sort_keys=False, allow_unicode=True).encode()
    if (folder / "evaluation" / "report.json").is_file():
        _check_report_is_of_pipeline(folder)
        for path in sorted((folder / "evaluation").rglob("*")):
            if path.name in ("report.json", "report.md") or path.suffix in FIGURES:
                files[path.relative_to(folder).as_posix()] = path
    repo_id = resolve_repo_id(repo_id, token)
    files["README.md"] = str(make_model_card(pipeline, repo_id, run=folder, license=license)).encode()
    return _push(files, repo_id, "model", private, revision, token, commit_message)


def push_pipeline_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload PDiffPipeline",
) -> CommitInfo:
    """
    Pushes a folder of `PDiffPipeline.save_pretrained` in one commit. A model card that the repository has is kept.
    Arguments and errors are those of [`push_run_to_hub`]; `create_pr` opens a pull request instead.
    """
    files = pipeline_files(Path(folder))
    repo_id = resolve_repo_id(repo_id, token)
    files["README.md"] = str(make_model_card(Path(folder), repo_id)).encode()
    return _push(files, repo_id, "model", private, revision, token, commit_message, create_pr, keep=("README.md",))


def push_snapshots_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload parameter snapshots",
) -> CommitInfo:
    """
    Pushes a parameter data set with its layout in one commit, such that `load_snapshots(repo_id)` gives it back.
    Arguments and errors are those of [`push_run_to_hub`].
    """
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in ("README.md", "data/*.arrow", "layout/*.arrow")
        for path in sorted(folder.glob(pattern))
    }
    missing = [name for name in ("README.md", "data", "layout") if not any(path.startswith(name) for path in files)]
    if missing:
        raise HubError(f"'{folder}' is not a parameter data set: it has no {', '.join(missing)}")
    return _push(files, resolve_repo_id(repo_id, token), "dataset", private, revision, token, commit_message)


def resolve_repo_id(repo_id: str, token: str | None = None) -> str:
    """
    The id with its namespace, which is the user's own if `repo_id` has none.

    Raises:
        HubError: if the token is missing or not accepted, or the namespace is neither the user nor one of the user's
            organizations. Call it before hours of work.
    """
    try:
        user = HfApi(token=token).whoami()
    except (OSError, HTTPError) as error:
        raise HubError(f"cannot push to '{repo_id}': {_reason(error)}") from error
    namespace, _, name = repo_id.rpartition("/")
    namespaces = [user["name"], *(organization["name"] for organization in user["orgs"])]
    if namespace and namespace not in namespaces:
        raise HubError(f"cannot push to '{repo_id}': the token is of {user['name']}, who can push to {namespaces}")
    return f"{namespace or user['name']}/{name}"


def pipeline_files(folder: Path) -> dict[str, Path | bytes]:
    """What a folder of `PDiffPipeline.save_pretrained` holds, by path in the repository."""
    index = folder / "model_index.json"
    if not index.is_file() or not (folder / PIPELINE_FILE).is_file():
        raise HubError(f"'{folder}' holds no finished pipeline: it has no {index.name} or no {PIPELINE_FILE}")
    files: dict[str, Path | bytes] = {name: folder / name for name in (index.name, PIPELINE_FILE)}
    try:
        values = json.loads(index.read_text()).items()
        components = [name for name, value in values if isinstance(value, list) and any(value)]
    except (ValueError, AttributeError) as error:
        raise HubError(f"'{folder}' holds no finished pipeline: {index.name} is damaged ({error})") from error
    for component in components:
        if not component.isidentifier():  # a path would publish what lies elsewhere
            raise HubError(f"'{component}' is not the name of a component, but '{index}' has it as one")
        paths = [path for path in sorted((folder / component).rglob("*")) if path.is_file()]
        if not paths:
            raise HubError(f"'{folder}' has no files of its component {component}")
        files |= {path.relative_to(folder).as_posix(): path for path in paths}
    return files


def published_recipe(folder: Path) -> dict:
    """The recipe of a run without what concerns this machine or the push; local folders by their names only."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    left_out = {field.name for field in dataclasses.fields(RunSection)} - set(PUBLISHED_RUN_KEYS)
    recipe = {key: value for key, value in recipe.items() if key not in left_out}
    return {key: Path(value).name if _is_local(value) else value for key, value in recipe.items()}


def _is_local(value: object) -> bool:
    return isinstance(value, str) and (value.startswith(("/", ".", "~")) or os.path.exists(value))


def _check_report_is_of_pipeline(folder: Path) -> None:
    """The settings of a later stage hold those of all earlier ones; a stage that was interrupted has none."""
    records = [folder / "stages" / f"{stage}.json" for stage in ("denoiser", "evaluate")]
    pipeline, report = (json.loads(path.read_text())["settings"] if path.is_file() else {} for path in records)
    if any(report.get(key) != value for key, value in pipeline.items()):
        raise HubError(
            f"the report in '{folder}' is of a pipeline with other settings; carry out the stage evaluate again"
        )


# ------------------------------------------------------------------------------------------------------ the model card


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
    """
    pipeline, run = Path(pipeline), None if run is None else Path(run)
    layout = ParameterLayout.from_dict(json.loads((pipeline / "autoencoder" / "config.json").read_text())["layout"])
    base = pipeline / "base_model" / "config.json"
    base_config = json.loads(base.read_text()) if base.is_file() else None
    recipe = published_recipe(run) if run is not None and (run / "recipe.yaml").is_file() else {}
    evaluation = None if run is None or not (run / "evaluation" / "report.json").is_file() else run / "evaluation"
    report = None if evaluation is None else json.loads((evaluation / "report.json").read_text())

    name = repo_id.rpartition("/")[2]
    measured = {}
    if report is not None:
        metric = report["metric"]["name"] if "metric" in report else "accuracy"
        measured = {"metrics": [metric], "model_name": name, "eval_results": _eval_results(report, recipe)}
    data = ModelCardData(
        license=license,
        library_name="pdiff_hf",
        pipeline_tag="other",
        tags=["diffusers", "pdiff-hf", "neural-network-diffusion", "neural-network-weights", "arxiv:2402.13144"],
        base_model=_hub_id(recipe.get("model", "")),
        datasets=_hub_id(recipe.get("dataset", "").partition(":")[0]),
        **measured,
    )
    network = _network_name(base_config, recipe)
    sections = [
        f"# {name}",
        f"A generator of neural networks: every sample is a new set of {layout.num_parameters:,} parameters of "
        f"{network}" + (f" on {_dataset_name(recipe)}" if recipe else "") + ". It was trained with "
        "[Neural Network Diffusion](https://arxiv.org/abs/2402.13144) on snapshots of that network's own training: an "
        "autoencoder makes latents of them, and a diffusion model learns the latents.",
        _verdict(report),
        _usage(repo_id, complete=base_config is not None),
        "" if evaluation is None else _results(evaluation),
        "## What is generated\n\n" + _tensors(layout, base_config is not None),
        _training(recipe),
        _limits(layout, network, report),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n")


def _hub_id(name: str) -> str | None:
    """`name` if it can be an id of the Hub. Local folders have been cut to their last part, which has no slash."""
    return name if HUB_ID.fullmatch(name) else None


def _network_name(base_config: dict | None, recipe: dict) -> str:
    name = recipe.get("model") or (base_config or {}).get("architecture") or (base_config or {}).get("model_type")
    return f"`{name}`" if name else "a network that is not part of it"


def _dataset_name(recipe: dict) -> str:
    return "scikit-learn's digits" if recipe["dataset"] == "digits" else f"`{recipe['dataset']}`"


def _eval_results(report: dict, recipe: dict) -> list[EvalResult]:
    generated = next(group for group in report["groups"] if group["name"] == "generated")
    task = recipe.get("task", "image_classification").replace("_", "-")
    source = {
        "task_type": task,
        "task_name": f"{task.replace('-', ' ').capitalize()} by the generated networks",
        "dataset_type": recipe.get("dataset", "unknown").partition(":")[0],
        "dataset_name": recipe.get("dataset", "unknown"),
        "dataset_config": recipe.get("dataset", "").partition(":")[2] or None,
        "dataset_split": "test",
    }
    if "metric" in report:
        metric = report["metric"]["name"]
        values = {
            f"Mean {metric} of {generated['n']} networks": (metric, generated["score_mean"]),
            f"{metric} of the network chosen on validation data": (metric, generated["score_best"]),
        }
        return _as_results(values, source)
    values = {
        f"Mean accuracy of {generated['n']} networks (%)": ("accuracy", generated["accuracy_mean"]),
        "Accuracy of the network chosen on validation data (%)": ("accuracy", generated["accuracy_best"]),
        "Mean over the networks of the largest IoU of errors with an original": ("iou", generated["iou_max"]),
    }
    return _as_results(values, source)


def _as_results(values: dict[str, tuple[str, float | None]], source: dict) -> list[EvalResult]:
    return [
        EvalResult(metric_type=metric, metric_value=round(value, 4), metric_name=name, **source)
        for name, (metric, value) in values.items()
        if value is not None
    ]


def _verdict(report: dict | None) -> str:
    return "> It has not been evaluated." if report is None else f"> **Verdict:** {report['verdict']}"


def _usage(repo_id: str, complete: bool) -> str:
    output = "model" if complete else "state_dict"
    what = "whole networks" if complete else "state dicts of the generated tensors; load them with `strict=False`"
    return f"""## How to use it

```python
import torch
from pdiff_hf import PDiffPipeline

pipe = PDiffPipeline.from_pretrained("{repo_id}")
networks = pipe(num_models=200, generator=torch.Generator().manual_seed(0), output_type="{output}").parameters
```

These are {what}. `output_type="pt"` gives one tensor with a row a network. With code from this repository in place of
the installed one, which asks for your trust in it:

```python
import pdiff_hf
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="{repo_id}", trust_remote_code=True)
```"""


def _results(evaluation: Path) -> str:
    """The report with its figures where they are in the repository, and its tables folded up below the summary."""
    text = (evaluation / "report.md").read_text(encoding="utf-8").strip()
    text = re.sub(r"\]\((?!https?:|#)", "](evaluation/", text)
    summary, *sections = re.split(r"^### ", text, flags=re.MULTILINE)
    parts = ["## Results", summary.strip()]
    for section in sections:
        title, _, body = section.partition("\n")
        folded = f"<details>\n<summary>{title}</summary>\n\n{body.strip()}\n\n</details>"
        parts.append(f"### {title}\n\n{body.strip()}" if "![" in body else folded)
    return "\n\n".join(parts)


def _tensors(layout: ParameterLayout, complete: bool) -> str:
    lines = ["| tensor | shape |", "|---|---|"]
    lines += [
        f"| `{name}` | {' × '.join(map(str, shape)) or 'scalar'} |"
        for name, shape in list(zip(layout.names, layout.shapes, strict=True))[:MAX_LISTED_TENSORS]
    ]
    left_out = len(layout.names) - MAX_LISTED_TENSORS
    more = f"\n\nand {left_out} more, which the autoencoder's `config.json` lists." if left_out > 0 else ""
    rest = "All other tensors come from the base model in this repository, and are the same in every network."
    return "\n".join(lines) + more + ("\n\n" + rest if complete else "")


def _training(recipe: dict) -> str:
    if not recipe:
        return ""
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return f"""## How it was trained

With `accelerate launch scripts/train.py recipe.yaml` of `pdiff_hf`. The file is in this repository:

```yaml
{text}```"""


def _limits(layout: ParameterLayout, network: str, report: dict | None) -> str:
    lines = [
        f"It generates the tensors above, of {network}, and nothing else: no other architecture, no other layers, no "
        "other classes.",
        "It has learned from one task; its networks suit other data no better than the network they come from.",
        "Its networks are variations of the snapshots that it has seen. Whether they are new, and whether simple "
        "averages or noise would do as well, is for the results to say"
        + (
            ": look at the similarity to the originals, and at the baselines."
            if report
            else "; this one has not been evaluated."
        ),
        "It takes over what is wrong with the base model and its data, and is bound by their licences.",
    ]
    return "## What it does not do\n\n" + "\n".join(f"- {line}" for line in lines)


# ------------------------------------------------------------------------------------------------------------- the push


def _push(
    files: dict[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    private: bool | None,
    revision: str | None,
    token: str | None,
    commit_message: str,
    create_pr: bool = False,
    keep: tuple[str, ...] = (),
) -> CommitInfo:
    """One commit that adds `files` and deletes what earlier pushes left in their folders."""
    api = HfApi(token=token)
    try:
        if repo_type == "model":
            ModelCard(files["README.md"].decode()).validate()
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        info = api.repo_info(repo_id, repo_type=repo_type)
        if private and not info.private:
            raise HubError(f"'{repo_id}' exists and is public; make it private on the Hub first, or choose another id")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
            info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        present = {sibling.rfilename for sibling in info.siblings}
        files = {path: file for path, file in files.items() if path not in keep or path not in present}
        folders = {path.partition("/")[0] for path in files if "/" in path}
        stale = [path for path in sorted(present) if path.partition("/")[0] in folders and path not in files]
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path, file) for path, file in files.items()]
            + [CommitOperationDelete(path) for path in stale],
            repo_type=repo_type,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            parent_commit=info.sha,  # refused if another push has come between
        )
    except (OSError, RuntimeError, ValueError, HTTPError) as error:
        if isinstance(error, HubError):
            raise
        raise HubError(
            f"'{repo_id}' could not be pushed: {_reason(error)}. Nothing is published by halves; push it again"
        ) from error


def _reason(error: BaseException) -> str:
    """One line; of an upload that failed, what made it fail."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{error} {_reason(error.__cause__)}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or error.response.reason_phrase
        hint = "; log in with `hf auth login`, or give a token that can write" if status in (401, 403) else ""
        return f"the Hub answers {status} ({said}){hint}"
    return " ".join(str(error).split()) or type(error).__name__
