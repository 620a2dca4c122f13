"""
To the Hub: trained generators with a model card, and parameter data sets.

It reads folders only, as `PDiffPipeline.save_pretrained`, a run and `SnapshotWriter` leave them, so that the pipeline
can use it as well. What is published is chosen by name; nothing else in a folder leaves the machine.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ..utils.names import TUNED, TUNING, generator_folder
from .card import HUB_ID, HubError, make_model_card, published_recipe, read_json

if TYPE_CHECKING:
    from typing_extensions import Unpack

PIPELINE_FILE = "pipeline.py"
FIGURES = (".png", ".svg")


class PushOptions(TypedDict, total=False):
    """
    How something is pushed.

    Args:
        private (`bool`, *optional*): Whether a new repository is private.
        revision (`str`, *optional*): Branch to push to; created from `main` if it does not exist.
        token (`str`, *optional*): By default the one of `hf auth login`, or of `HF_TOKEN`.
        commit_message (`str`, *optional*): By default, what is uploaded.
        create_pr (`bool`, *optional*): Whether to open a pull request instead.
    """

    private: bool | None
    revision: str | None
    token: str | None
    commit_message: str
    create_pr: bool


def push_run_to_hub(
    folder: str | os.PathLike, repo_id: str, *, license: str = "apache-2.0", **options: "Unpack[PushOptions]"
) -> CommitInfo:
    """
    Pushes the generator of a run in one commit: the pipeline's components, its code as `pipeline.py`, the report, the
    figures, the recipe, and a model card made from them, which replaces the repository's card.

    Args:
        folder (`str` or `os.PathLike`): A run's `output_dir`.
        repo_id (`str`): `name`, `user/name` or `organization/name`. Created if it does not exist.
        license (`str`, *optional*, defaults to `"apache-2.0"`): For the card; that of the base model and of the data
            may ask for another one.
        options: See [`PushOptions`].

    Returns:
        `CommitInfo`: The address of the commit, as a string with attributes.

    Raises:
        HubError: if the run has no finished pipeline, its report belongs to another one, `private` is asked for and the
            repository is public, or the Hub refuses or cannot be reached. A failed push can be repeated.
    """
    folder = Path(folder)
    pipeline = generator_folder(folder)
    files = pipeline_files(pipeline)
    if (folder / "recipe.yaml").is_file():
        files["recipe.yaml"] = yaml.safe_dump(published_recipe(folder), sort_keys=False, allow_unicode=True).encode()
    if (folder / "evaluation" / "report.json").is_file():
        _check_report_is_of_pipeline(folder)
        for path in sorted((folder / "evaluation").rglob("*")):
            if path.name in ("report.json", "report.md", "report.html") or path.suffix in FIGURES:
                files[path.relative_to(folder).as_posix()] = path
    repo_id = resolve_repo_id(repo_id, options.get("token"))
    files["README.md"] = str(make_model_card(pipeline, repo_id, run=folder, license=license)).encode()
    return push_files(files, repo_id, "model", **options)


def push_pipeline_to_hub(folder: str | os.PathLike, repo_id: str, **options: "Unpack[PushOptions]") -> CommitInfo:
    """
    Pushes a folder of `PDiffPipeline.save_pretrained` in one commit. A model card that the repository has is kept.
    Arguments and errors are those of [`push_run_to_hub`].
    """
    files = pipeline_files(Path(folder))
    repo_id = resolve_repo_id(repo_id, options.get("token"))
    files["README.md"] = str(make_model_card(Path(folder), repo_id)).encode()
    return push_files(files, repo_id, "model", keep=("README.md",), **options)


def push_snapshots_to_hub(folder: str | os.PathLike, repo_id: str, **options: "Unpack[PushOptions]") -> CommitInfo:
    """
    Pushes a parameter data set with its layout in one commit, such that `load_snapshots(repo_id)` gives it back.
    Arguments and errors are those of [`push_run_to_hub`].
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for pattern in ("README.md", "data/*.arrow", "layout/*.arrow", "fields/*.arrow")
        for path in sorted(folder.glob(pattern))
    }
    missing = [name for name in ("README.md", "data", "layout") if not any(path.startswith(name) for path in files)]
    if missing:
        raise HubError(f"'{folder}' is not a parameter data set: it has no {', '.join(missing)}")
    repo_id = resolve_repo_id(repo_id, options.get("token"))
    return push_files(files, repo_id, "dataset", **{"commit_message": "Upload parameter snapshots"} | options)  # type: ignore


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
        raise HubError(f"cannot push to '{repo_id}': the token belongs to {user['name']}, who can push to {namespaces}")
    return f"{namespace or user['name']}/{name}"


def pipeline_files(folder: Path) -> dict[str, Path | bytes]:
    """What a folder of `PDiffPipeline.save_pretrained` holds, by path in the repository."""
    index = folder / "model_index.json"
    if not index.is_file() or not (folder / PIPELINE_FILE).is_file():
        raise HubError(f"'{folder}' is not a finished pipeline: {index.name} or {PIPELINE_FILE} is missing")
    files: dict[str, Path | bytes] = {name: folder / name for name in (index.name, PIPELINE_FILE)}
    try:
        components = [name for name, value in read_json(index).items() if isinstance(value, list) and any(value)]
    except (ValueError, AttributeError) as error:
        raise HubError(f"'{folder}' is not a finished pipeline: {index.name} is damaged ({error})") from error
    for component in components:
        if not component.isidentifier():  # a path would publish what lies elsewhere
            raise HubError(f"'{component}' is not a valid name of a component, but '{index}' lists it")
        paths = [path for path in sorted((folder / component).rglob("*")) if path.is_file()]
        if not paths:
            raise HubError(f"'{folder}' has no files for its component {component}")
        files |= {path.relative_to(folder).as_posix(): path for path in paths}
    if (folder / TUNING).is_file():
        files[TUNING] = folder / TUNING
    for name in files:
        if name == "autoencoder/config.json" or name.endswith("/adapter_config.json"):
            config = read_json(folder / name)
            if (public := _without_folders(config)) != config:
                files[name] = json.dumps(public, indent=2).encode()
    return files


def _without_folders(config: Any) -> Any:
    """A configuration in which adapters name their base model by an id on the Hub, or not at all."""
    if not isinstance(config, dict):
        return config
    base = config.get("base_model_name_or_path")
    kept = {key: _without_folders(value) for key, value in config.items()}
    return kept | ({"base_model_name_or_path": None} if base and not HUB_ID.fullmatch(base) else {})


def _check_report_is_of_pipeline(folder: Path) -> None:
    """The settings of a later stage hold those of all earlier ones; a stage that was interrupted has none."""
    generator = "tune" if generator_folder(folder).name == TUNED else "denoiser"
    records = [folder / "stages" / f"{stage}.json" for stage in (generator, "evaluate")]
    pipeline, report = (read_json(path).get("settings", {}) for path in records)
    if any(report.get(key) != value for key, value in pipeline.items()):
        raise HubError(
            f"the report in '{folder}' describes a pipeline with other settings; run the stage evaluate again"
        )


def push_files(
    files: dict[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload PDiffPipeline",
    create_pr: bool = False,
    keep: tuple[str, ...] = (),
) -> CommitInfo:
    """One commit that adds files, by their path, and deletes what earlier pushes left in their folders."""
    api = HfApi(token=token)
    try:
        card = files["README.md"]
        if isinstance(card, bytes):  # which was made here
            RepoCard(card.decode()).validate(repo_type)
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
        info = api.repo_info(repo_id, repo_type=repo_type)
        if private and not info.private:
            raise HubError(f"'{repo_id}' exists and is public; make it private on the Hub first, or choose another id")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
            info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        present = {sibling.rfilename for sibling in info.siblings or ()}  # type: ignore[union-attr]
        files = {path: file for path, file in files.items() if path not in keep or path not in present}
        folders = {path.partition("/")[0] for path in files if "/" in path} | {TUNING}
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
            f"'{repo_id}' could not be pushed: {_reason(error)}. No partial upload was published; push again"
        ) from error


def _reason(error: BaseException) -> str:
    """One line; of an upload that failed, what made it fail."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{error} {_reason(error.__cause__)}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or error.response.reason_phrase
        hint = "; log in with `hf auth login`, or give a token that can write" if status in (401, 403) else ""
        return f"the Hub answered {status} ({said}){hint}"
    return " ".join(str(error).split()) or type(error).__name__
