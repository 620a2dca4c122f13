"""
Collects snapshots of a network, without training a generator for them.

    python scripts/collect.py --list --select "blocks[-1:]" head       # what would be generated, and what that costs
    accelerate launch scripts/collect.py RECIPE.yaml                   # a base model and its snapshots
    python scripts/collect.py --model FOLDER --base_epochs 0 --import FOLDER   # snapshots from files that you have
    python scripts/collect.py --model FOLDER --base_epochs 0 --select all --import FOLDER --align   # MLPs, plain CNNs

Keys and flags are those of scripts/train.py, which goes on from here with the same ones.
"""

import dataclasses
import logging
import sys

import torch

from pdiff_hf.run.recipe import Recipe, RecipeParser
from pdiff_hf.run.run import Run, make_task, start_processes
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots.files import find_adapter
from pdiff_hf.training.estimate import estimate_autoencoder, estimate_denoiser
from pdiff_hf.training.loop import TrainingError
from pdiff_hf.utils.errors import ResourceError


def main() -> None:
    parser = RecipeParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="Only print tensors, selection, and estimated cost.")
    parser.add_argument(
        "--import", dest="paths", nargs="+", metavar="PATH", help="Files, folders or Hub ids to take snapshots from."
    )
    parser.add_argument(
        "--align", action="store_true", help="With --import: bring independently trained networks into one order."
    )
    recipe = parser.parse_recipe()
    flags = parser.parse_known_args()[0]
    if flags.align and not flags.paths:
        parser.error("--align needs --import: it is for snapshots from files")
    state = start_processes()
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR, format="%(message)s")
    try:
        if flags.list:
            print_list(recipe, state.device)
            return
        recipe = dataclasses.replace(recipe, stages=["base"] if flags.paths else ["base", "collect"])
        run = Run(recipe, task=make_task(recipe, adapter=find_adapter(flags.paths or [])))
        with run.lock():
            run.carry_out()
            if flags.paths and state.is_main_process:
                run.import_snapshots(flags.paths, align=flags.align)
    except (ValueError, TrainingError, ResourceError) as error:  # everything that a user can put right
        sys.exit(f"error: {error}")
    if state.is_main_process:
        count, size = len(run.snapshots[0]), run.layout.num_parameters
        print(f"{count} snapshots of {size:,} numbers are in {run.folder / 'snapshots'}")
    state.destroy_process_group()


def print_list(recipe: Recipe, device: torch.device) -> None:
    """All parameters of the model, those that are selected, and what a generator for them costs."""
    model = make_task(recipe).load_base_model()
    layout = select_layout(model, recipe.select, recipe.exclude)
    selected = set(layout.names)
    parameters = dict(model.named_parameters())
    width = max(map(len, parameters))
    for name, parameter in parameters.items():
        shape = " × ".join(map(str, parameter.shape))
        print(f"{'*' if name in selected else ' '} {name:{width}}  {parameter.numel():>12,}  {shape}")
    total = sum(parameter.numel() for parameter in parameters.values())
    print(
        f"\n* selected: {layout.num_parameters:,} of {total:,} numbers, in {len(selected)} of {len(parameters)} tensors"
        f"\n{recipe.num_snapshots} snapshots take {size(4 * layout.num_parameters * recipe.num_snapshots)}\n"
    )
    if recipe.latent_dim > layout.num_parameters:
        raise ValueError(f"latent_dim is {recipe.latent_dim}, more than the selected numbers")
    costs = {
        "autoencoder": estimate_autoencoder(
            layout.num_parameters,
            latent_dim=recipe.latent_dim,
            preset=recipe.autoencoder_preset,
            token_size=recipe.token_size,
            num_steps=recipe.autoencoder_steps,
            batch_size=recipe.autoencoder_batch_size,
            device=device,
        ),
        "denoiser": estimate_denoiser(
            recipe.latent_dim,
            preset=recipe.denoiser_preset,
            num_steps=recipe.denoiser_steps,
            batch_size=recipe.denoiser_batch_size,
            device=device,
        ),
    }
    print(f"Training a generator on this machine ({device.type}, one process), as an estimate:")
    for name, cost in costs.items():
        preset, steps = getattr(recipe, f"{name}_preset"), getattr(recipe, f"{name}_steps")
        print(
            f"  {name:11}  {preset}, {steps} steps: {cost.flops / 1e12:,.1f} TFLOP, about {duration(cost.seconds)}, "
            f"{size(cost.memory)} beside the snapshots"
        )


def size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
