"""Networks small enough that all of their parameters can be generated, registered with timm.

    model = timm.create_model("convnet_mini", num_classes=10)

The five minis are the hand-designed networks of "Neural Network Diffusion" (arXiv 2402.13144, appendix A.2); their
parameter counts at 3x64x64 and 10 classes are those of its Table 6. `cnn3_mini` is the network of the
hyper-representation papers, which its appendix B.1 compares with.

| name            | input   | parameters                        |
|-----------------|---------|-----------------------------------|
| `convnet_mini`  | 3x64x64 | 24,262                            |
| `mlp_mini`      | 3x64x64 | 66,970                            |
| `resnet_mini`   | 3x64x64 | 25,138                            |
| `vit_mini`      | 3x64x64 | 80,714                            |
| `convnext_mini` | 3x64x64 | 74,970                            |
| `cnn3_mini`     | 1x28x28 | 2,464 (2,864 with `in_chans=3`)   |
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import Mlp, build_sincos2d_pos_embed, to_2tuple
from timm.models import ConvNeXt, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

__all__ = ["CNN3Mini", "ConvNetMini", "MLPMini", "ResNetMini", "ViTMini"]


class MiniNet(nn.Module):
    """What the hand-designed networks share: an image size fixed at construction, and timm's model interface.

    A subclass sets `stages` (the features) and `pre_logits` (what stands between features and classifier), then calls
    `reset_classifier`.

    Args:
        in_chans (`int`): Channels of the images.
        img_size (`int` or `tuple[int, int]`): Height and width of the images.
        num_features (`int`): Channels that `forward_features` returns.
        head_hidden_size (`int`): Inputs of the classifier.
        stride (`int`): Both sides of the image must be multiples of it.
        min_size (`int`, *optional*, defaults to `stride`): The smallest side that leaves something to classify.
    """

    stages: nn.Module
    pre_logits: nn.Module
    head: nn.Module

    def __init__(
        self,
        in_chans: int,
        img_size: int | tuple[int, int],
        num_features: int,
        head_hidden_size: int,
        stride: int,
        min_size: int | None = None,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.img_size = to_2tuple(img_size)
        self.num_features = num_features
        self.head_hidden_size = head_hidden_size
        min_size = min_size or stride
        if any(side % stride or side < min_size for side in self.img_size):
            raise ValueError(
                f"{type(self).__name__} needs an img_size of multiples of {stride}, at least {min_size}, "
                f"got {self.img_size}."
            )

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            raise ValueError(f"{type(self).__name__} has no other pooling to choose, got global_pool={global_pool!r}.")
        self.num_classes = num_classes
        if num_classes > 0:
            like = next(self.parameters())
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        else:
            self.head = nn.Identity()
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


def hidden_layer(in_features: int, out_features: int, act_layer: type[nn.Module] = nn.LeakyReLU) -> nn.Sequential:
    """(B, C, h, w) -> (B, out_features), with C * h * w = in_features"""
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), fc=nn.Linear(in_features, out_features), act=act_layer()))


class ConvNetMini(MiniNet):
    """ConvNet-mini: three convolutions, each with a layer norm over channels and positions, and two linear layers."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, img_size: int | tuple[int, int] = 64):
        super().__init__(in_chans, img_size, num_features=4, head_hidden_size=16, stride=16)
        height, width = self.img_size

        def stage(in_channels: int, out_channels: int, reduction: int, **conv) -> nn.Sequential:
            norm_shape = (out_channels, height // reduction, width // reduction)
            return nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(in_channels, out_channels, **conv),
                    norm=nn.LayerNorm(norm_shape),
                    act=nn.LeakyReLU(),
                    pool=nn.MaxPool2d(2),
                )
            )

        self.stages = nn.Sequential(
            stage(in_chans, 8, reduction=2, kernel_size=7, stride=2, padding=3),  # (B, 8, H/4, W/4) after the pool
            stage(8, 8, reduction=4, kernel_size=3, padding=1),  # (B, 8, H/8, W/8)
            stage(8, 4, reduction=8, kernel_size=3, padding=1),  # (B, 4, H/16, W/16)
        )
        self.pre_logits = hidden_layer(4 * (height // 16) * (width // 16), 16)
        self.reset_classifier(num_classes)


class MLPMini(MiniNet):
    """MLP-mini: three linear layers on a grey image of half the size."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, img_size: int | tuple[int, int] = 64):
        super().__init__(in_chans, img_size, num_features=16, head_hidden_size=16, stride=2)
        height, width = self.img_size

        def stage(in_features: int, out_features: int) -> nn.Sequential:
            return nn.Sequential(
                OrderedDict(
                    fc=nn.Linear(in_features, out_features), norm=nn.LayerNorm(out_features), act=nn.LeakyReLU()
                )
            )

        self.pool = nn.AvgPool2d(2)
        self.stages = nn.Sequential(stage((height // 2) * (width // 2), 64), stage(64, 16))
        self.pre_logits = nn.Identity()
        self.reset_classifier(num_classes)

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

    def __init__(self, num_classes: int = 10, in_chans: int = 3, img_size: int | tuple[int, int] = 64):
        super().__init__(in_chans, img_size, num_features=8, head_hidden_size=16, stride=16)
        height, width = self.img_size

        def norm_and_pool(reduction: int) -> dict[str, nn.Module]:
            return {"norm": nn.LayerNorm((8, height // reduction, width // reduction)), "pool": nn.MaxPool2d(2)}

        self.stages = nn.Sequential(
            nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(in_chans, 8, kernel_size=3, stride=2, padding=1),
                    act=nn.LeakyReLU(),
                    **norm_and_pool(2),
                )
            ),  # (B, 8, H/4, W/4)
            nn.Sequential(OrderedDict(block=ResidualBlock(8, 4), **norm_and_pool(4))),  # (B, 8, H/8, W/8)
            nn.Sequential(OrderedDict(block=ResidualBlock(8, 4), **norm_and_pool(8))),  # (B, 8, H/16, W/16)
        )
        self.pre_logits = hidden_layer(8 * (height // 16) * (width // 16), 16)
        self.reset_classifier(num_classes)


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

    pos_embed: torch.Tensor

    def __init__(self, num_classes: int = 10, in_chans: int = 3, img_size: int | tuple[int, int] = 64):
        super().__init__(in_chans, img_size, num_features=64, head_hidden_size=64, stride=8)
        self.grid_size = (self.img_size[0] // 8, self.img_size[1] // 8)
        patch_dim = in_chans * 8 * 8
        self.patch_embed = nn.Sequential(
            OrderedDict(norm1=nn.LayerNorm(patch_dim), proj=nn.Linear(patch_dim, 64), norm2=nn.LayerNorm(64))
        )
        # Not persistent: it is no parameter and follows from the image size, so no file has to carry it.
        pos_embed = torch.empty(self.grid_size[0] * self.grid_size[1], 64)
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        self.init_non_persistent_buffers()
        self.stages = nn.Sequential(*(TransformerBlock(64, num_heads=4, head_dim=8) for _ in range(4)))
        self.norm = nn.LayerNorm(64)
        self.pre_logits = nn.Identity()
        self.reset_classifier(num_classes)

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

    def __init__(self, num_classes: int = 10, in_chans: int = 1, img_size: int | tuple[int, int] = 28):
        super().__init__(in_chans, img_size, num_features=4, head_hidden_size=20, stride=4, min_size=20)
        height, width = self.img_size

        def stage(in_channels: int, out_channels: int) -> nn.Sequential:
            conv = nn.Conv2d(in_channels, out_channels, kernel_size=5)
            return nn.Sequential(OrderedDict(conv=conv, pool=nn.MaxPool2d(2), act=nn.Tanh()))

        self.stages = nn.Sequential(
            stage(in_chans, 8),  # (B, 8, (H - 4) / 2, (W - 4) / 2)
            stage(8, 6),  # (B, 6, H/4 - 3, W/4 - 3)
            nn.Sequential(OrderedDict(conv=nn.Conv2d(6, 4, kernel_size=2), act=nn.Tanh())),  # (B, 4, H/4 - 4, W/4 - 4)
        )
        self.pre_logits = hidden_layer(4 * (height // 4 - 4) * (width // 4 - 4), 20, act_layer=nn.Tanh)
        self.reset_classifier(num_classes)


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 10,
        "input_size": (3, 64, 64),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "stages.0.conv",
        "classifier": "head",
        "paper_ids": "arXiv:2402.13144",
        "paper_name": "Neural Network Diffusion",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "convnet_mini": _cfg(),
        "mlp_mini": _cfg(first_conv=None),  # no layer depends on the number of channels
        "resnet_mini": _cfg(),
        "vit_mini": _cfg(first_conv=None),  # its first layers are a norm and a linear layer over whole patches
        "convnext_mini": _cfg(fixed_input_size=False, pool_size=(2, 2), first_conv="stem.0", classifier="head.fc"),
        "cnn3_mini": _cfg(
            input_size=(1, 28, 28),
            mean=(0.5,),
            std=(0.5,),
            paper_ids="arXiv:2110.15288",
            paper_name=(
                "Self-Supervised Representation Learning on Neural Network Weights for Model Characteristic Prediction"
            ),
        ),
    }
)


@register_model
def convnet_mini(pretrained: bool = False, **kwargs) -> ConvNetMini:
    """ConvNet-mini: convolutions 3-8-8-4 and linear layers 64-16-10; 24,262 parameters."""
    return build_model_with_cfg(ConvNetMini, "convnet_mini", pretrained, **kwargs)


@register_model
def mlp_mini(pretrained: bool = False, **kwargs) -> MLPMini:
    """MLP-mini: linear layers 1024-64-16-10; 66,970 parameters."""
    return build_model_with_cfg(MLPMini, "mlp_mini", pretrained, **kwargs)


@register_model
def resnet_mini(pretrained: bool = False, **kwargs) -> ResNetMini:
    """ResNet-mini: a convolution 3-8, two residual blocks 8-4-8 and linear layers 128-16-10; 25,138 parameters."""
    return build_model_with_cfg(ResNetMini, "resnet_mini", pretrained, **kwargs)


@register_model
def vit_mini(pretrained: bool = False, **kwargs) -> ViTMini:
    """ViT-mini: 64 tokens of width 64, depth 4, four heads of width 8; 80,714 parameters."""
    return build_model_with_cfg(ViTMini, "vit_mini", pretrained, **kwargs)


@register_model
def convnext_mini(pretrained: bool = False, **kwargs) -> ConvNeXt:
    """ConvNeXt-mini: timm's ConvNeXt with depths 1-2-2-2 and widths 16-32-32-32; 74,970 parameters."""
    model_args = {"depths": (1, 2, 2, 2), "dims": (16, 32, 32, 32), **kwargs}
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(ConvNeXt, "convnext_mini", pretrained, feature_cfg=feature_cfg, **model_args)


@register_model
def cnn3_mini(pretrained: bool = False, **kwargs) -> CNN3Mini:
    """The 3-layer network of the hyper-representation papers; 2,464 parameters on 1x28x28, 2,864 on 3x28x28."""
    return build_model_with_cfg(CNN3Mini, "cnn3_mini", pretrained, **kwargs)
