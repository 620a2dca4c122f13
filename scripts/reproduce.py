"""
Reproduces a table or figure of the paper: its rows as runs, and the paper's numbers beside what came out.

    python scripts/reproduce.py --list                                      # what there is, and what it costs
    python scripts/reproduce.py table3a --list                              # the runs that a table is made from
    python scripts/reproduce.py table3a                                     # on Fashion-MNIST, at a small scale
    python scripts/reproduce.py table2 --rows "mlp_mini/*" --seeds 0 1 2    # some rows, several seeds
    python scripts/reproduce.py figure4 --dataset digits --image_size 8     # another data set; any key of a recipe
    python scripts/reproduce.py table1 --scale paper                        # the paper's data sets and its Table 5

The table is in OUTPUT_DIR/NAME, the runs that it is made from in OUTPUT_DIR/runs. What is finished is reused, by other
tables too; an experiment that was stopped continues with the same command.
"""

import argparse
import sys

from pdiff_hf.run.cli import ConfigParser
from pdiff_hf.utils.files import expand_path
from pdiff_hf.utils.terminal import start_script

SCALES = ("small", "paper")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=start_script(__doc__),
        epilog="Any key of a recipe (scripts/train.py --help) is a flag as well, for all rows.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", help="A table or figure; it comes first.")
    parser.add_argument("--list", action="store_true", help="List tables and figures, or the runs of one.")
    parser.add_argument("--scale", choices=SCALES, default="small", help="Small, or as the paper has it.")
    parser.add_argument("--dataset", help="Instead of the paper's data sets; small: Fashion-MNIST by default.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Every row is run with each.")
    parser.add_argument("--rows", nargs="+", help="Only the runs with these names, or patterns of names.")
    parser.add_argument("--output_dir", help="Folder that receives everything; outputs/reproduce-SCALE by default.")
    args, rest = parser.parse_known_args()
    if args.name is not None and args.name != sys.argv[1]:  # it would be the value of a flag that is not known here
        parser.error("the name of the table or figure comes first, before all flags")
    changes = ConfigParser().parse_changes(rest)
    if args.name is None and not args.list:
        parser.error("which table or figure? --list shows them")
    if args.name is None and (args.rows or changes):
        parser.error("rows and keys of a recipe are those of one table or figure: name it first")

    # These take seconds to import, which a mistyped flag should not wait for.
    from reproduce.listing import list_experiments, list_runs
    from reproduce.runner import reproduce

    from pdiff_hf.run.terminal import one_line_errors, quiet_libraries

    quiet_libraries()
    shared = {"scale": args.scale, "dataset": args.dataset, "seeds": args.seeds}
    try:
        with one_line_errors():
            if args.name is None:
                print(list_experiments(**shared))
                return
            shared |= {"patterns": args.rows, "changes": changes}
            if args.list:
                print(list_runs(args.name, **shared))
                return
            output_dir = expand_path(args.output_dir or f"outputs/reproduce-{args.scale}")
            folder = reproduce(args.name, output_dir, **shared)
            print((folder / "table.md").read_text(encoding="utf-8"))
            print(f"The table is in {folder}.")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command continues where it stopped")


if __name__ == "__main__":
    main()
