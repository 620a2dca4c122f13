"""Small networks of transformers and diffusers, made on the spot, and adapters for them."""

import torch
from transformers import BertConfig, BertForSequenceClassification

IDS = torch.tensor([[1, 2, 3, 4]])
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16, "max_position_embeddings": 16}


def bert(**changes) -> BertForSequenceClassification:
    """A text classifier, always with the same weights; `changes` are of its config."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES | changes)).eval()


def unet(adapter: bool = True):
    """diffusers' U-Net with conditions, and a LoRA adapter of rank 2 that is scaled by 2."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": 8}
    network = UNet2DConditionModel(**sizes, **blocks, attention_head_dim=2, norm_num_groups=4)
    return add_lora(network) if adapter else network


def add_lora(network):
    """The adapter of `unet`, for one that was loaded."""
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
    return network


def randomize(model, seed: int = 0, std: float = 1.0):
    """A network of PEFT with random values in all that is trained."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std)
    return model.eval()
