"""
Publishes what is finished: the generator of a run with its report, a saved pipeline, or a parameter data set.

    python scripts/push_to_hub.py outputs/digits --hub_model_id user/digits-generator
    python scripts/push_to_hub.py outputs/digits/pipeline --hub_model_id user/digits-generator --revision draft
    python scripts/push_to_hub.py outputs/digits/snapshots --hub_model_id lab/digits-snapshots --hub_private_repo
"""

import argparse
from pathlib import Path

from pdiff_hf.utils.paths import expand_path
from pdiff_hf.utils.terminal import start_script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=start_script(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", help="A run's output_dir, or its folder pipeline or snapshots.")
    parser.add_argument("--hub_model_id", help="`user/name` or `organization/name`; the folder's name if not given.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Create the repository as a private one.")
    parser.add_argument("--hub_token", help="Token that can write; that of `hf auth login` if not given.")
    parser.add_argument("--hub_license", default="apache-2.0", help="Licence for the model card of a run.")
    parser.add_argument("--revision", help="Branch to push to; created if it does not exist.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # These take seconds to import, which a mistyped flag should not wait for.
    from pdiff_hf.hub.push import push_pipeline_to_hub, push_run_to_hub, push_snapshots_to_hub
    from pdiff_hf.run.terminal import one_line_errors

    with one_line_errors():
        folder = Path(expand_path(args.folder)).resolve()
        push, extra = push_run_to_hub, {"license": args.hub_license}
        if (folder / "model_index.json").is_file():
            push, extra = push_pipeline_to_hub, {}
        elif (folder / "layout").is_dir():
            push, extra = push_snapshots_to_hub, {}
        url = push(
            folder,
            args.hub_model_id or folder.name,
            private=args.hub_private_repo or None,
            revision=args.revision,
            token=args.hub_token,
            **extra,
        )
        print(f"Published: {url}")


if __name__ == "__main__":
    main()
