"""What the callback says when fitting starts about matrices that stay dense."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from helpers import Net, fit
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_autoprune import AutoPruneCallback, AutoPruneError, prunable_weights, sparsity


class BareNet(Net):
    """A model with a bare matrix, an embedding, and a layer whose weight may be computed."""

    def __init__(self, computed: bool = False, bare: int = 12) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(12)[:bare] + 0.1)
        self.pos_embed = nn.Parameter(torch.zeros(1, 12, 12))
        self.embed = nn.Embedding(16, 12)
        if computed:
            weight_norm(self.first)

    def forward(self, x):
        token = self.embed(x[:, 0].long() % 16) + self.pos_embed.mean(1)
        return super().forward(nn.functional.pad(x @ self.mix.t(), (0, 12 - len(self.mix))) + 0.1 * token)


def messages(callback, model) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callback, model)
    return [str(warning.message) for warning in caught if "dense" in str(warning.message)]


def test_the_advice_prunes_a_bare_matrix_too():
    [text] = messages(AutoPruneCallback(0.8), BareNet())
    assert text.startswith(
        "36% of the entries of trained matrices stay dense. Of these, 'mix' (36%) can be pruned too:"
    )
    include = re.findall(r"'(.*?)'", text.split("include=")[1])
    model, callback = BareNet(), AutoPruneCallback(0.8, include=include)
    assert messages(callback, model) == []
    assert list(callback.layer_sparsity()) == ["mix", "first", "last"]
    pruned = prunable_weights(model, include=include)
    assert callback.sparsity == sparsity(pruned) == pytest.approx(0.8, abs=0.01)
    assert (model.embed.weight != 0).all()


def test_what_is_small_or_excluded_is_not_mentioned():
    assert messages(AutoPruneCallback(0.8), BareNet(bare=1)) == []
    assert messages(AutoPruneCallback(0.8, exclude=["mix"]), BareNet()) == []


def test_a_computed_weight_stays_dense_and_is_named_in_the_same_warning():
    model, callback = BareNet(computed=True), AutoPruneCallback(0.8)
    [text] = messages(callback, model)
    assert "Of these, 'mix' (35%) can be pruned too" in text
    assert "Layer 'first' computes its weight by a parametrization, so there is no weight to prune in place" in text
    assert list(callback.layer_sparsity()) == ["last"]
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_all_computed_weights_that_include_names_are_in_one_error():
    model = BareNet(computed=True)
    weight_norm(model.last)
    with pytest.raises(AutoPruneError, match="Each of the layers 'first', 'last' computes its weight by a param"):
        fit(AutoPruneCallback(0.8, include=["first", "last", "mix"]), model)


def test_a_model_of_bare_and_computed_weights_trains_dense_with_the_advice():
    model = BareNet(computed=True)
    weight_norm(model.last)
    texts = messages(AutoPruneCallback(0.8), model)
    assert any("100% of the entries" in text and "pass `include=['mix']`" in text for text in texts)
    assert sum("Each of the layers 'first', 'last' computes" in text for text in texts) == 1


def test_a_lazy_layer_is_pruned_once_it_has_a_shape():
    class LazyNet(Net):
        def __init__(self):
            super().__init__()
            self.first = nn.LazyLinear(16)

    callback = AutoPruneCallback(0.8)
    [text] = messages(callback, LazyNet())
    assert "Layer 'first' is lazy and has no shape yet" in text
    assert list(callback.layer_sparsity()) == ["first", "last"]


class LoraNet(Net):
    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)
        wrapper = nn.Module()
        wrapper.base_layer, wrapper.lora_A, wrapper.lora_B = self.first, nn.Linear(12, 2), nn.Linear(2, 16)
        del self.first
        self.adapted = wrapper

    def forward(self, x):
        layer = self.adapted
        x = layer.base_layer(x) + layer.lora_B(layer.lora_A(x))
        return self.last(self.dropout(torch.relu(self.norm(x))))


def test_a_run_that_trains_adapters_says_that_the_merged_model_is_dense():
    texts = messages(AutoPruneCallback(0.5), LoraNet())
    assert any(
        "Adapters are trained in place of frozen layers (adapted.base_layer), so only adapters" in t for t in texts
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_two_parameters_with_the_same_memory_are_pruned_and_counted_as_one(transposed):
    class TiedNet(Net):
        def __init__(self):
            super().__init__(hidden=12)
            self.more = nn.Linear(12, 12)
            self.more.weight = nn.Parameter(self.first.weight.t() if transposed else self.first.weight.data)

        def forward(self, x):
            return super().forward(self.more(x))

    model, callback = TiedNet(), AutoPruneCallback(0.5)
    fit(callback, model, epochs=8)
    assert list(callback.layer_sparsity()) == ["first", "last"]
    assert callback.sparsity == sparsity(model) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model.more.weight == 0, model.first.weight.t() == 0 if transposed else model.first.weight == 0)


@pytest.mark.parametrize("name", ["bilinear", "list.0"])
def test_a_bilinear_layer_and_an_entry_of_a_parameter_list_are_pruned(name):
    class ProductNet(Net):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(12, 12, 12)
            self.list = nn.ParameterList([torch.randn(12, 12)])

        def forward(self, x):
            return super().forward(self.bilinear(x, x @ self.list[0]))

    model, callback = ProductNet(), AutoPruneCallback(0.8, include=[name])
    fit(callback, model)
    assert callback.layer_sparsity() == {name: pytest.approx(0.8, abs=0.01)}
