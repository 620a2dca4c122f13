"""How fast scored snapshots are collected, against a full validation pass after every step.

    OMP_NUM_THREADS=1 python scripts/benchmarks/collection.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/collection.py --dataset zalando-datasets/fashion_mnist

Both take the same steps from the same weights. All times are CPU seconds of this process: other programs on the machine
do not count.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.selection import select_parameters
from pdiff_hf.snapshots.collect import CollectArguments, collect_snapshots
from pdiff_hf.snapshots.dataset import load_snapshots, parameter_matrix
from pdiff_hf.tasks import ImageClassificationTask, take
from pdiff_hf.tasks.task import EVAL_BATCH_SIZE
from pdiff_hf.training.loop import epoch_indices, make_optimizer

TRAIN_STEPS = 100


def train_briefly(task: ImageClassificationTask, model: torch.nn.Module) -> None:
    """So that the accuracies that are compared are more than chance."""
    split = task.load_split("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    batches = epoch_indices(len(split), 64, seed=0)
    for _ in range(TRAIN_STEPS):
        loss = task.loss(model, task.collate(take(split, next(batches).tolist())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def paper_loop(task, model, layout, args: CollectArguments, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A step, a pass over the validation split, a snapshot. Parameters of shape (num_steps, D), and accuracies."""
    split, validation = task.load_split("train"), task.load_split("validation")
    trained = {name: parameter for name, parameter in model.named_parameters() if name in layout.names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = make_optimizer(args.optimizer, trained.values(), args.learning_rate, args.weight_decay)
    batches = epoch_indices(len(split), args.batch_size, seed=0)
    snapshots, accuracies = [], []
    for _ in range(num_steps):
        loss = task.loss(model, task.collate(take(split, next(batches).tolist())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct = 0
        with torch.no_grad():
            for batch in DataLoader(validation, EVAL_BATCH_SIZE, collate_fn=task.collate):
                correct += (task.predict(model, batch).argmax(-1) == batch["labels"]).sum().item()
        snapshots.append(layout.flatten(model.state_dict()))
        accuracies.append(100 * correct / len(validation))
    return torch.stack(snapshots), torch.tensor(accuracies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--select", nargs="+", default=["norm[-2:]"])
    parser.add_argument("--image_size", type=int, default=28)
    parser.add_argument("--num_snapshots", type=int, default=300)
    parser.add_argument("--num_naive", type=int, default=10, help="steps that the loop of the paper takes")
    options = parser.parse_args()

    torch.manual_seed(0)
    task = ImageClassificationTask(options.model, options.dataset, image_size=options.image_size)
    model = task.load_base_model()
    train_briefly(task, model)
    layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, options.select))
    args = CollectArguments(num_snapshots=options.num_snapshots)
    num_naive = min(options.num_naive, args.num_snapshots)
    task.load_split("validation")  # prepares the images once
    print(
        f"{options.model}, {layout.num_parameters:,} parameters trained; {args.num_snapshots} snapshots from "
        f"{len(task.load_split('train')):,} examples of {options.dataset} in batches of {args.batch_size}, scored on "
        f"{len(task.load_split('validation')):,}; {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )

    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        collect_snapshots(Accelerator(cpu=True), task, model, layout, Path(folder) / "snapshots", args, seed=0)
        ours = time.process_time() - start
        dataset, _ = load_snapshots(Path(folder) / "snapshots")
        parameters = parameter_matrix(dataset, layout)[:num_naive]
        accuracies = torch.tensor(dataset["validation_accuracy"][:num_naive])
    start = time.process_time()
    expected, expected_accuracies = paper_loop(task, model, layout, args, num_naive)
    naive = (time.process_time() - start) / num_naive * args.num_snapshots

    difference = ((parameters - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
    print("| | CPU seconds | speed-up |\n|---|---|---|")
    print(f"| a validation pass after every step ({num_naive} measured, extrapolated) | {naive:.1f} | 1.0 |")
    print(f"| ours | {ours:.1f} | {naive / ours:.1f} |")
    print(f"\nfirst {num_naive} snapshots: relative difference at most {difference:.1e}, ", end="")
    print(f"accuracies differ by at most {(accuracies - expected_accuracies).abs().max():.3f} points ", end="")
    print(f"around {expected_accuracies.mean():.1f}")


if __name__ == "__main__":
    main()
