"""What adapters have in common: products or factors, different starts and ranks, and conditions in bits or in words.

    python scripts/benchmarks/adapter_starts.py --networks llama gpt_neox --seeds 0 1 2

Adapters of the small language model of `scripts/docstrings.py` are trained from different starts, and from different
ones with ranks of 2, 4 and 8. Kernel ridge regression then predicts adapters for unseen tasks: their products BA, or
their factors; from the packages that a task is about, or from a description in words of its own.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from pdiff_hf.evaluation.closed_forms import mean_networks, tuned_ridge
from pdiff_hf.evaluation.member_score import MemberScorer
from pdiff_hf.models.kernel_ridge import KernelRidge
from pdiff_hf.models.products import AdapterProducts
from pdiff_hf.networks.adapters import without_wrapper
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.scripts.docstrings import PACKAGES, DocstringQuestions, learn, make
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


def measure(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """The accuracy of each way to adapters for unseen tasks in percent, for one seed after the other."""
    task = DocstringQuestions(str(folder / "adapter"), str(folder / "data"), adapter_rank=max(RANKS))
    bits = make_family("tabled", task, {"fields": {"packages": {"type": "vector", "length": len(PACKAGES)}}})
    words = make_family("tabled", task, {"fields": {"description": {"type": "text"}}})
    model = without_wrapper(task.load_base_model())
    networks = NetworkRunner(model, select_layout(model, "*lora_*"))
    products = AdapterProducts(networks.layout)
    sizes = {"train": args.num_tasks, "validation": 8, "test": args.num_test_tasks}
    for seed in args.seeds:
        sets = words.split(sizes, seed)
        said = {name: words.fields.table(conditions) for name, conditions in sets.items()}
        members = {name: [words.key(condition) for condition in conditions] for name, conditions in sets.items()}
        tables = {name: bits.fields.table(bits.told[int(i)] for i in ids) for name, ids in members.items()}
        own = MemberScorer(bits, networks, tables["test"])
        search = MemberScorer(bits, networks, tables["validation"], SEARCH_EXAMPLES)
        search_words = MemberScorer(words, networks, said["validation"], SEARCH_EXAMPLES)

        def score(parameters: torch.Tensor, own: MemberScorer = own) -> float:
            return own.score("test", parameters).values.mean().item()

        def train(table: torch.Tensor, start: torch.Tensor, seed: int = seed) -> torch.Tensor:
            zoo = ZooArguments(args.num_steps, 8, 5e-3, num_snapshots=1)
            return train_specialists(Loop(Accelerator(), seed), bits, networks, table, zoo, start)[0]

        base = networks.base_parameters()
        found = {"base model": score(base.expand(args.num_test_tasks, -1))}
        found["trained on the task"] = score(train(tables["test"], base))
        for ranks, name in (((max(RANKS),), ""), (RANKS, ", mixed ranks")):
            trained = train(tables["train"], own_starts(networks, args.num_tasks, ranks, seed))
            seen, _, means = mean_networks(trained, tables["train"], products)
            ridge = tuned_ridge(search, seen, means, products)
            found[f"products{name}"] = score(products.contract(ridge(tables["test"])))
            if name:
                break
            plain = mean_networks(trained, tables["train"])[2]
            found["factors"] = score(tuned_ridge(search, seen, plain)(tables["test"]))
            same = KernelRidge(bits.fields, seen, plain, ridge.ridge, ridge.scales)
            found["factors, settings of products"] = score(same(tables["test"]))
            found["nearest seen task"] = score(trained[torch.cdist(tables["test"], tables["train"]).argmin(1)])
            ridge = tuned_ridge(search_words, said["train"], products.expand(trained), products)
            found["products from new words"] = score(products.contract(ridge(said["test"])))
            found["from another task's words"] = score(products.contract(ridge(said["test"].roll(1, 0))))
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="outputs/docstrings")
    parser.add_argument("--networks", nargs="+", default=["llama"], help="Types of transformers.")
    parser.add_argument("--num_tasks", type=int, default=64)
    parser.add_argument("--num_steps", type=int, default=100)
    parser.add_argument("--num_test_tasks", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    for kind in args.networks:
        folder = Path(args.folder, kind)
        if not (folder / "data").is_dir():
            make(folder, kind=kind)
        learn(folder / "network")
        rows = []
        for row in measure(folder, args):
            rows.append(row)
            print(kind, json.dumps(row), flush=True)
        values = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
        for name, column in zip(rows[0], values.T, strict=True):
            spread = f" ± {column.std():.1f}" if len(rows) > 1 else ""
            print(f"{kind}: {name:32} {column.mean():.1f}{spread}, n = {len(rows)}", flush=True)


if __name__ == "__main__":
    main()
