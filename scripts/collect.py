"""
Collects snapshots of a network, without training a generator for them.

    python scripts/collect.py --list --select "blocks[-1:]" head       # what would be generated, and what that costs
    accelerate launch scripts/collect.py RECIPE.yaml                   # a base model and its snapshots
    python scripts/collect.py --model FOLDER --dataset DATASET --base_epochs 0 --import FOLDER   # snapshots from files
    python scripts/collect.py ... --select all --import FOLDER --align   # networks trained apart: MLPs, plain CNNs
    python scripts/collect.py ... --import FOLDER --path_fields '_(?P<label>[0-9])_'   # the class is in the path
    python scripts/collect.py ... --conditions TABLE.csv   # networks or adapters, with what each of them is for

Keys and flags are those of scripts/train.py, which continues from here with the same ones.
"""

import tempfile

from pdiff_hf.run.cli import ConfigParser
from pdiff_hf.utils.terminal import start_script


def main() -> None:
    parser = ConfigParser("on_demand.yaml", description=start_script(__doc__))
    parser.add_argument("--list", action="store_true", help="Only print tensors, selection, and estimated cost.")
    parser.add_argument(
        "--import", dest="paths", nargs="+", metavar="PATH", help="Files, folders or Hub ids to take snapshots from."
    )
    parser.add_argument(
        "--align", action="store_true", help="With --import: bring independently trained networks into one order."
    )
    parser.add_argument(
        "--require_same_frozen",
        action="store_true",
        help="With --import: refuse networks that differ from the base model in tensors that are not selected.",
    )
    parser.add_argument(
        "--conditions",
        metavar="TABLE.csv",
        help="In place of --import: its first column names files, folders or Hub ids (relative to the table, or to the "
        "current folder), and each other column is a field: numbers, words, JSON lists of numbers, `name:angle`, "
        "`name:category`, and for descriptions `name:text`.",
    )
    parser.add_argument(
        "--path_fields",
        metavar="REGEX",
        help="With --import: a regular expression in the path of each network, whose named groups are fields of words, "
        "such as 'training_(?P<label>[0-9])_'.",
    )
    parser.add_argument(
        "--text_encoder",
        metavar="MODEL",
        help="With --conditions: reads columns `name:text`; a Hub id or folder (default: the extra `text`).",
    )
    config, flags = parser.parse_config()
    if flags.paths and flags.conditions:
        parser.error("--conditions names the networks itself: leave --import out")
    for flag in ("align", "require_same_frozen"):
        if getattr(flags, flag) and not (flags.paths or flags.conditions):
            parser.error(f"--{flag} needs --import or --conditions: it is for snapshots from files")
    if flags.path_fields and not flags.paths:
        parser.error("--path_fields needs --import: it reads the paths of networks")
    if flags.text_encoder and not flags.conditions:
        parser.error("--text_encoder needs --conditions: it reads the descriptions of a table")
    # These take seconds to import, which a mistyped flag should not wait for.
    from pdiff_hf.run.collecting import collect_from_files
    from pdiff_hf.run.processes import start_processes
    from pdiff_hf.run.terminal import one_line_errors, quiet_libraries
    from pdiff_hf.run.trainer import execute, prepare
    from pdiff_hf.scripts.costs import describe_selection
    from pdiff_hf.snapshots.conditions import read_conditions
    from pdiff_hf.snapshots.files import beside, conditions_of_paths, find_adapter
    from pdiff_hf.utils.files import expand_path

    with one_line_errors():
        state = start_processes()
        quiet_libraries(state.is_main_process)
        if flags.list:
            for line in describe_selection(config.with_dataset(), state.device):
                print(line)
            return
        paths, conditions, fields = [expand_path(path) for path in flags.paths or []], None, None
        if flags.path_fields:
            paths, conditions, fields = conditions_of_paths(paths, flags.path_fields)
        if flags.conditions:
            table = expand_path(flags.conditions)
            encoder = {"text_encoder": flags.text_encoder} if flags.text_encoder else {}
            found, fields = read_conditions(table, **encoder)
            paths, conditions = [beside(table, name) for name in found], list(found.values())
        config = config.changed(stages=["base"] if paths else ["base", "collect"])
        with tempfile.TemporaryDirectory(prefix="all-adapters-") as folder:
            adapter = find_adapter(paths, folder, config.model)
            run = prepare(config, task=None if adapter is None else config.with_dataset().make_task(adapter))
            execute(run)
            with run.lock():
                if paths and state.is_main_process:
                    collect_from_files(
                        run,
                        paths,
                        align=flags.align,
                        conditions=conditions,
                        fields=fields,
                        require_same_frozen=flags.require_same_frozen,
                    )
        if state.is_main_process:
            count, size = len(run.snapshots[0]), run.layout.num_parameters
            print(f"{count} snapshots of {size:,} parameters are in {run.folder / 'snapshots'}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
