"""A task in a file outside the package: points in two clouds."""

from dataclasses import dataclass

import torch
from torch import nn

from pdiff_hf.tasks import ClassificationTask, Task


class Unfinished(Task):
    def load_base_model(self):
        return nn.Linear(1, 1)


@dataclass
class Clouds(ClassificationTask):
    max_eval_samples: int = 100
    distance: float = 1.0

    def load_base_model(self):
        return nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))

    def load_split(self, split):
        generator = torch.Generator().manual_seed(["train", "validation", "test"].index(split))
        size = 500 if split == "train" else self.max_eval_samples
        labels = torch.randint(2, (size,), generator=generator)
        points = torch.randn(size, 4, generator=generator) + self.distance * labels[:, None]
        return torch.utils.data.TensorDataset(points, labels)

    def fingerprint(self, split):
        return f"clouds {split} {self.max_eval_samples} {self.distance}"

    def collate(self, examples):
        points, labels = zip(*examples, strict=True)
        return {"points": torch.stack(points), "labels": torch.stack(labels)}

    def predict(self, call, batch):
        return call(batch["points"])
