"""Networks small enough that all of their parameters can be generated, registered with timm.

    model = timm.create_model("convnet_mini", num_classes=10)

The five minis are the hand-designed networks of "Neural Network Diffusion" (arXiv 2402.13144, appendix A.2); their
parameter counts at 3x64x64 and 10 classes are those of its Table 6. `cnn3_mini` is the network of the
hyper-representation papers, which its appendix B.1 compares with; `perceptron_mini` is small enough for
a zoo of hundreds.

| name              | input   | parameters                                              |
|-------------------|---------|---------------------------------------------------------|
| `convnet_mini`    | 3x64x64 | 24,262                                                  |
| `mlp_mini`        | 3x64x64 | 66,970                                                  |
| `resnet_mini`     | 3x64x64 | 25,138                                                  |
| `vit_mini`        | 3x64x64 | 80,714                                                  |
| `convnext_mini`   | 3x64x64 | 74,970                                                  |
| `cnn3_mini`       | 1x28x28 | 2,464 (2,864 with `in_chans=3`)                         |
| `perceptron_mini` | 1x28x28 | 25,450 (4,978 with `img_size=14, hidden_size=24`)       |
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import Mlp, build_sincos2d_pos_embed, to_2tuple
from timm.models import ConvNeXt, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


class MiniNet(nn.Module):
    """What the hand-designed networks share: an image size fixed at construction, and timm's model interface.

    A subclass sets `stages` (the features) and `pre_logits` (what stands between features and classifier) in `build`.

    Args:
        num_classes (`int`): Outputs of the classifier; with 0 there is none.
        in_chans (`int`): Channels of the images.
        img_size (`int` or `tuple[int, int]`): Height and width of the images.

    Attributes:
        num_features (`int`): Channels that `forward_features` returns.
        head_hidden_size (`int`): Inputs of the classifier.
        stride (`int`): Both sides of the image must be multiples of it, and no smaller than `min_size`, which leaves
            something to classify.
    """

    num_features: int
    head_hidden_size: int
    stride: int
    min_size: int = 1
    stages: nn.Module
    pre_logits: nn.Module
    head: nn.Module

    def __init__(self, num_classes: int, in_chans: int, img_size: int | tuple[int, int], **kwargs: Any):
        super().__init__()
        self.in_chans = in_chans
        self.img_size = to_2tuple(img_size)
        min_size = max(self.stride, self.min_size)
        if any(side % self.stride or side < min_size for side in self.img_size):
            raise ValueError(
                f"{type(self).__name__} needs an img_size of multiples of {self.stride}, at least {min_size}, "
                f"got {self.img_size}."
            )
        self.build(*self.img_size, **kwargs)
        self.reset_classifier(num_classes)

    def build(self, height: int, width: int) -> None:
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            raise ValueError(f"{type(self).__name__} has no other pooling to choose, got global_pool={global_pool!r}.")
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        self.head.train(self.training)

    def check_input(self, x: torch.Tensor) -> None:
        expected = (self.in_chans, *self.img_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{type(self).__name__} was built for images of shape {expected} (channels, height, width), "
                f"got {tuple(x.shape[1:])}. Shapes of its tensors follow from that: resize the images, "
                "or create the model with another img_size or in_chans."
            )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, num_features, h, w)"""
        self.check_input(x)
        return self.stages(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features -> (B, num_classes), or (B, head_hidden_size) with `pre_logits`."""
        x = self.pre_logits(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules one after the other, each with a name."""
    return nn.Sequential(OrderedDict(modules))


def hidden_layer(in_features: int, out_features: int, act: nn.Module) -> nn.Sequential:
    """(B, C, h, w) -> (B, out_features), with C * h * w = in_features"""
    return named(flatten=nn.Flatten(), fc=nn.Linear(in_features, out_features), act=act)


class ConvNetMini(MiniNet):
    """ConvNet-mini: three convolutions, each with a layer norm over channels and positions, and two linear layers."""

    num_features, head_hidden_size, stride = 4, 16, 16

    def build(self, height: int, width: int) -> None:
        def stage(in_channels: int, out_channels: int, reduction: int, **settings) -> nn.Sequential:
            norm = nn.LayerNorm((out_channels, height // reduction, width // reduction))
            conv = nn.Conv2d(in_channels, out_channels, **settings)
            return named(conv=conv, norm=norm, act=nn.LeakyReLU(), pool=nn.MaxPool2d(2))

        self.stages = nn.Sequential(
            stage(self.in_chans, 8, reduction=2, kernel_size=7, stride=2, padding=3),  # (B, 8, H/4, W/4) after the pool
            stage(8, 8, reduction=4, kernel_size=3, padding=1),  # (B, 8, H/8, W/8)
            stage(8, 4, reduction=8, kernel_size=3, padding=1),  # (B, 4, H/16, W/16)
        )
        self.pre_logits = hidden_layer(4 * (height // 16) * (width // 16), 16, nn.LeakyReLU())


class MLPMini(MiniNet):
    """MLP-mini: three linear layers on a grey image of half the size."""

    num_features, head_hidden_size, stride = 16, 16, 2

    def build(self, height: int, width: int) -> None:
        def stage(in_features: int, out_features: int) -> nn.Sequential:
            return named(fc=nn.Linear(in_features, out_features), norm=nn.LayerNorm(out_features), act=nn.LeakyReLU())

        self.pool = nn.AvgPool2d(2)
        self.stages = nn.Sequential(stage((height // 2) * (width // 2), 64), stage(64, 16))
        self.pre_logits = nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, 16)"""
        self.check_input(x)
        x = self.pool(x).mean(dim=1).flatten(1)  # (B, H/2 * W/2)
        return self.stages(x)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions through a bottleneck, each with its activation, around a skip."""

    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, bottleneck, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(bottleneck, channels, kernel_size=3, padding=1)
        self.act = nn.LeakyReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w)"""
        return x + self.act(self.conv2(self.act(self.conv1(x))))


class ResNetMini(MiniNet):
    """ResNet-mini: a convolution and two residual blocks, each with a layer norm over channels and positions."""

    num_features, head_hidden_size, stride = 8, 16, 16

    def build(self, height: int, width: int) -> None:
        def stage(reduction: int, **modules: nn.Module) -> nn.Sequential:
            norm = nn.LayerNorm((8, height // reduction, width // reduction))
            return named(**modules, norm=norm, pool=nn.MaxPool2d(2))

        conv = nn.Conv2d(self.in_chans, 8, kernel_size=3, stride=2, padding=1)
        self.stages = nn.Sequential(
            stage(2, conv=conv, act=nn.LeakyReLU()),  # (B, 8, H/4, W/4)
            stage(4, block=ResidualBlock(8, 4)),  # (B, 8, H/8, W/8)
            stage(8, block=ResidualBlock(8, 4)),  # (B, 8, H/16, W/16)
        )
        self.pre_logits = hidden_layer(8 * (height // 16) * (width // 16), 16, nn.LeakyReLU())


class Attention(nn.Module):
    """Self-attention without biases. Older releases of timm have none with heads narrower than a share of `dim`."""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=False)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)"""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, N, 3, heads, head_dim)
        x = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (B, heads, N, head_dim)
        return self.proj(x.transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP. timm's `Block` cannot have biases in the MLP and none in the attention."""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)"""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTMini(MiniNet):
    """ViT-mini: normalised 8x8 patches, fixed 2-D sin-cos positions, four transformer blocks, mean of the tokens."""

    num_features, head_hidden_size, stride = 64, 64, 8
    pos_embed: torch.Tensor

    def build(self, height: int, width: int) -> None:
        self.grid_size = (height // 8, width // 8)
        patch_dim = self.in_chans * 8 * 8
        self.patch_embed = named(norm1=nn.LayerNorm(patch_dim), proj=nn.Linear(patch_dim, 64), norm2=nn.LayerNorm(64))
        # Not persistent: it is no parameter and follows from the image size, so no file has to carry it.
        pos_embed = torch.empty(self.grid_size[0] * self.grid_size[1], 64)
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        self.init_non_persistent_buffers()
        self.stages = nn.Sequential(*(TransformerBlock(64, num_heads=4, head_dim=8) for _ in range(4)))
        self.norm = nn.LayerNorm(64)
        self.pre_logits = nn.Identity()

    def init_non_persistent_buffers(self) -> None:
        """Called by timm and transformers after they have built the model on the meta device."""
        self.pos_embed.copy_(build_sincos2d_pos_embed(list(self.grid_size), dim=64, device=self.pos_embed.device))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, 64), with N = H/8 * W/8"""
        self.check_input(x)
        x = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # (B, C, h, 8, w, 8)
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, h * w, 8 * 8 * C)
        x = self.patch_embed(x) + self.pos_embed  # (B, N, 64)
        return self.norm(self.stages(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, N, 64) -> (B, num_classes), or (B, 64) with `pre_logits`."""
        return super().forward_head(x.mean(dim=1), pre_logits)


class CNN3Mini(MiniNet):
    """The 3-layer convolutional network of the hyper-representation papers.

    It is the network of the MNIST and SVHN model zoos of "Self-Supervised Representation Learning on Neural Network
    Weights for Model Characteristic Prediction" (arXiv 2110.15288), "Hyper-Representations as Generative Models" (arXiv
    2209.14733) and "Model Zoos" (arXiv 2209.14764): three unpadded convolutions (8, 6 and 4 channels; kernels 5, 5 and
    2), a max pool before the activation of the first two, and linear layers 36-20-10. The published zoo of MNIST models
    has tanh and no dropout. On 1x28x28 the parameters are 208 + 1,206 + 100 + 740 + 210 = 2,464, the length of the
    zoo's weight vectors; each further input channel adds 200, so that 3x28x28 has 2,864.
    """

    num_features, head_hidden_size, stride, min_size = 4, 20, 4, 20

    def build(self, height: int, width: int) -> None:
        def stage(in_channels: int, out_channels: int) -> nn.Sequential:
            return named(conv=nn.Conv2d(in_channels, out_channels, kernel_size=5), pool=nn.MaxPool2d(2), act=nn.Tanh())

        self.stages = nn.Sequential(
            stage(self.in_chans, 8),  # (B, 8, (H - 4) / 2, (W - 4) / 2)
            stage(8, 6),  # (B, 6, H/4 - 3, W/4 - 3)
            named(conv=nn.Conv2d(6, 4, kernel_size=2), act=nn.Tanh()),  # (B, 4, H/4 - 4, W/4 - 4)
        )
        self.pre_logits = hidden_layer(4 * (height // 4 - 4) * (width // 4 - 4), 20, nn.Tanh())


class PerceptronMini(MiniNet):
    """All pixels, one hidden layer with ReLU, and the classifier."""

    stride = 1

    def build(self, height: int, width: int, hidden_size: int = 32) -> None:
        self.num_features, self.head_hidden_size = self.in_chans, hidden_size
        self.stages = nn.Identity()
        self.pre_logits = hidden_layer(self.in_chans * height * width, hidden_size, nn.ReLU())


CONVNEXT = {
    "depths": (1, 2, 2, 2),
    "dims": (16, 32, 32, 32),
    "feature_cfg": {"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
}
# The class of each, channels and side of its images, its first convolution, and more arguments of the class.
MINIS: dict[str, tuple[type[nn.Module], int, int, str | None, dict[str, Any]]] = {
    "convnet_mini": (ConvNetMini, 3, 64, "stages.0.conv", {}),
    "mlp_mini": (MLPMini, 3, 64, None, {}),  # no layer depends on the number of channels
    "resnet_mini": (ResNetMini, 3, 64, "stages.0.conv", {}),
    "vit_mini": (ViTMini, 3, 64, None, {}),  # a norm and a linear layer over whole patches
    "cnn3_mini": (CNN3Mini, 1, 28, "stages.0.conv", {}),
    "perceptron_mini": (PerceptronMini, 1, 28, None, {}),
    "convnext_mini": (ConvNeXt, 3, 64, "stem.0", CONVNEXT),
}
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 10,
            "input_size": (in_chans, size, size),
            "fixed_input_size": model_class is not ConvNeXt,
            "pool_size": (2, 2) if model_class is ConvNeXt else None,
            "crop_pct": 1.0,
            "interpolation": "bilinear" if model_class is PerceptronMini else "bicubic",
            "mean": IMAGENET_INCEPTION_MEAN[:in_chans],
            "std": IMAGENET_INCEPTION_STD[:in_chans],
            "classifier": "head.fc" if model_class is ConvNeXt else "head",
            "first_conv": first_conv,
        }
        for name, (model_class, in_chans, size, first_conv, _) in MINIS.items()
    }
)


def _register(name: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(model_class, name, pretrained, **arguments | kwargs)

    model_class, *_, arguments = MINIS[name]
    create.__name__, create.__doc__ = name, model_class.__doc__
    register_model(create)


for _name in MINIS:
    _register(_name)
