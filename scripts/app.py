"""
A page to explore a generator in the browser.

    pip install -e ".[app]"
    python scripts/app.py outputs/on_demand          # a run: a network at work for each task, as you move a slider
    python scripts/app.py outputs/digits             # its task and snapshots are used as well
    python scripts/app.py user/generator             # a Hub id, with the report in its repository

As a Space: `python scripts/push_to_hub.py outputs/on_demand --hub_model_id user/generator --space`.
"""

import argparse

from pdiff_hf.utils.imports import require_modules
from pdiff_hf.utils.terminal import start_script


def port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, got {number}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=start_script(__doc__))
    parser.add_argument("pipeline", nargs="?", default="", help="Folder of a run or of a pipeline, or a Hub id.")
    parser.add_argument("--port", type=port, help="By default the first free one from 7860.")
    args = parser.parse_args()
    # These take seconds to import, which a mistyped flag should not wait for.
    from pdiff_hf.run.terminal import one_line_errors, quiet_libraries

    quiet_libraries()
    with one_line_errors():
        require_modules("the page", "app", "gradio", "matplotlib")
        from pdiff_hf.scripts.explore import load_source
        from pdiff_hf.scripts.page import LAUNCH, build_app

        if args.pipeline:
            load_source(args.pipeline)  # an error is of more use here than on the page
        build_app(args.pipeline).launch(server_port=args.port, **LAUNCH)


if __name__ == "__main__":
    main()
