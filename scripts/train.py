"""
Turns a network's training run into a generator of new, working networks, and says how good they are.

    accelerate launch scripts/train.py                                    # ResNet-18 on scikit-learn's digits
    accelerate launch scripts/train.py scripts/recipes/fashion_mnist.yaml # a recipe
    accelerate launch scripts/train.py RECIPE.yaml --num_snapshots 100    # with something changed
    accelerate launch scripts/train.py --stages denoiser evaluate         # some stages only
    accelerate launch scripts/train.py --resume_from_checkpoint latest    # go on where a run was stopped
"""

import logging
import shlex
import sys

from accelerate import PartialState
from accelerate.logging import get_logger

from pdiff_hf.loop import TrainingError
from pdiff_hf.recipe import RecipeParser
from pdiff_hf.stages import Run

logger = get_logger(__name__)


def main() -> None:
    recipe = RecipeParser(description=__doc__.split("\n\n")[0]).parse_recipe()
    state = PartialState()
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR, format="%(message)s")
    try:
        run = Run(recipe)
        with run.lock():
            run.carry_out()
    except (ValueError, TrainingError) as error:  # everything that a user can put right
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        again = [sys.argv[0], *(a for a in sys.argv[1:] if a not in ("--resume_from_checkpoint", "latest"))]
        sys.exit(f"\nstopped; go on with: accelerate launch {shlex.join(again)} --resume_from_checkpoint latest")
    if state.is_main_process and (run.folder / "evaluation" / "report.md").is_file():
        print((run.folder / "evaluation" / "report.md").read_text())
        print(f"The generator is in {run.folder / 'pipeline'}, the report in {run.folder / 'evaluation'}.")


if __name__ == "__main__":
    main()
