"""Small families of tasks over the digits, and a network for them."""

import torch

from pdiff_hf import ParameterLayout
from pdiff_hf.networks.stacked import StackedNetworks
from pdiff_hf.tasks import ImageClassificationTask
from pdiff_hf.tasks.families import Family, GroupedFamily, TransformedFamily


def make_family(kind: str = "transformed", **arguments) -> Family:
    base = ImageClassificationTask(
        model="perceptron_mini",
        dataset="digits",
        image_size=8,
        model_args={"img_size": 8, "hidden_size": 6},
        max_train_samples=200,
        max_eval_samples=60,
    )
    return (TransformedFamily if kind == "transformed" else GroupedFamily)(base, **arguments)


def make_networks(family: Family) -> StackedNetworks:
    torch.manual_seed(0)
    model = family.load_base_model()
    names = [name for name, _ in model.named_parameters()]
    return StackedNetworks(model, ParameterLayout.from_state_dict(model.state_dict(), names))
