import torch

from pdiff_hf import NeuralFieldTask


class Inrs(NeuralFieldTask):
    """Networks that give values from -0.5 to 0.5, at positions up to the edges of an image."""

    def coordinates(self, resolution=None):
        line = torch.linspace(-1, 1, resolution or self.image_size)
        return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(-1, 2)

    def render(self, call, coordinates):
        return 2 * call(coordinates)
