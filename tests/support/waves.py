"""A task of one's own whose networks are data: signals of one dimension."""

import torch

from pdiff_hf import DataTask, Fields, NeuralField


class Waves(DataTask):
    fields = Fields({"pitch": {"type": "scalar", "low": 1.0, "high": 3.0}})

    def load_base_model(self):
        return NeuralField(in_features=1, width=8)

    def coordinates(self, resolution=None):
        return torch.linspace(-1, 1, resolution or 16).unsqueeze(1)

    def signals(self, split):
        return (self.fields.table(self.conditions(split)).unsqueeze(1) * self.coordinates()).sin()

    def conditions(self, split):
        count = 30 if split == "train" else 12
        return [{"pitch": 1 + 2 * i / (count - 1)} for i in range(count)]
