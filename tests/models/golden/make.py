"""
Makes the generator that lies in the folder beside this file, and what comes out of it, to hold later releases to.

    python tests/golden/make.py FOLDER

It was run with pdiff_hf 0.1.0, before saved files had a format version; `pipeline.py` was left out. Do not make it
again when the code changes: that it still gives the same numbers is what is tested. Add a folder for a new format.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file

from pdiff_hf import LatentDenoiser, ParameterLayout, PDiffPipeline
from pdiff_hf.run.run import make_sampling_scheduler
from pdiff_hf.training import NoiseArguments, make_training_scheduler, train_autoencoder
from pdiff_hf.training.loop import LoopArguments

folder = Path(sys.argv[1])
layout = ParameterLayout(
    ("conv.weight", "norm.weight", "norm.bias", "scale"),
    ((4, 3, 4), (5,), (6,), ()),
    ("float32", "float16", "bfloat16", "float32"),
)
generator = torch.Generator().manual_seed(0)
directions = torch.randn(4, layout.num_parameters, generator=generator)
snapshots = 2 + torch.randn(40, 4, generator=generator) @ directions  # (40, 60)
arguments = {"batch_size": 10, "learning_rate": 3e-3, "max_grad_norm": 1.0}
common = {"seed": 0, "checkpoint_dir": tempfile.mkdtemp()}
autoencoder, losses = train_autoencoder(
    Accelerator(cpu=True, step_scheduler_with_optimizer=False),
    snapshots,
    layout,
    LoopArguments(num_steps=400, **arguments),
    NoiseArguments(),
    latent_dim=6,
    block_out_channels=(4, 6, 4),
    **common,
)
print(f"loss of the autoencoder: {losses[-1]:.3f}")
scheduler = make_training_scheduler()
denoiser = LatentDenoiser(6, block_out_channels=(4, 4), bottleneck_dim=8, embedding_dim=8)
optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
clean = autoencoder.encode(snapshots).latents.detach()
for _ in range(400):
    noise, timesteps = torch.randn(clean.shape, generator=generator), torch.randint(1000, (40,), generator=generator)
    loss = F.mse_loss(denoiser(scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss of the denoiser: {loss:.3f}")
pipe = PDiffPipeline(autoencoder, denoiser.eval(), make_sampling_scheduler(scheduler))
pipe.save_pretrained(folder)
start = torch.randn(3, 6, generator=generator)
outputs = {"start": start, "snapshots": snapshots[:3], "latents": autoencoder.encode(snapshots[:3]).latents.detach()}
for steps in (1, 20):
    outputs[f"generated.{steps}"] = pipe(3, steps, latents=start, output_type="pt").parameters
save_file(outputs, folder / "outputs.safetensors")
