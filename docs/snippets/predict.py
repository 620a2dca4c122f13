import torch
from sklearn.datasets import load_digits

from pdiff_hf import PDiffPipeline

pipe = PDiffPipeline.from_pretrained("outputs/on_demand")
condition = {"angle": 180.0, "blur": 0.0, "invert": "yes", "occlude": "none"}
(network,) = pipe(condition=condition, generator=torch.Generator().manual_seed(0), output_type="model").parameters

images, labels = load_digits(return_X_y=True)  # 8×8 pixels, 0 to 16
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
images = 1 - images.flip(2, 3)  # upside down and inverted, as the condition says
with torch.no_grad():
    logits = network(pixel_values=2 * images - 1).logits  # inputs: (N, 1, 8, 8), from -1 to 1
print((logits.argmax(1) == torch.tensor(labels)).float().mean())
