import torch
from PIL import Image

from pdiff_hf import NeuralFieldTask, PDiffPipeline

pipe, task = PDiffPipeline.from_pretrained("outputs/fields"), NeuralFieldTask()
generator = torch.Generator().manual_seed(0)
networks = pipe(8, condition={"label": "3"}, guidance_scale=1.5, generator=generator, output_type="model").parameters

points = task.coordinates(64)  # (64 * 64, 2), from -1 to 1: any resolution
with torch.no_grad():
    images = task.images(torch.stack([network(points) for network in networks]))  # (8, 1, 64, 64), from 0 to 1
Image.fromarray((255 * images[0, 0]).byte().numpy()).save("three.png")
