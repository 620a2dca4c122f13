"""What edits, interpolation and inversion of adapters are worth, on the generator of a finished run of `adapters.yaml`.

accelerate launch scripts/train.py adapters.yaml
python scripts/benchmarks/adapter_edits.py
"""

import argparse
from pathlib import Path

import torch

from pdiff_hf import PDiffPipeline
from pdiff_hf.evaluation.member_score import MemberScorer
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.trainer import prepare
from pdiff_hf.scripts.docstrings import PACKAGES
from pdiff_hf.tasks import make_family

NUM_PAIRS, NUM_STARTS = 24, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="outputs/adapters")
    parser.add_argument("--num_test_tasks", type=int, default=12)
    parser.add_argument("--num_examples", type=int, nargs="+", default=[8, 32], help="Of a task that is inverted.")
    args = parser.parse_args()
    context = prepare(load_config(Path(args.run, "recipe.yaml")))
    words, pipe = context.family, PDiffPipeline.from_pretrained(args.run)
    pipe.set_progress_bar_config(disable=True)
    bits = make_family("tabled", words.base, {"fields": {"packages": {"type": "vector", "length": len(PACKAGES)}}})
    networks = NetworkRunner(pipe.need_base_model("an accuracy"), pipe.autoencoder.layout)
    every = bits.fields.table(bits.told)  # (N, 8)

    def tasks(table: torch.Tensor) -> torch.Tensor:
        return every[[words.key(condition) for condition in words.fields.conditions(table)]]

    def score(of_tasks: torch.Tensor, latents: torch.Tensor) -> float:
        """The mean accuracy in percent of networks of latents, `(T, L)` or `(T, n, L)`, on T tasks."""
        rows = pipe.decode_latents(latents.flatten(0, -2)).unflatten(0, latents.shape[:-1])
        return MemberScorer(bits, networks, of_tasks).score("test", rows).values.mean().item()

    seen, latents = tasks(context.snapshot_conditions), pipe.encode(context.parameters)
    pairs = [
        (i, p, edited)
        for i in range(len(seen))
        for p in range(len(PACKAGES))
        if (edited := seen[i] + torch.eye(len(PACKAGES))[p]).max() == 1 and (every == edited).all(1).any()
    ]
    pairs = pairs[:: max(1, len(pairs) // NUM_PAIRS)][:NUM_PAIRS]
    before, wanted = latents[[i for i, _, _ in pairs]], torch.stack([edited for _, _, edited in pairs])
    directions = [pipe.direction(seen[:, p], latents) for _, p, _ in pairs]
    print(f"one package more, {len(pairs)} pairs: before {score(wanted, before):.1f}", end="")
    for scale in (0.5, 1.0, 1.5):
        rows = [pipe.edit(row[None], way, scale) for row, way in zip(before, directions, strict=True)]
        print(f", edited by {scale} {score(wanted, torch.cat(rows)):.1f}", end="")
    one, other = latents[:NUM_PAIRS], latents[NUM_PAIRS : 2 * NUM_PAIRS]
    for share in (0.0, 0.25, 0.5):
        rows = torch.cat([pipe.edit(a[None], b - a, share) for a, b in zip(one, other, strict=True)])
        of = [score(seen[k : k + NUM_PAIRS], rows) for k in (0, NUM_PAIRS)]
        print(f"\nbetween two tasks, {share} of the way: {of[0]:.1f} on the first, {of[1]:.1f} on the other", end="")
    table, noise = context.conditions["test"][: args.num_test_tasks], torch.Generator().manual_seed(0)
    told = [one for one in words.fields.conditions(table) for _ in range(NUM_STARTS)]
    for name, condition in (("nothing said", [{} for _ in told]), ("described", told)):
        (start,) = pipe(1, generator=noise, condition=condition, output_type="latent", return_dict=False)
        start = start.unflatten(0, (len(table), NUM_STARTS))
        print(f"\n{name}, {len(table)} unseen tasks: {score(tasks(table), start):.1f}", end="")
        for count in args.num_examples:
            found = []
            for row, latent in zip(table, start, strict=True):
                batch = {k: v[0] for k, v in words.batch("train", row[None], torch.arange(count)).items()}
                found.append(pipe.invert(pipe.example_loss(batch, predict=words.predict), latent, num_steps=60))
            print(f", inverted with {count} examples {score(tasks(table), torch.stack(found)):.1f}", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
