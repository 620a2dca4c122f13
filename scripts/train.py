"""
Turns a network's training run into a generator of new, working networks, and says how good they are.

    accelerate launch scripts/train.py                                    # ResNet-18 on scikit-learn's digits
    accelerate launch scripts/train.py scripts/recipes/fashion_mnist.yaml # a recipe
    accelerate launch scripts/train.py RECIPE.yaml --num_snapshots 100    # with something changed
    accelerate launch scripts/train.py --stages denoiser evaluate         # some stages only
    accelerate launch scripts/train.py --resume_from_checkpoint latest    # go on where a run was stopped
    accelerate launch scripts/train.py --push_to_hub --hub_model_id user/name  # publish the generator with its report
"""

import logging
import shlex
import sys

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from pdiff_hf.hub.push import HubError, push_run_to_hub, resolve_repo_id
from pdiff_hf.run.recipe import RecipeParser
from pdiff_hf.run.run import Run, start_processes
from pdiff_hf.training.loop import TrainingError
from pdiff_hf.utils.errors import ResourceError


def main() -> None:
    recipe = RecipeParser(description=__doc__.split("\n\n")[0]).parse_recipe()
    state = start_processes()
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR, format="%(message)s")
    for library in ("accelerate", "datasets", "httpx", "timm"):  # what they do is not what this program does
        logging.getLogger(library).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        run = Run(recipe)
        repo_id = recipe.hub_model_id or run.folder.name
        if recipe.push_to_hub and state.is_main_process:
            repo_id = resolve_repo_id(repo_id, recipe.hub_token)  # a wrong token must not be found out after hours
        with run.lock():
            run.execute()
            if recipe.push_to_hub and state.is_main_process:
                url = push_run_to_hub(
                    run.folder,
                    repo_id,
                    private=recipe.hub_private_repo or None,
                    token=recipe.hub_token,
                    license=recipe.hub_license,
                )
                print(f"The generator is on the Hub: {url}")
    except (ValueError, TrainingError, HubError, ResourceError) as error:  # everything that a user can put right
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        again = [sys.argv[0], *(a for a in sys.argv[1:] if a not in ("--resume_from_checkpoint", "latest"))]
        if recipe.hub_token is not None:
            again = [a.replace(recipe.hub_token, "...") for a in again]  # what is printed may end up in a log
        sys.exit(f"\nstopped; go on with: accelerate launch {shlex.join(again)} --resume_from_checkpoint latest")
    if state.is_main_process and (run.folder / "evaluation" / "report.md").is_file():
        print((run.folder / "evaluation" / "report.md").read_text().partition("\n### ")[0])
        print(f"The generator is in {run.folder / 'pipeline'}, the report in {run.folder / 'evaluation'}.")
    state.destroy_process_group()  # its threads would otherwise be ended, at times with an error, by the interpreter


if __name__ == "__main__":
    main()
