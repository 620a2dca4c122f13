"""What adapters have in common: products or factors, one start or several, ranks, and conditions in bits or in words.

    python scripts/benchmarks/adapter_starts.py --num_tasks 64 --num_steps 150

Adapters of the small language model of `scripts/docstrings.py` are trained from one start, from different ones, and
from different ones with ranks of 2, 4 and 8. Kernel ridge regression then predicts adapters for unseen tasks: their
products BA, or their factors; from the packages that a task is about, or from a description in words of its own.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator

from pdiff_hf.evaluation.closed_forms import mean_networks, tuned_ridge
from pdiff_hf.evaluation.member_score import MemberScorer
from pdiff_hf.models.products import AdapterProducts, contracted, expanded
from pdiff_hf.networks.adapters import without_wrapper
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.scripts.docstrings import PACKAGES, DocstringQuestions, add_adapter
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots.zoo import ZooArguments, train_specialists
from pdiff_hf.tasks import make_family
from pdiff_hf.training import Loop

RANKS = (2, 4, 8)
SEARCH_EXAMPLES = 30  # of each validation task, on which the settings of a regression are chosen


def own_starts(networks: NetworkRunner, count: int, ranks: tuple[int, ...], seed: int) -> torch.Tensor:
    """Starts for adapters, `(T, D)`: A is drawn for each as PEFT does, and rows beyond its rank are zero."""
    generator, layout = torch.Generator().manual_seed(seed), networks.layout
    tensors = layout.unflatten(networks.base_parameters().repeat(count, 1))
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            bound = tensor.shape[-1] ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)
            for t in range(count):
                tensor[t, ranks[t % len(ranks)] :] = 0
    return layout.flatten(tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="outputs/docstrings")
    parser.add_argument("--num_tasks", type=int, default=64)
    parser.add_argument("--num_steps", type=int, default=150)
    parser.add_argument("--num_test_tasks", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(args.folder)
    task = DocstringQuestions(str(folder / "adapter"), str(folder / "data"))
    add_adapter(folder / "network", folder / "adapter-8", args.seed, max(RANKS))
    task.adapter = str(folder / "adapter-8")
    bits = make_family("tabled", task, {"fields": {"packages": {"type": "vector", "length": len(PACKAGES)}}})
    words = make_family("tabled", task, {"fields": {"description": {"type": "text"}}})
    model = without_wrapper(task.load_base_model())
    networks = NetworkRunner(model, select_layout(model, "*lora_*"))
    sizes = {"train": args.num_tasks, "validation": 8, "test": args.num_test_tasks}
    sets = words.split(sizes, args.seed)
    members = {name: [words.key(condition) for condition in conditions] for name, conditions in sets.items()}
    tables = {name: bits.fields.table(bits.told[int(i)] for i in ids) for name, ids in members.items()}
    said = {name: words.fields.table(sets[name]) for name in ("validation", "test")}
    ways = words.fields.alternatives(sets["train"])  # (T, K, width)
    own = MemberScorer(bits, networks, tables["test"])
    search = MemberScorer(bits, networks, tables["validation"], SEARCH_EXAMPLES)
    search_words = MemberScorer(words, networks, said["validation"], SEARCH_EXAMPLES)

    def score(parameters: torch.Tensor) -> str:
        values = own.score("test", parameters).values
        return f"{values.mean().item():.1f}"

    def train(name: str, start: torch.Tensor) -> torch.Tensor:
        zoo = ZooArguments(args.num_steps, 8, 5e-3, num_snapshots=1)
        return train_specialists(Loop(Accelerator(), args.seed), bits, networks, tables[name], zoo, start)[0]

    count = args.num_tasks
    starts = {
        "one start": networks.base_parameters(),
        "different starts": own_starts(networks, count, (max(RANKS),), args.seed),
        "different starts, ranks 2, 4, 8": own_starts(networks, count, RANKS, args.seed),
    }
    print(f"base model {score(networks.base_parameters().expand(args.num_test_tasks, -1))}", flush=True)
    print(f"trained on the task {score(train('test', networks.base_parameters()))}", flush=True)
    for name, start in starts.items():
        trained = train("train", start)
        found = {}
        for kind, products in {"factors": None, "products": AdapterProducts(networks.layout)}.items():
            seen, _, means = mean_networks(trained, tables["train"], products)
            ridge = tuned_ridge(search, seen, means, products)
            found[kind] = score(contracted(ridge(tables["test"]), products))
        nearest = torch.cdist(tables["test"], tables["train"]).argmin(1)
        found["nearest seen task"] = score(trained[nearest])
        products = AdapterProducts(networks.layout)
        means = expanded(trained, products).repeat_interleave(ways.shape[1], 0)
        ridge = tuned_ridge(search_words, ways.flatten(0, 1), means, products)
        found["products from words"] = score(contracted(ridge(said["test"]), products))
        found["from another task's words"] = score(contracted(ridge(said["test"].roll(1, 0)), products))
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
