"""A multilayer perceptron with one hidden layer, registered with timm: small enough for a zoo of hundreds."""

from collections import OrderedDict

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .mini import MiniNet


class PerceptronMini(MiniNet):
    """All pixels, one hidden layer with ReLU, and the classifier."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        hidden_size: int = 32,
    ):
        super().__init__(in_chans, img_size, num_features=in_chans, head_hidden_size=hidden_size, stride=1)
        height, width = self.img_size
        self.stages = nn.Identity()
        self.pre_logits = nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),  # (B, C, H, W) -> (B, C H W)
                fc=nn.Linear(in_chans * height * width, hidden_size),
                act=nn.ReLU(),
            )
        )
        self.reset_classifier(num_classes)


default_cfgs = generate_default_cfgs(
    {
        "perceptron_mini": {
            "url": "",
            "num_classes": 10,
            "input_size": (1, 28, 28),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "fixed_input_size": True,
            "mean": (0.5,),
            "std": (0.5,),
            "first_conv": None,
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def perceptron_mini(pretrained: bool = False, **kwargs) -> PerceptronMini:
    """Linear layers 784-32-10; 25,450 parameters on 1x28x28, 4,978 with `img_size=14, hidden_size=24`."""
    return build_model_with_cfg(PerceptronMini, "perceptron_mini", pretrained, **kwargs)
