import torch
from sklearn.datasets import load_digits

from pdiff_hf import EnsembleModel, PDiffPipeline

pipe = PDiffPipeline.from_pretrained("outputs/on_demand")
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
inputs, labels = 2 * images.flip(2, 3) - 1, torch.tensor(labels)  # upside down, which nobody says

examples = {"pixel_values": inputs[:20], "labels": labels[:20]}
noise = torch.Generator().manual_seed(0)
fields = pipe.condition_encoder.fields.items()
tasks = [{name: field.sample(noise) for name, field in fields} for _ in range(512)]  # without them, those of training
posterior = pipe.posterior(examples, num_candidates=512, condition=tasks, generator=noise)
ensemble = EnsembleModel(pipe.base_model, pipe.autoencoder.layout, posterior.parameters, posterior.weights)
prediction = ensemble.predict(pixel_values=inputs[20:])
print((prediction.probabilities.argmax(1) == labels[20:]).float().mean())
