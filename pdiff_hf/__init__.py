"""Neural Network Diffusion (p-diff) for the Hugging Face ecosystem."""

import importlib
from typing import TYPE_CHECKING

from .utils.imports import lazy_attributes, register_components, when_imported

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from .layout import LayoutError, ParameterLayout
    from .models import ConditionEncoder, LatentDenoiser, ParameterAutoencoder
    from .networks.ensemble import EnsembleModel
    from .pipelines import PDiffPipeline, PDiffPipelineOutput
    from .selection import select_parameters

__version__ = "0.2.0"

__all__ = [
    "ConditionEncoder",
    "EnsembleModel",
    "LatentDenoiser",
    "LayoutError",
    "ModelMixin",
    "PDiffPipeline",
    "PDiffPipelineOutput",
    "ParameterAutoencoder",
    "ParameterLayout",
    "select_parameters",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "ConditionEncoder": ".models",
        "EnsembleModel": ".networks.ensemble",
        "LatentDenoiser": ".models",
        "LayoutError": ".layout",
        "ModelMixin": "diffusers",
        "PDiffPipeline": ".pipelines",
        "PDiffPipelineOutput": ".pipelines",
        "ParameterAutoencoder": ".models",
        "ParameterLayout": ".layout",
        "select_parameters": ".selection",
    },
)

when_imported("diffusers.pipelines.pipeline_loading_utils", register_components)
# The mini networks are architectures of timm like any other.
when_imported("timm", lambda module: importlib.import_module("pdiff_hf.networks.mini"))
