"""
Writes new networks with a saved generator.

    python scripts/generate.py outputs/digits/pipeline --num_models 10 --output_dir outputs/networks
    python scripts/generate.py outputs/digits/pipeline --num_models 200 --output_dir outputs/tensors --only_generated

The generator may be a Hub id as well. Each network is a folder that `from_pretrained` of transformers loads
(`AutoModelForImageClassification`, say). Those of a timm architecture load with timm alone too:

    timm.create_model("local-dir:outputs/networks/network-00000", pretrained=True)
    timm.create_model("resnet18", num_classes=10, checkpoint_path="outputs/networks/network-00000/model.safetensors")

With --only_generated each network is one safetensors file with nothing but the generated tensors.
"""

import argparse
import logging
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file, save_model
from torch import nn
from tqdm.auto import tqdm
from transformers import TimmWrapperForImageClassification

from pdiff_hf import PDiffPipeline
from pdiff_hf.utils.files import replacing

logger = logging.getLogger(__name__)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pipeline", help="Folder or Hub id of a saved PDiffPipeline.")
    parser.add_argument("--num_models", type=int, default=10, help="How many networks to generate.")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="Denoising steps.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed gives the same networks.")
    parser.add_argument("--output_dir", default="outputs/networks", help="Must not hold generated networks yet.")
    parser.add_argument("--only_generated", action="store_true", help="Write only the generated tensors.")
    return parser.parse_args()


def save_network(model: nn.Module, folder: Path) -> None:
    """Such that `from_pretrained` loads it, and timm as well if it is a network of timm."""
    if not isinstance(model, TimmWrapperForImageClassification):
        model.save_pretrained(folder)
        return
    # transformers reads weights under timm's own names as well as under its own; timm reads no others. Nor does it read
    # a null in the place of arguments.
    model.config.model_args = model.config.model_args or {}
    model.config.save_pretrained(folder)
    save_model(model.timm_model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir)
    if any(folder.glob("network-*")):
        raise ValueError(f"'{folder}' already holds generated networks; choose another --output_dir")
    pipe = PDiffPipeline.from_pretrained(args.pipeline)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    if pipe.base_model is None and not args.only_generated:
        raise ValueError("this generator has no base model to complete its networks with; use --only_generated")
    size = 4 * pipe.autoencoder.layout.num_parameters
    if not args.only_generated:
        size = sum(t.numel() * t.element_size() for t in pipe.base_model.state_dict().values())
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if size * args.num_models > free:
        raise ValueError(
            f"{args.num_models} networks of {size / 1e6:.1f} MB need {size * args.num_models / 1e9:.1f} GB, and "
            f"'{folder}' has {free / 1e9:.1f} GB free; generate fewer, or use --only_generated"
        )
    parameters = pipe(
        args.num_models,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pt",
    ).parameters
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(tqdm(parameters, "writing")):
        # Copies, because safetensors does not write views of a larger tensor.
        state_dict = {name: tensor.clone() for name, tensor in pipe.autoencoder.layout.unflatten(row).items()}
        name = f"network-{i:05d}"
        with replacing(folder / (f"{name}.safetensors" if args.only_generated else name)) as part:
            if args.only_generated:
                save_file(state_dict, part)
            else:
                save_network(pipe.make_model(state_dict), part)
    print(f"{args.num_models} networks are in {folder}.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
