from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_autoprune.model.weight_places import find_weight_places, is_plain_linear


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: place.kind.name for name, place in find_weight_places(model).items()}


def foreign_class(module: str, name: str, base: type = nn.Module) -> type:
    """Return a class that says it is from another package."""
    return type(name, (base,), {"__module__": module})


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 2))
        self.pos_embed = nn.Parameter(torch.ones(1, 5, 2))
        self.cls_token = nn.Parameter(torch.ones(1, 1, 2))
        self.relative_bias = nn.Parameter(torch.ones(3, 2))
        self.scale = nn.Parameter(torch.ones(3))
        self.list = nn.ParameterList([torch.ones(2, 2)])
        self.dict = nn.ParameterDict({"a": torch.ones(2, 2, 2)})
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.norm = nn.LayerNorm([2, 3])
        self.embed = nn.Embedding(3, 2)


def test_every_parameter_with_two_dimensions_has_a_place():
    assert kinds(Everything()) == {
        "w": "BARE",
        "pos_embed": "EMBEDDING",
        "cls_token": "VECTOR",
        "relative_bias": "VECTOR",
        "list.0": "BARE",
        "dict.a": "BARE",
        "bilinear": "LAYER",
        "norm": "VECTOR",
        "norm.bias": "VECTOR",
        "embed": "EMBEDDING",
    }


def test_the_ingredients_of_a_computed_weight_are_found_with_their_owner():
    model = nn.ModuleDict(
        {
            "new": weight_norm(nn.Linear(2, 3)),
            "old": nn.utils.weight_norm(nn.Conv1d(2, 3, 1)),
            "lstm": weight_norm(nn.LSTM(2, 2), "weight_hh_l0"),
        }
    )
    places = find_weight_places(model)
    owners = {name: place.owner for name, place in places.items() if place.kind.name == "INGREDIENT"}
    assert owners["new.parametrizations.weight.original1"] == "new"
    assert owners["old.weight_v"] == "old"
    assert owners["lstm.parametrizations.weight_hh_l0.original1"] == "lstm.weight_hh_l0"
    assert {name for name, place in places.items() if place.obstacle} == {"new", "old", "lstm.weight_hh_l0"}


def test_a_weight_that_a_property_computes_is_not_read():
    class Sampled(nn.Linear):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.weight_mu, self.weight_sigma = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))

        @property
        def weight(self):
            raise AssertionError("it would draw random numbers")

    places = find_weight_places(nn.Sequential(Sampled()))
    assert places["0"].obstacle
    assert places["0.weight_mu"].owner == "0"


def test_linear_layers_of_pyg_are_known_by_their_class():
    for base in (foreign_class("torch_geometric.nn.dense.linear", "HeteroLinear"),):
        layer = type("Own", (base,), {})()
        layer.weight = nn.Parameter(torch.ones(2, 3, 4))
        assert is_plain_linear(layer)
        assert kinds(nn.Sequential(layer)) == {"0": "LAYER"}
    assert not is_plain_linear(foreign_class("somewhere.linear", "Linear")())


def test_a_lazy_layer_of_pyg_has_an_obstacle():
    layer = foreign_class("torch_geometric.nn.dense.linear", "Linear")()
    layer.weight = nn.UninitializedParameter()
    assert "is lazy" in str(find_weight_places(nn.Sequential(layer))["0"].obstacle)


def test_the_weights_of_all_experts_are_known_and_their_biases_are_not():
    experts = foreign_class("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")()
    experts.gate_up_proj, experts.down_proj = nn.Parameter(torch.ones(2, 8, 4)), nn.Parameter(torch.ones(2, 4, 4))
    experts.gate_up_proj_bias = nn.Parameter(torch.ones(2, 8))
    assert kinds(nn.ModuleDict({"experts": experts})) == {
        "experts.gate_up_proj": "LAYER",
        "experts.down_proj": "LAYER",
        "experts.gate_up_proj_bias": "VECTOR",
    }
    glu = foreign_class("transformers.models.dbrx.modeling_dbrx", "DbrxExpertGLU")()
    glu.w1 = nn.Parameter(torch.ones(8, 4))
    assert kinds(glu) == {"w1": "LAYER"}
