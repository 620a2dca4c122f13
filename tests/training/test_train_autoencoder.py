"""Training of the autoencoder: snapshots by index, bases kept once, and the same bits after a stop."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import autoencoder_architecture
from pdiff_hf.training import train_autoencoder
from pdiff_hf.training.loop import Loop, LoopArguments

LAYOUT = ParameterLayout(("weight", "bias"), ((20, 30), (20,)), ("float32", "float32"))


def train(snapshots: torch.Tensor, folder, num_steps: int = 6, preset: str = "tokens", resume=False, **kwargs):
    return train_autoencoder(
        Loop(Accelerator(cpu=True, step_scheduler_with_optimizer=False), 0, folder, 3, resume=resume),
        snapshots,
        LAYOUT,
        LoopArguments(num_steps=num_steps, batch_size=8, learning_rate=1e-3, lr_scheduler="constant"),
        latent_dim=4,
        architecture=autoencoder_architecture(preset, LAYOUT.num_parameters),
        **kwargs,
    )


@pytest.fixture(scope="module")
def snapshots() -> torch.Tensor:
    return 1 + torch.randn(30, LAYOUT.num_parameters, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("preset", ["tokens", "pca"])
def test_only_what_was_seen_is_looked_at(snapshots, preset, tmp_path):
    seen = torch.tensor([row for row in range(30) if row % 5])
    hidden = snapshots.clone()
    hidden[::5] = torch.nan
    chosen, losses = train(hidden, tmp_path / "chosen", preset=preset, seen=seen)
    alone, expected = train(snapshots[seen], tmp_path / "alone", preset=preset)
    assert torch.equal(losses, expected)
    assert chosen.state_dict().keys() == alone.state_dict().keys()
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in chosen.state_dict().items())


def test_checkpoints_hold_no_bases_and_a_resumed_training_ends_with_them(snapshots, tmp_path):
    whole, losses = train(snapshots, tmp_path)
    (saved,) = tmp_path.glob("checkpoint-3/model*.safetensors")
    assert "token_basis" not in load_file(saved) and "encoder.0.weight" in load_file(saved)
    resumed, again = train(snapshots, tmp_path, resume=True)
    assert torch.equal(again, losses)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    assert resumed.token_basis.square().sum() > 1
