import torch

from pdiff_hf import DataTask, Fields, NeuralField, PDiffConfig, PDiffTrainer


class Waves(DataTask):
    """Sounds: one value at each moment."""

    fields = Fields({"pitch": {"type": "scalar", "low": 1.0, "high": 3.0}})

    def load_base_model(self):
        return NeuralField(in_features=1, width=8)

    def coordinates(self, resolution=None):
        return torch.linspace(-1, 1, resolution or 16).unsqueeze(1)  # (P, 1)

    def signals(self, split):
        return (self.fields.table(self.conditions(split)).unsqueeze(1) * self.coordinates()).sin()  # (N, P, 1)

    def conditions(self, split):
        start, stop, count = (1.0, 3.0, 60) if split == "train" else (1.05, 2.95, 20)
        return [{"pitch": pitch} for pitch in torch.linspace(start, stop, count).tolist()]


args = PDiffConfig(
    select=["all"], collect_steps=100, collect_learning_rate=0.003, latent_dim=4, num_models=50, baselines="few"
)
trainer = PDiffTrainer(Waves(), args=args)
sounds = trainer.train()(3, condition={"pitch": 2.0}, output_type="model").parameters
print(trainer.evaluate().verdict)
