"""Docstrings as the libraries of Hugging Face write them, for mkdocstrings (Google's style)."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

# What the pages of the reference show, by its last name: only that can be linked to.
PAGES = (Path(__file__).parent / "pages" / "reference").glob("*.md")
SHOWN = {
    path.rpartition(".")[2]: path
    for page in PAGES
    for path in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}
LINK = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")  # [`Name`]
ARGUMENT = re.compile(r"^(\s+\*{0,2}\w+) \((.*)\):", re.MULTILINE)  # name (`type`, *optional*, defaults to 3):
DEFAULT = re.compile(r"(, )?\*optional\*.*")


class HuggingFaceDocstrings(Extension):
    """[`Name`] becomes a link to a class of the reference, or else code; types of arguments lose their marks."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = LINK.sub(self._link, obj.docstring.value)
            obj.docstring.value = ARGUMENT.sub(self._argument, text)

    @staticmethod
    def _link(match: re.Match) -> str:
        name = match[1].rpartition(".")[2]
        return f"[`{name}`][{SHOWN[name]}]" if name in SHOWN else f"`{match[1]}`"

    @staticmethod
    def _argument(match: re.Match) -> str:
        kind = DEFAULT.sub("", match[2])
        kind = re.sub(r"\[`(\w+)`\]\[[\w.]+\]", r"\1", kind).replace("`", "")
        return f"{match[1]} ({kind}):" if kind else f"{match[1]}:"
