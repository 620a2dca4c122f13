"""Reads Markdown as GitHub and the Hub do, and finds what would not be shown as meant."""

from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token


def parse(text: str) -> list[Token]:
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)


def check_markdown(text: str, folder: Path | None = None) -> list[Token]:
    """
    Every line that looks like one of a table is in a table whose rows are all as long as its header; folds are closed;
    links into the repository lead to files of `folder`. Returns what the parser makes of it.
    """
    tokens = parse(text)
    rows = sum(token.type == "tr_open" for token in tokens)
    tables = sum(token.type == "table_open" for token in tokens)
    code = "\n".join(token.content for token in tokens if token.type == "fence").splitlines()
    lines = [line for line in text.splitlines() if line.startswith("|") and line not in code]
    assert len(lines) == rows + tables, "a table is not read as one"  # rules are no rows
    for token in tokens:
        assert not (token.type == "inline" and token.content.startswith("|") and "| --" in token.content)
    for line in lines:
        cells = line.replace("\\|", "").count("|") - 1
        assert cells >= 2, line
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>")
    inline = [child for token in tokens if token.children for child in token.children]
    links = [child.attrs for child in inline if child.type in ("image", "link_open")]
    for target in (str(attributes.get("src") or attributes.get("href")) for attributes in links):
        if folder is not None and not target.startswith("http"):
            assert (folder / target).is_file(), target
    return tokens


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, its header first."""
    found: list[list[list[str]]] = []
    for token in parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("")
        elif token.type == "inline" and found and found[-1] and found[-1][-1] and found[-1][-1][-1] == "":
            found[-1][-1][-1] = token.content
    return found
