"""
CPU seconds of the networks of a zoo, trained side by side and one after the other.

    OMP_NUM_THREADS=1 python scripts/benchmarks/zoo.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/zoo.py --dataset path/to/fashion_mnist --image_size 14

Both take the same steps on the same examples, which they prepare for each task, and end with the same networks but for
the last bits. One after the other, each network is trained by the same function, with checkpoints and so on, or as a
`torch.nn.Module` in a plain loop that does nothing else.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots.zoo import ZooArguments, train_specialists
from pdiff_hf.tasks import ImageClassificationTask
from pdiff_hf.tasks.image_families import TransformedFamily
from pdiff_hf.training.loop import Loop, epoch_indices, make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--image_size", type=int, default=8)
    parser.add_argument("--num_tasks", type=int, default=192)
    parser.add_argument("--num_steps", type=int, default=100)
    parser.add_argument("--one_by_one", type=int, default=8, help="So many are trained one after the other.")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = ImageClassificationTask(
        model="perceptron_mini",
        dataset=args.dataset,
        image_size=args.image_size,
        model_args={"img_size": args.image_size, "in_chans": 1, "hidden_size": 24},
    )
    family = TransformedFamily(base)
    model = family.load_base_model()
    networks = NetworkRunner(model, select_layout(model, "all"))
    table = family.fields.table(family.conditions(args.num_tasks, seed=0))
    zoo = ZooArguments(num_steps=args.num_steps, num_snapshots=1, learning_rate=3e-3)
    start = networks.base_parameters()
    family.pixels("train")

    def train(table: torch.Tensor) -> torch.Tensor:
        return train_specialists(Loop(Accelerator(cpu=True), seed=0), family, networks, table, zoo)[0]

    before = time.process_time()
    together = train(table)
    side_by_side = (time.process_time() - before) / args.num_tasks
    before = time.process_time()
    for row in table[: args.one_by_one]:
        train(row[None])
    same_function = (time.process_time() - before) / args.one_by_one

    indices = epoch_indices(family.num_examples("train"), zoo.batch_size, 0)
    batches = [next(indices) for _ in range(args.num_steps)]
    model.requires_grad_(True)
    apart = []
    before = time.process_time()
    for row in table[: args.one_by_one]:
        model.load_state_dict(networks.layout.unflatten(start), strict=False)
        optimizer = make_optimizer("adamw", model.parameters(), zoo.learning_rate, 0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.num_steps)
        for chosen in batches:
            batch = {name: values[0] for name, values in family.batch("train", row[None], chosen).items()}
            loss = F.cross_entropy(family.predict(model, batch), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        apart.append(networks.layout.flatten(model.state_dict()))
    one_by_one = (time.process_time() - before) / args.one_by_one
    same = together[: args.one_by_one]
    difference = (torch.stack(apart) - same).norm() / (same - start).norm()
    print(f"{args.num_tasks} networks of {networks.layout.num_parameters:,} parameters, {args.num_steps} steps each")
    print(f"side by side, a network: {1000 * side_by_side:.1f} ms of CPU")
    for what, seconds in (("by the same function", same_function), ("in a plain loop", one_by_one)):
        print(f"one after the other, {what}: {1000 * seconds:.1f} ms, {seconds / side_by_side:.1f} times as much")
    print(f"difference of their parameters: {difference:.1e} of the way that they have moved")


if __name__ == "__main__":
    main()
