"""The pages of the documentation, the snippets that they show, and the Python blocks that stand in them."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDER = ROOT / "docs" / "pages"
PAGES = {
    str(path.relative_to(FOLDER).with_suffix("")): path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.md")
}
SNIPPETS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "snippets").glob("*.py")}


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """Language and code of every block of a text."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(language, code) for language, code in found if language in languages]


def run_page(name: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs the Python blocks of a page, one after the other, with the names that it takes for granted."""
    for _, code in blocks(PAGES[name], "python"):
        if not code.startswith("--8<--"):
            exec(compile(code, f"{name}.md", "exec"), names)
    return names
