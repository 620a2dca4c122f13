import torch
from torch import nn

from pdiff_hf import ClassificationTask


class Clouds(ClassificationTask):
    def load_base_model(self):
        return nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))

    def load_split(self, split):
        generator = torch.Generator().manual_seed(["train", "validation", "test"].index(split))
        labels = torch.randint(2, (500,), generator=generator)
        points = torch.randn(500, 4, generator=generator) + labels[:, None]
        return [{"points": point, "labels": label} for point, label in zip(points, labels, strict=True)]

    def fingerprint(self, split):
        return f"clouds {split}"

    def predict(self, call, batch):
        return call(batch["points"])
