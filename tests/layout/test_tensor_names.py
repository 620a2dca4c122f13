"""Other names of a tensor: prefixes of wrappers, modules that share it, views of it."""

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForSequenceClassification

from pdiff_hf.layout import LayoutError, ParameterLayout
from pdiff_hf.networks.replacement import Replacement
from pdiff_hf.selection import fit_layout, select_layout, select_parameters
from pdiff_hf.tensor_names import match_names, plain_name, tied_names


@pytest.mark.parametrize(
    "name",
    [
        "module._orig_mod.fc.weight",
        "_orig_mod.module.fc.weight",
        "module.module.module.fc.weight",
        "_fsdp_wrapped_module.module.fc._checkpoint_wrapped_module.weight",
        "base_model.model.timm_model.fc.weight",
        "module.base_model.model._orig_mod.fc._orig_mod.weight",
        "model.module.fc.weight",
    ],
)
def test_prefixes_of_wrappers_in_any_order_and_number(name):
    assert plain_name(name) == "fc.weight"
    assert match_names(["timm_model.fc.weight"], [name, "fc.bias"]) == {"timm_model.fc.weight": name}


def test_what_could_be_either_is_refused_and_an_equal_name_is_not():
    assert match_names(["fc.weight"], ["module.fc.weight", "fc.weight"]) == {"fc.weight": "fc.weight"}
    with pytest.raises(LayoutError, match="both 'module.w' and '_orig_mod.w' could be tensor 'w'"):
        match_names(["w"], ["module.w", "_orig_mod.w"])
    own = ["module.w", "w"]  # a network that has a module of this name
    assert match_names(own, own) == {"module.w": "module.w", "w": "w"}
    assert plain_name("module") == "module" and plain_name("model.weight") == "weight"


def test_a_layout_is_fitted_to_the_names_of_a_network():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    wrapped = ParameterLayout(("module.0.weight", "_orig_mod.1.bias"), ((3, 2), (2,)), ("float32", "float32"))
    assert fit_layout(wrapped, model).names == ("0.weight", "1.bias")
    with pytest.raises(LayoutError, match="no tensor '7.bias'"):
        fit_layout(ParameterLayout(("7.bias",), ((2,),), ("float32",)), model)


class Shared(nn.Module):
    """A matrix that is used as it is by another module, transposed by a third, and of which a fourth uses some rows."""

    def __init__(self, partly: bool = False):
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.head.weight
        self.alone = nn.Linear(3, 3)
        if partly:
            self.transposed = nn.Linear(6, 4, bias=False)
            self.transposed.weight = nn.Parameter(self.head.weight.data.t())
            self.register_buffer("flat", self.alone.weight.data.view(-1)[::2])


def test_a_shared_tensor_has_new_values_under_all_of_its_names():
    model = Shared()
    layout = select_layout(model, "all")
    assert layout.names == ("head.weight", "alone.weight", "alone.bias")
    assert tied_names(model) == {"tied.weight": "head.weight"}
    assert layout.aliases == (("tied.weight",), (), ())
    new = layout.unflatten(torch.randn(3, layout.num_parameters))
    completed = Replacement(model, layout.names).tensors(model, new)
    assert set(completed) == set(model.state_dict())
    assert completed["tied.weight"] is completed["head.weight"] is new["head.weight"]


def test_a_part_of_another_tensor_is_not_selected():
    model = Shared(partly=True)
    for pattern, names in (
        ("head.*", "'head.weight' and 'transposed.weight'"),
        ("alone.*", "'alone.weight' and 'flat'"),
    ):
        with pytest.raises(LayoutError, match=f"{names} share a part of their memory"):
            select_layout(model, pattern)
        with pytest.raises(LayoutError, match="share a part of their memory"):
            Replacement(model, select_parameters(model, pattern))
    assert select_layout(model, "*.bias").names == ("alone.bias",)


def test_any_name_of_a_shared_tensor_selects_it():
    assert select_parameters(Shared(), "tied.*") == ("head.weight",)
    assert select_parameters(Shared(), "all", exclude="tied.*") == ("alone.weight", "alone.bias")
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 8, "max_position_embeddings": 8}
    config = BartConfig(**sizes, encoder_attention_heads=1, decoder_attention_heads=1)
    layout = select_layout(BartForSequenceClassification(config), "*embed_tokens*")
    assert layout.names == ("model.shared.weight",)
    assert layout.aliases == (("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),)


def test_tensors_that_share_a_part_of_their_memory():
    memory = torch.randn(10)
    model = nn.Module()
    model.a, model.b, model.c = (nn.Parameter(memory[s]) for s in (slice(0, 6), slice(4, 10), slice(0, 2)))
    with pytest.raises(LayoutError, match="'a' and 'b' share a part of their memory.*leave both out"):
        select_layout(model, "all")
    columns = torch.randn(4, 6)
    model.a, model.b, model.c = (nn.Parameter(columns[:, i : i + 2]) for i in (0, 2, 4))  # one matrix, nothing shared
    assert select_parameters(model, "all") == ("a", "b", "c")


def test_aliases_are_kept_and_do_not_make_layouts_differ():
    layout = select_layout(Shared(), "head")
    again = ParameterLayout.from_dict(select_layout(Shared(), "tied.*").to_dict())
    assert again.aliases == (("tied.weight",),)
    assert ParameterLayout(again.names, again.shapes, again.dtypes) == again != layout
    assert "aliases" not in layout.to_dict()


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.last = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.LayerNorm(3))


def test_statistics_of_batch_norm_are_selected_only_if_asked_for():
    model = Normalized()
    assert select_parameters(model, "norm[0]") == ("first.1.weight", "first.1.bias")
    first = tuple(f"first.1.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
    assert select_parameters(model, "norm[0]", batch_norm_statistics=True) == first
    every = select_parameters(model, "all", batch_norm_statistics=True)
    statistics = [f"{n}.running_{s}" for n in ("first.1", "last.1") for s in ("mean", "var")]
    assert [name for name in every if "running" in name] == statistics
    assert every == tuple(name for name in model.state_dict() if not name.endswith("num_batches_tracked"))
    with pytest.raises(LayoutError, match="selects no parameter"):
        select_parameters(model, "*.running_mean")
    with pytest.raises(LayoutError, match="Linear has no batch norm with running statistics.*=base"):
        select_parameters(nn.Linear(2, 2), "all", batch_norm_statistics=True)
    layout = select_layout(model, "norm[0]", batch_norm_statistics=True)
    assert layout.unflatten(torch.full((12,), -1.0))["first.1.running_var"].tolist() == [0, 0, 0]  # no variance is less


def test_a_network_without_norm_layers_is_told_what_it_has():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(LayoutError, match=r"it has conv \(1\), linear \(1\), head \(1\), and no norm or"):
        select_parameters(model, "norm[-2:]")
