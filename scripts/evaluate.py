"""
Compares a generator of networks with trivial ones, and looks for copies of the networks that it was made from.

    python scripts/evaluate.py outputs/digits --snapshots outputs/digits/snapshots --dataset moving_digits
    python scripts/evaluate.py FOLDER_OF_STATE_DICTS --snapshots DIR --model BASE_MODEL --dataset DATASET
    python scripts/evaluate.py TABLE.csv --family transformed --snapshots ZOO --model BASE_MODEL --dataset DATASET

A folder of state dicts (.safetensors, or .pt and .pth without code in them) may come from any generator; the snapshots
say which of its tensors count. With a family, a pipeline is asked for networks for unseen tasks; or a table names
networks and the conditions that any generator made them for. Keys and flags are those of scripts/train.py. Scores are
kept: a second call with more networks computes only the new ones.
"""

from pdiff_hf.run.cli import ConfigParser
from pdiff_hf.utils.terminal import start_script


def main() -> None:
    # A saved network says itself how large its images are.
    defaults = {"output_dir": "outputs/evaluation", "model": None, "dataset": None, "image_size": 0}
    parser = ConfigParser(defaults=defaults, description=start_script(__doc__))
    parser.add_argument(
        "generator", metavar="GENERATOR", help="Run, saved pipeline (folder or Hub id), or folder of networks."
    )
    config, flags = parser.parse_config()
    # These take seconds to import, which a mistyped flag should not wait for.
    from pdiff_hf.run.processes import start_processes
    from pdiff_hf.run.terminal import one_line_errors, quiet_libraries
    from pdiff_hf.scripts.saved import evaluate_saved
    from pdiff_hf.scripts.tuned_baselines import tuned_baselines

    with one_line_errors():
        start_processes()
        quiet_libraries()
        report = evaluate_saved(flags.generator, config, tuned_baselines)
        print(report.to_terminal())
        print(f"The report is in {config.output_dir}.")


if __name__ == "__main__":
    main()
