"""Writes the page of settings from the config that Python, recipes and flags share."""

import dataclasses
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from pdiff_hf.run.options import default_of, group_of
from pdiff_hf.run.settings import SECTIONS

PAGE = "guide/settings.md"
INTRODUCTION = """# Settings

A setting is an argument of [`PDiffConfig`][pdiff_hf.PDiffConfig], a key of a recipe file, and a flag of
`scripts/train.py`, `collect.py` and `evaluate.py`, all of the same name. A flag overrides the recipe. A group such as
`tune_args` holds settings that are rarely changed: `tune_args: {penalty: 0.1}` in a file, and `--tune_args penalty=0.1`
as a flag.

A setting that would have no effect in a run is an error that says why.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, PAGE, content="\n\n".join([INTRODUCTION, *_sections()])))
    return files


def _sections() -> Iterator[str]:
    for name, section in SECTIONS.items():
        rows = ["| setting | default | what it is |", "| --- | --- | --- |", *_rows(section)]
        yield f"## {name.capitalize()}\n\n{section.__doc__}\n\n" + "\n".join(rows)


def _rows(section: type, prefix: str = "") -> Iterator[str]:
    for key in dataclasses.fields(section):
        group = group_of(key)
        if group is not None:
            yield from _rows(group, f"{prefix}{key.name}.")
            continue
        choices = key.metadata.get("choices")
        text = key.metadata["help"] + (f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else "")
        yield f"| `{prefix}{key.name}` | `{default_of(key)}` | {text.replace('|', chr(92) + '|')} |"
