"""Tensors that share memory: whatever gives a network other values gives them under every name."""

import pytest
import torch
from accelerate.utils import is_torch_version
from support.pipelines import make_pipeline
from torch import nn
from transformers import AutoModelForSequenceClassification, BartConfig, BartForSequenceClassification

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.networks.ensemble import EnsembleModel
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout, select_parameters
from pdiff_hf.tensor_names import tied_names


class TiedNet(nn.Module):
    """An embedding and a head; `tie` says how the head comes to its weight."""

    def __init__(self, tie: str):
        super().__init__()
        self.encode, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.decode = nn.Linear(8, 8, bias=False)
        if tie == "module":
            self.decode = self.encode
        elif tie == "parameter":
            self.decode.weight = self.encode.weight
        elif tie == "data":
            self.decode.weight.data = self.encode.weight.data
        else:
            assert tie == "no"

    def forward(self, x):
        return self.decode(self.norm(self.encode(x.exp())).tanh())


TIES = ["module", "parameter", "data", "no"]
NUM_NETWORKS = 3


@torch.no_grad()
def written(tie: str, layout: ParameterLayout, row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a network says whose memory was written to, so that nothing can be left out."""
    torch.manual_seed(0)
    network = TiedNet(tie).eval()
    for name, tensor in layout.unflatten(row).items():
        network.get_parameter(name).copy_(tensor)
    return network(x)


@pytest.mark.parametrize("select", ["all", "encode.*", "*.weight"])
@pytest.mark.parametrize("tie", TIES)
def test_scored_networks_models_and_ensembles_agree(tie, select):
    torch.manual_seed(0)
    network = TiedNet(tie).eval()
    layout = select_layout(network, select)
    rows = layout.flatten(network.state_dict()) + 0.1 * torch.randn(NUM_NETWORKS, layout.num_parameters)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = torch.randn(6, 8)
    expected = torch.stack([written(tie, layout, row, x) for row in rows])

    models = NetworkRunner(network, layout)
    scored = torch.cat([output for _, output in models(lambda call: call(x), rows)])
    torch.testing.assert_close(scored, expected)
    alone = torch.cat([output for row in rows for _, output in models(lambda call: call(x), row[None])])
    torch.testing.assert_close(alone, expected)
    pipe = make_pipeline(network, select)
    with torch.no_grad():
        generated = [pipe.make_model(layout.unflatten(row)) for row in rows]
        assert torch.equal(torch.stack([one(x) for one in generated]), expected)
        ensemble = EnsembleModel(network, layout, rows)
        mean = expected.softmax(-1).mean(0)
        torch.testing.assert_close(ensemble(x).logits.exp(), mean)
        if select == "all" and not is_torch_version("<", "2.7"):  # which cannot trace `vmap`
            program = torch.export.export(ensemble, (x,), strict=False).module()
            torch.testing.assert_close(program(x).logits.exp(), mean)
    for one in generated:  # they are tied as the base model is
        assert tied_names(one) == tied_names(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("tie", TIES)
def test_memory_is_selected_once(tie):
    names = select_parameters(TiedNet(tie), "*.weight")
    assert names == ("encode.weight", "norm.weight") + (("decode.weight",) if tie == "no" else ())
    if tie in ("parameter", "data"):  # asked for under its other name
        assert select_parameters(TiedNet(tie), "decode.*") == ("encode.weight",)


def test_a_layout_with_several_names_of_one_tensor():
    """As of a whole state dict: the first value counts everywhere, and the base model is left as it was."""
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    for tie in ("module", "parameter", "data"):
        network = TiedNet(tie).eval()
        layout = ParameterLayout.from_state_dict(network.state_dict())
        row = layout.flatten(network.state_dict())
        other = row + torch.randn(len(row))
        own = network(x)
        (_, scored), *_ = NetworkRunner(network, layout)(lambda call, network=network: call(x), other[None])
        generated = make_pipeline(network, "all").make_model(layout.unflatten(other))
        torch.testing.assert_close(generated(x), scored[0])
        torch.testing.assert_close(generated.decode.weight, layout.unflatten(other)["encode.weight"])
        assert torch.equal(network(x), own)


def test_a_network_of_transformers_is_saved_as_it_was_scored(tmp_path):
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder")
             for name, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()}  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 5, "decoder_start_token_id": 5}
    config = BartConfig(vocab_size=8, d_model=16, **sizes, **tokens, max_position_embeddings=16, num_labels=3)
    network = BartForSequenceClassification(config).eval()
    layout = select_layout(network, "all")
    row = layout.flatten(network.state_dict()) + 0.1 * torch.randn(layout.num_parameters)
    ids = torch.tensor([[2, 3, 4, 5]])
    (_, scored), *_ = NetworkRunner(network, layout)(lambda call: call(ids).logits, row[None])
    generated = make_pipeline(network, "all").make_model(layout.unflatten(row))
    embedding = generated.model.shared.weight
    assert embedding is generated.model.encoder.embed_tokens.weight is generated.model.decoder.embed_tokens.weight
    generated.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(generated(ids).logits, scored[0])
        torch.testing.assert_close(loaded(ids).logits, scored[0])  # memory of another alignment, other last bits
    for name, tensor in generated.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
