"""
Measures neural fields: completion of halves against simpler ways, and fields of HyperDiffusion's size.

    python scripts/benchmarks/fields.py complete outputs/fields       # of the run of fields.yaml
    python scripts/benchmarks/fields.py large outputs/fields_large    # 500 colour images of 64x64 pixels, made here

`complete` gives the upper half of held-out images (sigma of each method is chosen on the first third of them, and the
rest reported): the mean of the posterior over generated and training networks, over the training networks alone, the
nearest training image, and the conditional mean of a Gaussian of pixels; errors are means over the pixels of the lower
half, from -1 to 1, paired over images. `large` takes all stages with 35,843 weights each, and says how long each took
and how much memory.
"""

import argparse
import json
import math
import resource
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pdiff_hf import PDiffConfig, PDiffPipeline, load_snapshots
from pdiff_hf.evaluation.compare import paired_difference
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.snapshots import parameter_matrix
from pdiff_hf.utils.files import write_json
from pdiff_hf.utils.terminal import start_script

SIGMAS = (0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
RIDGES = (1e-3, 1e-2, 1e-1)


def complete(folder: Path, num_candidates: int, seed: int) -> dict:
    """Errors of the methods, paired over held-out images."""
    task = load_config(folder / "recipe.yaml").make_task()
    pipe = PDiffPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    dataset, layout = load_snapshots(folder / "snapshots")
    heldout = torch.tensor(dataset["heldout"][:]) > 0
    networks = NetworkRunner(pipe.base_model, layout)
    trained = parameter_matrix(dataset, layout)[~heldout]
    coordinates, train, test = task.coordinates(), task.signals("train"), task.signals("test")
    known = coordinates[:, 0] < 0

    start = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    (sampled,) = pipe(num_candidates, generator=generator, output_type="pt", return_dict=False)
    sampling = time.process_time() - start
    pools = {"generated and training networks": torch.cat([sampled, trained]), "generated networks": sampled}
    pools |= {"training networks": trained}
    outputs = {name: task.render_all(networks, pool).clamp(-1, 1) for name, pool in pools.items()}

    def posterior_means(name: str, sigma: float) -> torch.Tensor:
        """What `pipe.posterior` with all of the pool as candidates gives on average, for all images at once."""
        distances = torch.cdist(test[:, known].flatten(1), outputs[name][:, known].flatten(1)).square()
        return torch.einsum("nk,kpc->npc", (-distances / (2 * sigma**2)).softmax(1), outputs[name][:, ~known])

    def gaussian(ridge: float) -> torch.Tensor:
        rows, mean = train.flatten(1), train.flatten(1).mean(0)
        given = known.repeat_interleave(train.shape[2])
        covariance = torch.cov(rows.T) + ridge * torch.eye(rows.shape[1])
        weights = torch.linalg.solve(covariance[given][:, given], covariance[given][:, ~given])
        return (mean[~given] + (test.flatten(1)[:, given] - mean[given]) @ weights).view(len(test), -1, train.shape[2])

    nearest = torch.cdist(test[:, known].flatten(1), train[:, known].flatten(1)).argmin(1)
    ways = {name: {sigma: posterior_means(name, sigma) for sigma in SIGMAS} for name in pools}
    ways |= {"Gaussian of pixels": {ridge: gaussian(ridge) for ridge in RIDGES}}
    ways |= {"nearest training image": {0: train[nearest][:, ~known]}}
    third = len(test) // 3
    errors, chosen = {}, {}
    for name, settings in ways.items():
        found = {value: (x.clamp(-1, 1) - test[:, ~known]).square().mean((1, 2)) for value, x in settings.items()}
        chosen[name] = min(found, key=lambda value: found[value][:third].mean())
        errors[name] = found[chosen[name]][third:]

    # What one call takes, and that it gives the same.
    first, sigma = next(iter(pools)), chosen[next(iter(pools))]
    start, count, differences = time.process_time(), 20, []
    for i in range(third, third + count):
        output = pipe.posterior(
            {"coordinates": coordinates[known], "labels": test[i, known]},
            num_candidates=1,
            num_models=256,
            candidates=pools[first],
            loss="mse",
            sigma=sigma,
            generator=torch.Generator().manual_seed(i),
        )
        mean = (output.weights[:, None, None] * task.render_all(networks, output.parameters).clamp(-1, 1)).sum(0)
        differences.append((mean[~known] - ways[first][sigma][i]).square().mean().sqrt())
    each = (time.process_time() - start) / count + sampling / (len(test) - third)
    result = {"num_images": len(test) - third, "num_candidates": num_candidates, "seconds_an_image": each}
    result["pipe_posterior_differs_by"] = torch.stack(differences).mean().item()
    for name, values in errors.items():
        difference = paired_difference(errors[first].tolist(), values.tolist())
        result[name] = {"error": values.mean().item(), "setting": chosen[name]}
        result[name] |= {"difference": difference.difference, "interval": difference.interval}
        low, high = difference.interval
        print(f"{name:34s} {values.mean():.4f}  {difference.difference:+.4f} ({low:+.4f} to {high:+.4f})")
    print(f"{result['num_images']} images, {each:.2f} s of CPU each, {num_candidates} generated candidates")
    return result


def blobs(count: int, seed: int) -> list[np.ndarray]:
    """Colour images of 64x64 pixels: two soft ellipses on a gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    images = []
    for _ in range(count):
        image = 0.5 + 0.3 * np.stack([x * a + y * b for a, b in rng.uniform(-1, 1, (3, 2))], -1)
        for _ in range(2):
            centre, size, angle = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.15, 0.5, 2), rng.uniform(0, math.pi)
            u = (x - centre[0]) * math.cos(angle) + (y - centre[1]) * math.sin(angle)
            v = (y - centre[1]) * math.cos(angle) - (x - centre[0]) * math.sin(angle)
            inside = 1 / (1 + np.exp(20 * ((u / size[0]) ** 2 + (v / size[1]) ** 2 - 1)))[..., None]
            image = image * (1 - inside) + inside * rng.uniform(0, 1, 3)
        images.append((255 * image.clip(0, 1)).astype(np.uint8))
    return images


def large(folder: Path, num_data: int, seed: int) -> dict:
    """All stages on fields of HyperDiffusion's size."""
    data = folder.with_name(f"{folder.name}_images")
    for split, (start, stop) in {"train": (0, num_data), "test": (num_data, num_data + num_data // 5)}.items():
        (data / split).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(blobs(stop - start, start)):
            Image.fromarray(image).save(data / split / f"{i:04d}.png")
    config = PDiffConfig(
        task="neural_field",
        model="fourier",
        model_args={"width": 128, "num_layers": 3},
        dataset=str(data),
        base_epochs=20,
        base_batch_size=50,
        base_learning_rate=1e-3,
        select=["all"],
        collect_steps=40,
        collect_batch_size=384,
        collect_learning_rate=1e-3,
        collect_args={"optimizer": "adam", "weight_decay": 0.0},
        autoencoder_preset="linear",
        autoencoder_steps=150,
        autoencoder_batch_size=16,
        autoencoder_learning_rate=4e-3,
        autoencoder_args={"loss": "outputs", "latent_noise": 0.0, "parameter_noise": 0.0},
        latent_dim=64,
        denoiser_steps=1000,
        denoiser_batch_size=64,
        num_models=100,
        baselines="few",
        output_dir=str(folder),
        seed=seed,
    )
    context, result = prepare(config), {}
    for stage in config.stages:
        if context.is_wanted(stage):
            start, cpu = time.perf_counter(), time.process_time()
            execute(context, [stage])
            result[stage] = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
            print(f"{stage:12s} {result[stage]['seconds']:.0f} s, {result[stage]['cpu']:.0f} s of CPU")
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
    result["verdict"], result["num_parameters"] = report["verdict"], report["num_parameters"]
    result["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{result['num_parameters']:,} weights each, {result['gigabytes']:.2f} GB at most", *report["verdict"], sep="\n"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=start_script(__doc__))
    parser.add_argument("what", choices=("complete", "large"))
    parser.add_argument("folder", type=Path, help="Of a run of fields.yaml, or for the results.")
    parser.add_argument("--num_candidates", type=int, default=16384, help="Networks that are sampled for completion.")
    parser.add_argument("--num_data", type=int, default=500, help="Training images of the large fields.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "complete":
        result = complete(args.folder, args.num_candidates, args.seed)
    else:
        result = large(args.folder, args.num_data, args.seed)
    write_json(args.folder / f"benchmark_{args.what}.json", result)


if __name__ == "__main__":
    main()
