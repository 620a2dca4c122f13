"""
Writes new networks with a saved generator.

    python scripts/generate.py outputs/digits --num_models 10 --output_dir outputs/networks
    python scripts/generate.py outputs/digits --num_models 200 --output_dir outputs/tensors --only_generated
    python scripts/generate.py outputs/on_demand --condition '{"angle": 37, "blur": 0.4}'   # for a task

The generator may be a Hub id as well. Each network is a folder that `from_pretrained` of transformers loads
(`AutoModelForImageClassification`, say). Those of a timm architecture load with timm alone too:

    timm.create_model("local-dir:outputs/networks/network-00000", pretrained=True)
    timm.create_model("resnet18", num_classes=10, checkpoint_path="outputs/networks/network-00000/model.safetensors")

A generator of adapters of PEFT writes adapters, for which its base model is not loaded: folders that
`PeftModel.from_pretrained` reads, and `load_lora_weights` of diffusers if they are for a U-Net or a transformer.
With --only_generated each network is one safetensors file with nothing but the generated tensors.
"""

import argparse
import json
from pathlib import Path

from pdiff_hf.utils.files import expand_path
from pdiff_hf.utils.terminal import start_script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=start_script(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pipeline", help="Folder of a run or of a saved PDiffPipeline, or a Hub id.")
    parser.add_argument("--num_models", type=int, default=10, help="How many networks to generate.")
    parser.add_argument("--num_inference_steps", type=int, help="Denoising steps; else those of its report.")
    parser.add_argument("--temperature", type=float, help="Spread of the starting noise; else its report's.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed gives the same networks.")
    parser.add_argument("--output_dir", default="outputs/networks", help="Must not hold generated networks yet.")
    parser.add_argument("--only_generated", action="store_true", help="Write only the generated tensors.")
    parser.add_argument("--adapters", action="store_true", help="Write adapters, and refuse to write anything else.")
    what = "What is known of the task, as JSON, for a generator with conditions; unknown fields are sampled."
    parser.add_argument("--condition", type=condition, help=what)
    what = "Recipe of a run: recompute the statistics of batch norm on its training data for each network."
    parser.add_argument("--batch_norm_data", metavar="RECIPE.yaml", help=what)
    return parser.parse_args()


def condition(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.200} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.200} is not a mapping of fields to values")
    return value


def main() -> None:
    args = parse_args()
    # These take seconds to import, which a mistyped flag should not wait for.
    from pdiff_hf.run.cli import load_config
    from pdiff_hf.run.export import write_networks
    from pdiff_hf.run.terminal import one_line_errors, quiet_libraries

    quiet_libraries()
    with one_line_errors():
        options = vars(args)
        source, recipe = expand_path(options.pop("pipeline")), options.pop("batch_norm_data")
        folder = Path(expand_path(options.pop("output_dir")))
        task = None if recipe is None else load_config(expand_path(recipe)).with_dataset().make_task()
        write_networks(source, folder, task=task, **options)
        print(f"{args.num_models} networks are in {folder}.")


if __name__ == "__main__":
    main()
