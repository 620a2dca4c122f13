"""
Draws the README's picture of neural fields from a run of fields.yaml: digits of each class that a generator makes, at
eight times the resolution of its data, the training digits that they are nearest to, and those of simple generators.

    python docs/fields_picture.py outputs/fields .github/fields.png
"""

import sys

import torch
from PIL import Image, ImageDraw

from pdiff_hf import NeuralFieldTask, PDiffPipeline, load_snapshots
from pdiff_hf.evaluation.sets import trivial
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.snapshots import parameter_matrix

SIDE, GAP, LABEL = 64, 4, 170


def main(folder: str, picture: str) -> None:
    pipe, task = PDiffPipeline.from_pretrained(folder), NeuralFieldTask()
    dataset, layout = load_snapshots(f"{folder}/snapshots")
    seen = parameter_matrix(dataset, layout)[torch.tensor(dataset["heldout"][:]) == 0]
    networks = NetworkRunner(pipe.base_model, layout)
    conditions = [{"label": str(digit)} for digit in range(10)]
    (found,) = pipe(
        1, condition=conditions, generator=torch.Generator().manual_seed(1), output_type="pt", return_dict=False
    )
    train = task.signals("train")
    rendered = task.data(task.render_all(networks, found)).flatten(1)
    nearest = torch.cdist(rendered, task.data(train).flatten(1)).argmin(1)
    simple = {name: rows for name, _, rows, _ in trivial(seen, None, 10, 0, "weights")}
    rows = {
        "generated": found,
        "Gaussian of weights": simple["Gaussian"],
        "kernel density of weights": simple["KDE 0.4"],
    }
    shown = {name: task.render_all(networks, part, task.coordinates(SIDE)) for name, part in rows.items()}
    images = {name: task.images(outputs) for name, outputs in shown.items()}
    images = {"generated": images["generated"], "nearest training digit": task.images(train[nearest]), **images}
    sheet = Image.new("L", (LABEL + 10 * (SIDE + GAP), len(images) * (SIDE + GAP)), 255)
    for i, (name, row) in enumerate(images.items()):
        ImageDraw.Draw(sheet).text((4, i * (SIDE + GAP) + SIDE // 2 - 6), name, fill=0)
        for j, image in enumerate(row):
            pixels = Image.fromarray((255 * image[0]).round().byte().numpy())
            sheet.paste(
                pixels.resize((SIDE, SIDE), Image.Resampling.NEAREST), (LABEL + j * (SIDE + GAP), i * (SIDE + GAP))
            )
    sheet.save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
