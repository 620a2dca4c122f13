"""
Draws the moving picture of the README: a generator of networks on demand, asked for networks for digits that turn.

    python docs/moving_picture.py outputs/on_demand .github/on_demand.gif
"""

import argparse

import torch
from PIL import Image, ImageDraw, ImageFont

from pdiff_hf import ImageClassificationTask, PDiffPipeline, TransformedFamily

FRAMES, SHOWN, SIDE = 36, 10, 56  # one digit of each class, of so many pixels
WIDTH, HEIGHT = SHOWN * (SIDE + 8) + 24, 252
BLACK, GREY, LIGHT, GREEN, RED = "#222222", "#888888", "#dddddd", "#009E73", "#D55E00"
BAR_LEFT, BAR_RIGHT = 224, WIDTH - 72


def accuracy(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Percent of images `(N, C, H, W)` that a network is right about, and its predictions."""
    with torch.no_grad():
        predicted = network(pixel_values=images).logits.argmax(1)
    return 100 * (predicted == labels).float().mean().item(), predicted


def draw(angle: float, images: torch.Tensor, right: torch.Tensor, predicted: torch.Tensor, bars: dict) -> Image.Image:
    """One frame: digits with what the generated network says, the slider, and accuracies in percent."""
    frame = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font, large = ImageDraw.Draw(frame), ImageFont.load_default(15), ImageFont.load_default(18)
    for i, image in enumerate(images):
        left = 16 + i * (SIDE + 8)
        pixels = ((image[0] + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        frame.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, 12))
        colour = GREEN if right[i] else RED
        pen.text((left + SIDE / 2, 84), str(predicted[i].item()), colour, large, anchor="mm")
    pen.text((16, 122), f"angle {angle:3.0f}°", BLACK, large, anchor="lm")
    pen.line((BAR_LEFT, 122, BAR_RIGHT, 122), LIGHT, 4)
    knob = BAR_LEFT + (BAR_RIGHT - BAR_LEFT) * angle / 360
    pen.ellipse((knob - 8, 114, knob + 8, 130), GREEN)
    for i, (name, value) in enumerate(bars.items()):
        top, colour = 156 + 44 * i, GREEN if i == 0 else GREY
        pen.text((16, top + 12), name, BLACK, font, anchor="lm")
        pen.rectangle((BAR_LEFT, top, BAR_LEFT + (BAR_RIGHT - BAR_LEFT) * value / 100, top + 24), colour)
        pen.text((WIDTH - 16, top + 12), f"{value:.0f}%", BLACK, large, anchor="rm")
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("generator", help="Folder of a run of scripts/recipes/on_demand.yaml.")
    parser.add_argument("output", help="The GIF.")
    args = parser.parse_args()
    pipe = PDiffPipeline.from_pretrained(args.generator)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.base_model.config.pretrained_cfg["input_size"]
    base = ImageClassificationTask(
        "perceptron_mini", "digits", image_size=size[-1], model_args={"in_chans": 1, "img_size": size[-1]}
    )
    family = TransformedFamily(base)
    frames = []
    for step in range(FRAMES):
        condition = {"angle": 360 * step / FRAMES, "blur": 0.0, "invert": "no", "occlude": "none"}
        split = family.task(condition).load_split("test")
        examples = split.__getitems__(list(range(len(split))))
        images, labels = examples["pixel_values"], examples["labels"]
        generator = torch.Generator().manual_seed(0)
        (network,) = pipe(condition=condition, generator=generator, output_type="model").parameters
        generated, predicted = accuracy(network, images, labels)
        base, _ = accuracy(pipe.base_model, images, labels)
        bars = {"generated for this angle": generated, "one network for all": base}
        shown = torch.stack([(labels == label).nonzero()[0, 0] for label in range(SHOWN)])
        right = predicted == labels
        frames.append(draw(condition["angle"], images[shown], right[shown], predicted[shown], bars))
    palette = frames[0].quantize(32)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(args.output, save_all=True, append_images=frames[1:], duration=120, loop=0, optimize=True)


if __name__ == "__main__":
    main()
