"""
Collects snapshots of a network, without training a generator for them.

    python scripts/collect.py --list --select "blocks[-1:]" head       # what would be generated, and what that costs
    accelerate launch scripts/collect.py RECIPE.yaml                   # a base model and its snapshots
    python scripts/collect.py --model FOLDER --dataset DATASET --base_epochs 0 --import FOLDER   # snapshots from files
    python scripts/collect.py ... --select all --import FOLDER --align   # networks trained apart: MLPs, plain CNNs

Keys and flags are those of scripts/train.py, which goes on from here with the same ones.
"""

import dataclasses

from pdiff_hf.run.recipe import RecipeParser


def main() -> None:
    parser = RecipeParser("digits.yaml", description=__doc__.strip().split("\n\n")[0])
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
    # These take seconds to import, which a mistyped flag should not wait for.
    from pdiff_hf.run.listing import describe_selection
    from pdiff_hf.run.run import Run, start_processes
    from pdiff_hf.run.stages import collect_from_files
    from pdiff_hf.run.task import make_task
    from pdiff_hf.run.terminal import one_line_errors, quiet_libraries
    from pdiff_hf.snapshots.files import find_adapter
    from pdiff_hf.utils.paths import expand_path

    state = start_processes()
    quiet_libraries(state.is_main_process)
    with one_line_errors():
        if flags.list:
            for line in describe_selection(recipe.with_dataset(), state.device):
                print(line)
            return
        recipe = dataclasses.replace(recipe, stages=["base"] if flags.paths else ["base", "collect"])
        adapter = find_adapter([expand_path(path) for path in flags.paths or []])
        run = Run(recipe, task=None if adapter is None else make_task(recipe.with_dataset(), adapter))
        with run.lock():
            run.execute()
            if flags.paths and state.is_main_process:
                collect_from_files(run, [expand_path(path) for path in flags.paths], align=flags.align)
    if state.is_main_process:
        count, size = len(run.snapshots[0]), run.layout.num_parameters
        print(f"{count} snapshots of {size:,} parameters are in {run.folder / 'snapshots'}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
