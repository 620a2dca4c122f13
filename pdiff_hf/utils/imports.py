"""Imports that wait until they are needed: torch and the libraries above it take seconds."""

import ast
import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """
    A `__getattr__` for the `__init__.py` of `package` (PEP 562).

    Args:
        modules (`Mapping[str, str]`): For each name the module that has it; one that begins with a dot is relative.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name], package), name)

    return get


def stub_modules(file: str) -> dict[str, str]:
    """For each name that the `.pyi` beside the `__init__.py` of a package imports, the module that has it."""
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {a.name: f".{n.module}" for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}


def when_imported(module: str, function: Callable[[ModuleType], Any]) -> None:
    """Calls `function(module)` as soon as a module of another library has been imported: now, or when it is."""
    if module in sys.modules:
        function(sys.modules[module])
    else:
        sys.meta_path.insert(0, _Finder(module, function))


def require_modules(what: str, extra: str, *modules: str) -> None:
    """Raises an `ImportError` that names the extra of this package, if a module that `what` needs is not installed."""
    missing = [name for name in modules if sys.modules.get(name, name) is None or not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(f"{what} needs {' and '.join(missing)}: pip install 'pdiff_hf[{extra}]'")


def register_components(module: ModuleType) -> None:
    """
    Makes diffusers name the components of a pipeline's index as `["pdiff_hf", "ParameterAutoencoder"]`, which loads
    from the Hub too; otherwise it names their module, which loads from a local folder only. The base class of
    components has to be an attribute of this package for that.

    Args:
        module (`ModuleType`): `diffusers.pipelines.pipeline_loading_utils`. Its table is not a documented interface:
            a release that has none is a warning.
    """
    table = getattr(module, "LOADABLE_CLASSES", None)
    if isinstance(table, dict):
        table["pdiff_hf"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    else:
        warnings.warn(
            "this release of diffusers keeps no table of components that pdiff_hf knows: generators load from folders, "
            "but those saved now may not load from the Hub; upgrade pdiff_hf, or use an older diffusers",
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module as the other finders do, and loads it as they do, but calls a function afterwards."""

    def __init__(self, module: str, function: Callable[[ModuleType], Any]):
        self.module, self.function = module, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # of a module that is being imported
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path.remove(self)
        self.function(module)
