import torch

from pdiff_hf import NeuralFieldTask, PDiffPipeline

pipe, task = PDiffPipeline.from_pretrained("outputs/fields"), NeuralFieldTask()
points, datum = task.coordinates(), task.signals("test")[0]  # (64, 2) and (64, 1); no network was trained on it
known = points[:, 0] < 0  # its upper half

examples = {"coordinates": points[known], "labels": datum[known]}
output = pipe.posterior(examples, loss="mse", sigma=0.5, generator=torch.Generator().manual_seed(0))
networks = [pipe.make_model(pipe.autoencoder.layout.unflatten(row)) for row in output.parameters]
with torch.no_grad():
    completed = sum(weight * network(points) for weight, network in zip(output.weights, networks, strict=True))
print((completed - datum)[~known].square().mean())
