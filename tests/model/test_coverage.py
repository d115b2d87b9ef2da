from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_autoprune.model.coverage import find_adapted_layers, find_dense_matrices
from lightning_autoprune.model.prunable_layers import choose_weights, prunable_weights


def requires_grad(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


class Mixture(nn.Module):
    """Layers that have experts as bare parameters, an embedding and a normalization."""

    def __init__(self, layers: int = 3, size: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, size)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            layer.gate, layer.norm = nn.Linear(size, size), nn.LayerNorm([size, size])
            layer.up, layer.down = nn.Parameter(torch.ones(6, size, size)), nn.Parameter(torch.ones(3, size, size))
            self.layers.append(layer)
        self.head = nn.Linear(size, 2)


def test_the_largest_matrices_are_named_with_the_patterns_that_take_them_in():
    model = Mixture()
    dense = find_dense_matrices(choose_weights(model), requires_grad, None)
    total = 3 * 10 * 64 + 16
    assert dense.share == pytest.approx(3 * 9 * 64 / total)
    assert dense.largest == {
        "layers.*.up": pytest.approx(3 * 6 * 64 / total),
        "layers.*.down": pytest.approx(3 * 3 * 64 / total),
    }
    assert dense.patterns == ["layers.*", "head"]
    taken = prunable_weights(model, include=dense.patterns)
    assert sum(weight.numel() for weight in taken.values()) == total


def test_what_the_user_excludes_does_not_count():
    exclude = ["*.up"]
    dense = find_dense_matrices(choose_weights(Mixture(), exclude=exclude), requires_grad, exclude)
    assert list(dense.largest) == ["layers.*.down"]
    assert dense.share == pytest.approx(3 * 3 * 64 / (3 * 4 * 64 + 16))


def test_frozen_matrices_do_not_count():
    model = Mixture()
    for layer in model.layers:
        layer.up.requires_grad_(False)
        layer.down.requires_grad_(False)
    assert not find_dense_matrices(choose_weights(model), requires_grad, None).is_large


def test_up_to_five_percent_may_stay_dense():
    model = nn.ModuleDict({"head": nn.Linear(95, 10), "bare": nn.ParameterList([torch.ones(5, 10)])})
    assert not find_dense_matrices(choose_weights(model), requires_grad, None).is_large
    model["bare"] = nn.ParameterList([torch.ones(6, 10)])
    assert find_dense_matrices(choose_weights(model), requires_grad, None).largest == {
        "bare.0": pytest.approx(60 / 1010)
    }


def test_shared_memory_counts_once():
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "bare": nn.ParameterList([torch.ones(4, 4)])})
    model["bare"][0].data = model["head"].weight.data.t()
    assert find_dense_matrices(choose_weights(model), requires_grad, None).share == 0


def test_a_computed_weight_counts_and_is_not_advised():
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    dense = find_dense_matrices(choose_weights(model), requires_grad, None)
    assert dense.share == pytest.approx(20 / 36)  # with the lengths, of shape (4, 1)
    assert not dense.patterns


class Adapted(nn.Module):
    """A frozen layer with an adapter, as the package `peft` builds it."""

    def __init__(self, base: nn.Linear | nn.Conv1d, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Linear(8, 6), nn.Linear(8, 2), nn.Linear(2, 6)),
        (nn.Conv1d(8, 6, 3), nn.Conv1d(8, 2, 3), nn.Conv1d(2, 6, 1)),
    ],
    ids=["linear", "convolution"],
)
def test_frozen_layers_with_an_adapter_are_found(layers):
    model = nn.Sequential(Adapted(*layers), nn.Linear(6, 6), nn.Linear(6, 2))
    weights = choose_weights(model).weights
    assert list(find_adapted_layers(model, weights, requires_grad)) == ["0.base_layer"]


def test_a_layer_that_holds_its_own_adapter_is_found():
    layer = nn.Linear(8, 6).requires_grad_(False)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(6, 2))
    model = nn.Sequential(layer, nn.Linear(6, 2))
    assert list(find_adapted_layers(model, choose_weights(model).weights, requires_grad)) == ["0"]


def test_a_frozen_backbone_has_no_adapter():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False), nn.Linear(8, 2))
    assert not find_adapted_layers(model, choose_weights(model).weights, requires_grad)
