"""Neural Network Diffusion (p-diff) for the Hugging Face ecosystem."""

from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

# With this entry a pipeline's index names its components as ["pdiff_hf", "ParameterAutoencoder"], which diffusers can
# load from the Hub too; without it, it names their module, which loads from a local folder only. The base class has to
# be an attribute of this package for that.
LOADABLE_CLASSES["pdiff_hf"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}

from .layout import LayoutError, ParameterLayout  # noqa: E402
from .models import LatentDenoiser, ParameterAutoencoder  # noqa: E402
from .networks.ensemble import EnsembleModel  # noqa: E402
from .pipelines import PDiffPipeline, PDiffPipelineOutput  # noqa: E402
from .selection import select_parameters  # noqa: E402

__version__ = "0.1.0"

__all__ = [
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
