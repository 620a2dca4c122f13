"""
What the bases of tokens cost and keep: size of the autoencoder and memory of its training, against R².

    OMP_NUM_THREADS=1 python scripts/benchmarks/bases.py RUN --token_dims 2 4 6

RUN is the output folder of a run of scripts/train.py. For each type and number of directions of a token, an autoencoder
is trained on the snapshots that the run's generator saw, in a process of its own; nothing in RUN changes. Memory is the
peak of what belongs to that process alone (see sizes.py). R² is the share of the variance around the mean of the seen
snapshots that the autoencoder keeps, of seen and of held-out snapshots.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from sizes import peak_memory

from pdiff_hf.evaluation.render import table
from pdiff_hf.models import ParameterAutoencoder, autoencoder_architecture
from pdiff_hf.models.tokens import BASIS_DTYPES
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.context import loop_arguments
from pdiff_hf.run.learning import MAX_GRAD_NORM
from pdiff_hf.run.trainer import prepare
from pdiff_hf.training import train_autoencoder
from pdiff_hf.training.loop import Loop


@torch.no_grad()
def explained(autoencoder: ParameterAutoencoder, snapshots: torch.Tensor, rows: list[int], mean: torch.Tensor) -> float:
    """R² of the snapshots `rows`, one at a time."""
    lost = kept = 0.0
    for row in rows:
        decoded = autoencoder.decode(autoencoder.encode(snapshots[row : row + 1]).latents).sample
        lost += (decoded - snapshots[row]).square().sum(dtype=torch.float64).item()
        kept += (snapshots[row] - mean).square().sum(dtype=torch.float64).item()
    return 1 - lost / kept


def measure(folder: str, dtype: str, token_dim: int, steps: int) -> None:
    """In a process of its own: trains an autoencoder, and prints its bytes on disk and R²."""
    run = prepare(load_config(f"{folder}/recipe.yaml", output_dir=folder))
    snapshots, seen, r = run.parameters, run.seen, run.config
    architecture = autoencoder_architecture("tokens", snapshots.shape[1])
    with tempfile.TemporaryDirectory() as temporary:
        autoencoder, _ = train_autoencoder(
            Loop(Accelerator(), seed=0),
            snapshots,
            run.layout,
            loop_arguments(
                r.changed(autoencoder_batch_size=min(r.autoencoder_batch_size, len(seen))),
                "autoencoder",
                steps,
                lr_warmup_steps=r.autoencoder_args.warmup_steps,
                max_grad_norm=MAX_GRAD_NORM,
            ),
            seen=seen,
            latent_dim=r.latent_dim,
            architecture=architecture | {"basis_dtype": dtype, "token_dim": token_dim},
        )
        autoencoder.eval().save_pretrained(f"{temporary}/saved")
        size = sum(file.stat().st_size for file in Path(temporary, "saved").iterdir())
    mean = sum(snapshots[row] for row in seen) / len(seen)
    groups = (seen.tolist(), run.heldout.nonzero().flatten().tolist())
    print(json.dumps([size, *(explained(autoencoder, snapshots, rows, mean) for rows in groups if rows)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="Output folder of a run with its snapshots.")
    parser.add_argument("--token_dims", type=int, nargs="+", default=[2, 4, 6], help="Directions of a token.")
    parser.add_argument("--dtypes", nargs="+", choices=BASIS_DTYPES, default=list(BASIS_DTYPES))
    parser.add_argument("--steps", type=int, default=100, help="Steps of training.")
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.single:
        measure(args.run, args.dtypes[0], args.token_dims[0], args.steps)
        return
    rows = []
    for dtype in args.dtypes:
        for dim in args.token_dims:
            flags = [args.run, "--single", "--dtypes", dtype, "--token_dims", str(dim), "--steps", str(args.steps)]
            with tempfile.NamedTemporaryFile("r") as output:
                peak = peak_memory([sys.executable, __file__, *flags], output.name)
                size, *scores = json.loads(output.read().splitlines()[-1])
            scores = [f"{score:.4f}" for score in scores] + ["–"] * (2 - len(scores))
            rows.append([dtype, str(dim), f"{size / 1e6:,.0f}", f"{peak / 1e9:.2f}", *scores])
            print(" ".join(rows[-1]), flush=True)
    print("\n" + table(["bases", "directions", "MB on disk", "peak GB", "R² seen", "R² held out"], rows))


if __name__ == "__main__":
    main()
