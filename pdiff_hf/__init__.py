"""Neural Network Diffusion (p-diff) for the Hugging Face ecosystem."""

import importlib

from .utils.imports import lazy_attributes, register_components, stub_modules, when_imported

__version__ = "0.3.0.dev0"

# What this package is for: all of it is imported when it is asked for.
_MODULES = stub_modules(__file__)
__all__ = sorted(_MODULES)

# diffusers looks for the base class of the components that this package can load, which is no part of it.
__getattr__ = lazy_attributes(__name__, _MODULES | {"ModelMixin": "diffusers"})


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


when_imported("diffusers.pipelines.pipeline_loading_utils", register_components)
# The mini networks are architectures of timm like any other.
when_imported("timm", lambda module: importlib.import_module("pdiff_hf.networks.mini"))
