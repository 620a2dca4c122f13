"""A tiny network that no library knows, and a task for it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pdiff_hf.tasks import ClassificationTask


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


class Blobs(ClassificationTask):
    """Two clouds of points, told apart by `Net`."""

    def load_base_model(self):
        return Net()

    def load_split(self, split):
        rng = np.random.default_rng(["train", "validation", "test"].index(split))
        labels = rng.integers(0, 2, 90)
        points = rng.normal(0, 1, (90, 4)) + labels[:, None]
        return torch.utils.data.TensorDataset(torch.tensor(points, dtype=torch.float32), torch.tensor(labels))

    def fingerprint(self, split):
        return f"blobs {split}"

    def collate(self, examples):
        points, labels = zip(*examples, strict=True)
        return {"points": torch.stack(points), "labels": torch.stack(labels)}

    def loss(self, call, batch):
        return F.cross_entropy(call(batch["points"]), batch["labels"])

    def predict(self, call, batch):
        return call(batch["points"])
