"""The models under FSDP2, for training loops of one's own: on two processes, they learn what one process learns."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, ParameterLayout


def make_models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    layout = ParameterLayout(("weights",), ((64,),), ("float32",))
    autoencoder = ParameterAutoencoder(layout.to_dict(), latent_dim=8, block_out_channels=(4, 4))
    autoencoder.fit_parameter_statistics(torch.randn(10, 64))
    denoiser = LatentDenoiser(8, block_out_channels=(), bottleneck_dim=16, embedding_dim=16, num_layers=2)
    return {"autoencoder": autoencoder, "denoiser": denoiser}


def train(name: str, model: torch.nn.Module, rows: range) -> None:
    """Three steps on the rows of a batch that belong to a process; their gradients are averaged over processes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        if name == "autoencoder":
            loss = model.reconstruction_loss(model(model.tokenize(torch.randn(8, 64, generator=generator)[rows])))
        else:
            loss = F.mse_loss(
                model(torch.randn(8, 8, generator=generator)[rows], 5).sample, torch.ones(1, 8).expand(len(rows), 8)
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def work(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, model in make_models().items():
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        train(name, model, range(4 * rank, 4 * rank + 4))
        whole = {key: value.full_tensor() for key, value in model.named_parameters()}
        if rank == 0:
            torch.save(whole, f"{folder}/{name}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_shards_learn_what_one_process_learns(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for name, model in make_models().items():
        before = {key: value.clone() for key, value in model.named_parameters()}
        train(name, model, range(8))
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert list(found) == list(before)
        for key, value in model.named_parameters():
            torch.testing.assert_close(found[key], value.detach(), rtol=1e-3, atol=1e-4, msg=key)
        assert any(not torch.allclose(found[key], before[key], atol=1e-3) for key in before)
