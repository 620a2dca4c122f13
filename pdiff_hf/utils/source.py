"""What the source of a class depends on, so that a result is not taken for that of an edited class."""

import ast
import hashlib
import inspect
import sys
from pathlib import Path

PACKAGE = __name__.partition(".")[0]


def source_digests(cls: type) -> dict[str, str]:
    """
    Digests of the files that a class, and what it derives from, is written in, and of the modules beside them that they
    import, by the files' names. What this package and installed libraries have is left out: their version stands for
    it. A class without a file, such as one of a notebook, is known by its own source.
    """
    digests: dict[str, str] = {}
    for base in inspect.getmro(cls):
        module = sys.modules.get(base.__module__)
        path = getattr(module, "__file__", None)
        if path is None and base.__module__ == "__main__":
            digests[base.__qualname__] = _digest(_own_source(base))
        elif path is not None and _is_users(base.__module__, Path(path)):
            for file in _beside(Path(path)):
                digests[file.name if file.name != "__init__.py" else f"{file.parent.name}/{file.name}"] = _digest(
                    file.read_bytes()
                )
    return dict(sorted(digests.items()))


def _own_source(cls: type) -> bytes:
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError):  # typed in, and kept nowhere
        return "\n".join(sorted(f"{k}: {getattr(v, '__code__', v)!r}" for k, v in vars(cls).items())).encode()


def _digest(source: bytes) -> str:
    return hashlib.blake2b(source, digest_size=8).hexdigest()


def _is_users(module: str, path: Path) -> bool:
    if module.partition(".")[0] == PACKAGE or path.suffix != ".py":
        return False
    installed = ("site-packages", "dist-packages")
    return not any(part in installed for part in path.parts) and not path.is_relative_to(Path(ast.__file__).parent)


def _beside(path: Path) -> list[Path]:
    """A file, and the files in its folder, and in packages there, that it imports, and those that these import."""
    found, pending = [path], [path]
    while pending:
        file = pending.pop()
        for name, level in _imports(file):
            target = file.parents[min(max(0, level - 1), len(file.parents) - 1)].joinpath(*name.split("."))
            for candidate in (target.with_suffix(".py"), target / "__init__.py"):
                if name and candidate.is_file() and candidate not in found:
                    found.append(candidate)
                    pending.append(candidate)
    return found


def _imports(path: Path) -> list[tuple[str, int]]:
    """Names of modules that a file imports, wherever it does so, and how many dots stand before each."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # it is imported, and says so itself
        return []
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = f"{node.module}." if node.module else ""
            found += [(node.module or "", node.level), *((f"{start}{alias.name}", node.level) for alias in node.names)]
    return found
