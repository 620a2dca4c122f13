"""Short runs of `transformers.Trainer` on the digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, Trainer, TrainingArguments, ViTConfig


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=10,
    )
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(config)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(
        ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=10)
    )


class Digits(torch.utils.data.Dataset):
    def __init__(self, start: int, stop: int):
        self.digits = load_digits()
        self.numbers = range(start, stop)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> dict:
        image = torch.from_numpy(self.digits.images[self.numbers[i]] / 16).float()
        return {"pixel_values": image.expand(3, 8, 8), "labels": int(self.digits.target[self.numbers[i]])}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(folder, *callbacks, model=None, **kwargs) -> Trainer:
    arguments = {
        "max_steps": 12,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return Trainer(
        model if model is not None else resnet(),
        TrainingArguments(str(folder), **arguments | kwargs),
        train_dataset=Digits(0, 200),
        eval_dataset=Digits(200, 260),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )
