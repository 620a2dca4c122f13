"""What alignment does for networks that were trained independently of each other.

    OMP_NUM_THREADS=1 python scripts/benchmarks/alignment.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/alignment.py --model cnn3_mini --image_size 28 --train_steps 400 \\
        --dataset zalando-datasets/fashion_mnist

Trains networks (all of their parameters) from initialisations of their own, each on batches of its own, and an
autoencoder on nine tenths of them: as they are, with their hidden units in the order of the first network, and as
`align_snapshots` orders them. Accuracies are in percent on 2,000 test images at most, barriers in points on 1,000
validation images at most.
"""

import argparse
import json
import time

import torch
from accelerate import Accelerator
from torch.func import functional_call, grad, vmap

from pdiff_hf.evaluation.render import table
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import autoencoder_architecture
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import align_snapshots, find_hidden_units
from pdiff_hf.snapshots.alignment import match_weights
from pdiff_hf.snapshots.barrier import measure_barrier
from pdiff_hf.tasks import ImageClassificationTask, accuracies, take
from pdiff_hf.training import train_autoencoder
from pdiff_hf.training.loop import Loop, LoopArguments, epoch_indices

HEADER = [
    "networks",
    "barrier",
    "lowest on the line",
    "mean network",
    "R² train",
    "R² held out",
    "R² of a linear map",
    "originals",
    "reconstructed, train",
    "reconstructed, held out",
]


def train_networks(task: ImageClassificationTask, args: argparse.Namespace) -> tuple[ParameterLayout, torch.Tensor]:
    """Layout and parameters, shape `(K, D)`, of networks that are trained side by side."""
    torch.manual_seed(args.seed)
    models = [task.load_base_model() for _ in range(args.num_networks)]
    layout = select_layout(models[0], "all")
    parameters = torch.stack([layout.flatten(model.state_dict()) for model in models])
    parameters.requires_grad_()

    def loss(row: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return task.loss(
            lambda **inputs: functional_call(models[0], layout.unflatten(row), (), inputs),
            {"pixel_values": images, "labels": labels},
        )

    # Side by side, convolutions become grouped ones, which are slower than one after the other.
    has_convolutions = any(len(shape) == 4 for shape in layout.shapes)
    gradient = vmap(grad(loss), chunk_size=1 if has_convolutions else None)
    split = task.load_split("train")
    batches = [epoch_indices(len(split), args.batch_size, seed=i) for i in range(args.num_networks)]
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate)  # every number has a step size of its own
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.train_steps)
    for _ in range(args.train_steps):
        batch = task.collate(take(split, torch.cat([next(indices) for indices in batches]).tolist()))
        images = batch["pixel_values"].unflatten(0, (args.num_networks, -1))  # (K, B, C, H, W)
        labels = batch["labels"].unflatten(0, (args.num_networks, -1))  # (K, B)
        parameters.grad = gradient(parameters.detach(), images, labels)
        optimizer.step()
        scheduler.step()
    return layout, parameters.detach()


def measure(
    name: str, task: ImageClassificationTask, models: NetworkRunner, parameters: torch.Tensor, args: argparse.Namespace
) -> list[str]:
    """A row of the table."""
    pairs = [(2 * i, 2 * i + 1) for i in range(min(args.num_pairs, len(parameters) // 2))]  # no network in two
    barriers = [measure_barrier(task, models, parameters[a], parameters[b], num_points=7) for a, b in pairs]
    heights = torch.tensor([barrier.barrier for barrier in barriers])
    lowest = torch.tensor([min(barrier.accuracies) for barrier in barriers])
    num_train = len(parameters) * 9 // 10
    train, heldout = parameters[:num_train], parameters[num_train:]
    mean = train.mean(0)
    autoencoder, _ = train_autoencoder(
        Loop(Accelerator(), args.seed),
        train,
        models.layout,
        LoopArguments(args.autoencoder_steps, batch_size=50, learning_rate=1e-3, lr_warmup_steps=30, max_grad_norm=1.0),
        latent_dim=args.latent_dim,
        architecture=autoencoder_architecture("tokens", models.layout.num_parameters),
    )
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(parameters).latents).sample
    # The best that a linear map can do is to keep what lies in the span of the networks it has seen.
    basis = torch.linalg.svd((train - mean).double(), full_matrices=False).Vh[: num_train - 1].float()  # (N - 1, D)
    projected = mean + (heldout - mean) @ basis.T @ basis
    scores = accuracies(task, models, "test", torch.cat([parameters, decoded, mean[None]]))
    own, reconstructed, soup = scores.split([len(parameters), len(parameters), 1])
    return [
        name,
        spread(heights),
        spread(lowest),
        f"{soup.item():.1f}",
        f"{explained(train, decoded[:num_train], mean):.3f}",
        f"{explained(heldout, decoded[num_train:], mean):.3f}",
        f"{explained(heldout, projected, mean):.3f}",
        spread(own),
        spread(reconstructed[:num_train]),
        spread(reconstructed[num_train:]),
    ]


def explained(parameters: torch.Tensor, reconstructions: torch.Tensor, mean: torch.Tensor) -> float:
    """Share of the variance around `mean`."""
    error, total = ((parameters - other).double().square().sum().item() for other in (reconstructions, mean))
    return 1 - error / total


def spread(values: torch.Tensor) -> str:
    return f"{values.mean():.1f} ± {values.std():.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--model", default="mlp_mini", help="A timm architecture that can be aligned.")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--image_size", type=int, default=8)
    parser.add_argument("--model_args", type=json.loads, help="As JSON; img_size is image_size by default.")
    parser.add_argument("--num_networks", type=int, default=100)
    parser.add_argument("--train_steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--latent_dim", type=int, default=64)
    parser.add_argument("--autoencoder_steps", type=int, default=1000)
    parser.add_argument("--num_pairs", type=int, default=20, help="Pairs of networks that barriers are measured for.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task = ImageClassificationTask(
        args.model,
        args.dataset,
        image_size=args.image_size,
        model_args=args.model_args or {"img_size": args.image_size},
        max_eval_samples=2000,
    )
    start = time.process_time()
    layout, independent = train_networks(task, args)
    print(
        f"{args.num_networks} times {args.model}, {layout.num_parameters:,} parameters, {args.train_steps} steps on "
        f"{args.dataset}: {time.process_time() - start:.0f} s"
    )
    model = task.load_base_model()
    start = time.process_time()
    aligned = align_snapshots(task, model, layout, independent)
    print(f"alignment: {time.process_time() - start:.1f} s\n")
    to_first = independent.clone()
    match_weights(to_first, independent[0], layout, find_hidden_units(task, model, layout))
    models = NetworkRunner(model, layout)
    variants = {"as trained": independent, "aligned to the first": to_first, "aligned": aligned}
    rows = [measure(name, task, models, parameters, args) for name, parameters in variants.items()]
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
