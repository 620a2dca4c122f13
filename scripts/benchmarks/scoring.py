"""How fast many networks are scored, against one at a time and against the bound.

    OMP_NUM_THREADS=1 python scripts/benchmarks/scoring.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/scoring.py --dataset zalando-datasets/fashion_mnist --num_models 1100
    OMP_NUM_THREADS=1 python scripts/benchmarks/scoring.py --model mlp_mini --select all --image_size 64

The bound is what any program has to compute: the frozen prefix once for each example, and the rest of the network once
for each example and network, with the batch size at which that is fastest, and convolutions without the products with
padding that no output needs. `whole kernels` is the same program with those products. All times are CPU seconds of this
process: other programs on the machine do not count.
"""

import argparse
import contextlib
import itertools
import resource
import statistics
import time

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import pdiff_hf.networks  # noqa: F401  registers the minis with timm
from pdiff_hf.evaluation.score import make_scorer
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.networks import cropping
from pdiff_hf.networks.cropping import CroppedConvolutions
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_parameters
from pdiff_hf.tasks import ImageClassificationTask, take
from pdiff_hf.tasks.task import EVAL_BATCH_SIZE
from pdiff_hf.training.loop import epoch_indices

TAIL_BATCH_SIZES = (125, 250, 500, 1000, 2000, 4000)
REPEATS = 5
TRAIN_STEPS = 100


def seconds(function, repeats: int = 1) -> float:
    """CPU time of the median of several calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def train_briefly(task: ImageClassificationTask, model: torch.nn.Module) -> None:
    """So that the predictions that are compared are more than noise."""
    split = task.load_split("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for indices in itertools.islice(epoch_indices(len(split), 64, seed=0), TRAIN_STEPS):
        loss = task.loss(model, task.collate(take(split, indices.tolist())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def one_at_a_time(task, model, layout, parameters) -> torch.Tensor:
    """Predicted classes of shape (N, M): load the tensors, run the network over the split, take the next."""
    original = layout.flatten(model.state_dict())
    predictions = []
    for row in parameters:
        model.load_state_dict(layout.unflatten(row), strict=False)
        batches = DataLoader(task.load_split("test"), EVAL_BATCH_SIZE, collate_fn=task.collate)
        predictions.append(torch.cat([task.predict(model, batch).argmax(-1) for batch in batches]))
    model.load_state_dict(layout.unflatten(original), strict=False)
    return torch.stack(predictions)


@contextlib.contextmanager
def whole_kernels():
    """In the block no convolution is cropped."""
    useful_taps = cropping.useful_taps
    cropping.useful_taps = lambda size, kernel, *others: (0, kernel)
    try:
        yield
    finally:
        cropping.useful_taps = useful_taps


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter, CroppedConvolutions():
        function()
    return counter.get_total_flops()


@torch.no_grad()
def bound(task, model, layout) -> dict:
    """Seconds and operations for one example: of the whole network, of the prefix, and of the rest (the tail)."""
    models, split = NetworkRunner(model, layout), task.load_split("test")

    def batch_of(size: int) -> dict:
        return task.collate(take(split, (torch.arange(size) % len(split)).tolist()))

    batch = batch_of(EVAL_BATCH_SIZE)
    for _ in models(lambda call: task.predict(call, batch), layout.flatten(model.state_dict())[None]):
        pass  # finds out what the model allows
    prefix_seconds = seconds(lambda: models.record(lambda call: task.predict(call, batch)), REPEATS) / EVAL_BATCH_SIZE
    tails = {}
    for size in TAIL_BATCH_SIZES:
        batch = batch_of(size)
        prefix = models.record(lambda call, batch=batch: task.predict(call, batch))

        def tail(batch=batch, prefix=prefix):
            with prefix.replay({}):
                task.predict(model, batch)

        tails[size] = seconds(lambda tail=tail: [tail() for _ in range(8)], REPEATS) / 8 / size
    whole_flops = flops(lambda: task.predict(model, batch)) // size
    prefix_flops = flops(lambda: models.record(lambda call: task.predict(call, batch))) // size
    with whole_kernels():
        naive_flops = flops(lambda: task.predict(model, batch)) // size
    best = min(tails, key=tails.get)
    return {
        "naive_flops": naive_flops,
        "prefix_seconds": prefix_seconds,
        "prefix_flops": prefix_flops,
        "tail_seconds": tails[best],
        "tail_flops": whole_flops - prefix_flops,
        "tail_batch_size": best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--select", nargs="+", default=["norm[-2:]"])
    parser.add_argument("--image_size", type=int, default=28)
    parser.add_argument("--num_models", type=int, default=1100)
    parser.add_argument("--num_naive", type=int, default=8, help="networks that are scored one at a time")
    parser.add_argument("--noise", type=float, default=0.05, help="how far the networks are from the trained one")
    args = parser.parse_args()

    torch.manual_seed(0)
    task = ImageClassificationTask(args.model, args.dataset, image_size=args.image_size)
    model = task.load_base_model()
    train_briefly(task, model)
    layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, args.select))
    base = layout.flatten(model.state_dict())
    parameters = base + args.noise * torch.randn(args.num_models, len(base))
    num_examples, labels = len(task.load_split("test")), task.load_split("test").labels
    num_naive = min(args.num_naive, args.num_models)
    print(
        f"{args.model}, {layout.num_parameters:,} parameters differ; {args.num_models:,} networks x {num_examples:,} "
        f"examples of {args.dataset} ({args.image_size} pixels); {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n"
    )

    scorer = make_scorer(task, model, layout)
    scorer.score("test", parameters[:2])  # so that nothing is timed for the first time
    lower = bound(task, model, layout)
    start = time.process_time()
    expected = one_at_a_time(task, model, layout, parameters[:num_naive])
    naive = (time.process_time() - start) / num_naive * args.num_models
    start = time.process_time()
    with whole_kernels():
        before = scorer.score("test", parameters)
    whole = time.process_time() - start
    start = time.process_time()
    scores = scorer.score("test", parameters)
    ours = time.process_time() - start
    again = bound(task, model, layout)  # before and after: the load of a shared machine changes
    prefix = (lower["prefix_seconds"] + again["prefix_seconds"]) / 2 * num_examples
    tail = (lower["tail_seconds"] + again["tail_seconds"]) / 2 * num_examples * args.num_models
    same = (scores.predictions[:num_naive] == expected).double().mean()
    same_as_whole = (scores.predictions == before.predictions).double().mean()

    whole_flops = lower["prefix_flops"] + lower["tail_flops"]
    naive_flops = lower["naive_flops"] * num_examples * args.num_models
    bound_flops = (lower["prefix_flops"] + lower["tail_flops"] * args.num_models) * num_examples
    print(
        f"operations for one example: {whole_flops:,}, of which {lower['prefix_flops'] / whole_flops:.1%} in the prefix"
    )
    print(f"tail at its best with {lower['tail_batch_size']} examples\n")
    print("| | CPU seconds | TFLOP | speed-up | share of the bound |\n|---|---|---|---|---|")
    for name, time_s, tera in (
        (f"one at a time ({num_naive} measured, extrapolated)", naive, naive_flops / 1e12),
        ("whole kernels", whole, None),
        ("ours", ours, None),
        ("bound", prefix + tail, bound_flops / 1e12),
    ):
        tera = "" if tera is None else f"{tera:.2f}"
        print(f"| {name} | {time_s:.1f} | {tera} | {naive / time_s:.1f} | {(prefix + tail) / time_s:.0%} |")
    print(f"\n{whole / ours:.1f} times faster than with whole kernels")
    print(f"predictions as one at a time: {same:.4%} of {expected.numel():,}; ", end="")
    print(f"as with whole kernels: {same_as_whole:.4%} of {scores.predictions.numel():,}")
    print(f"accuracy: {100 * (expected == labels).double().mean():.2f} one at a time, ", end="")
    print(f"{100 * (scores.predictions[:num_naive] == labels).double().mean():.2f} ours")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
