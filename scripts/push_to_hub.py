"""
Publishes what is finished: the generator of a run with its report, a saved pipeline, or a parameter data set.

    python scripts/push_to_hub.py outputs/digits --hub_model_id user/digits-generator
    python scripts/push_to_hub.py outputs/on_demand --hub_model_id user/digits-on-demand --space
    python scripts/push_to_hub.py outputs/digits/pipeline --hub_model_id user/digits-generator --revision draft
    python scripts/push_to_hub.py outputs/digits/snapshots --hub_model_id lab/digits-snapshots --hub_private_repo
"""

import argparse
from importlib.metadata import requires, version
from pathlib import Path

from pdiff_hf.utils.files import expand_path
from pdiff_hf.utils.terminal import start_script

APP = '''"""The page of a generator of networks."""

from pdiff_hf.scripts.page import LAUNCH, build_app

build_app("{repo_id}").launch(**LAUNCH)
'''
CARD = """---
title: {name}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: {license}
models:
- {repo_id}
---

Networks that are generated on demand, at work: the page of [{repo_id}](https://huggingface.co/{repo_id}). `pdiff_hf` is
the package that made it.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=start_script(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", help="A run's output_dir, or its folder pipeline or snapshots.")
    parser.add_argument("--hub_model_id", help="`user/name` or `organization/name`; the folder's name if not given.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Create the repository as a private one.")
    parser.add_argument("--hub_token", help="Token that can write; that of `hf auth login` if not given.")
    parser.add_argument("--hub_license", default="apache-2.0", help="Licence for the model card of a run.")
    parser.add_argument("--revision", help="Branch to push to; created if it does not exist.")
    parser.add_argument("--space", action="store_true", help="Of a generator, also a Space of that id with its page.")
    return parser.parse_args()


def space_files(repo_id: str, license: str) -> dict[str, Path | bytes]:
    """A Space that shows a generator, by path: the page, its card, this package, and what that needs."""
    from packaging.requirements import Requirement

    import pdiff_hf
    from pdiff_hf import pipelines, scripts

    needed = [Requirement(line) for line in requires("pdiff_hf") or ()]
    if not needed:
        raise ValueError("a Space needs the list of what this package requires: install it with pip")
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": "app"})]
    lines = [
        f"{one.name}{one.specifier}" for one in needed if one.name != "gradio"
    ]  # of which the card has the version
    card = CARD.format(name=repo_id.partition("/")[2], repo_id=repo_id, license=license, gradio=version("gradio"))
    files: dict[str, Path | bytes] = {"README.md": card.encode(), "app.py": APP.format(repo_id=repo_id).encode()}
    files["requirements.txt"] = "\n".join([*lines, ""]).encode()
    for package, pattern in ((pdiff_hf, "**/*"), (pipelines, "*"), (scripts, "*")):
        root, place = Path(package.__path__[0]), Path(*package.__name__.split("."))
        found = (path for path in sorted(root.glob(pattern)) if path.suffix in (".py", ".pyi", ".json", ".jinja"))
        files |= {(place / path.relative_to(root)).as_posix(): path for path in found}
    return files


def main() -> None:
    args = parse_args()
    # These take seconds to import, which a mistyped flag should not wait for.
    from pdiff_hf.hub.push import (
        push_files,
        push_pipeline_to_hub,
        push_run_to_hub,
        push_snapshots_to_hub,
        resolve_repo_id,
    )
    from pdiff_hf.run.terminal import one_line_errors

    with one_line_errors():
        folder = Path(expand_path(args.folder)).resolve()
        push, extra = push_run_to_hub, {"license": args.hub_license}
        if (folder / "model_index.json").is_file():
            push, extra = push_pipeline_to_hub, {}
        elif (folder / "layout").is_dir():
            push, extra = push_snapshots_to_hub, {}
            if args.space:
                raise ValueError(f"--space is the page of a generator, and '{folder}' holds snapshots")
        repo_id = resolve_repo_id(args.hub_model_id or folder.name, args.hub_token)
        space = space_files(repo_id, args.hub_license) if args.space else {}
        where = {"private": args.hub_private_repo or None, "revision": args.revision, "token": args.hub_token}
        print(f"Published: {push(folder, repo_id, **where, **extra)}")
        if space:
            print(f"Its page: {push_files(space, repo_id, 'space', **where, commit_message='Upload page')}")


if __name__ == "__main__":
    main()
