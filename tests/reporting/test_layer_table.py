"""The table of layers agrees with the weights."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, fit

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.reporting.layer_table import LayerSummary, format_layer_table, sum_layers, summarize_layers


def test_zeros_are_counted_and_known_figures_are_added():
    weights = {"a": torch.tensor([[0.0, 1.0], [0.0, 2.0]]), "b": torch.zeros(3, 1, 2)}
    a, b = summarize_layers(weights, {"a": 80}, {"a": 5})
    assert a == LayerSummary("a", (2, 2), 4, 2, 80, 5)
    assert (a.sparsity, a.flops_kept) == (0.5, 40)
    assert (b.shape, b.kept, b.sparsity, b.flops_kept, b.revived) == ((3, 1, 2), 0, 1.0, None, None)
    assert a.as_dict() == {
        "name": "a",
        "shape": [2, 2],
        "weights": 4,
        "kept": 2,
        "flops": 80,
        "revived": 5,
        "sparsity": 0.5,
        "flops_kept": 40,
    }


def test_the_sum_has_the_figures_that_every_layer_has():
    rows = summarize_layers({"a": torch.ones(2, 2), "b": torch.zeros(4, 1)}, {"a": 8, "b": 8}, {"a": 1})
    assert sum_layers(rows) == LayerSummary("all", (), 8, 4, 16, None)
    assert sum_layers([]).sparsity == 0


def test_a_table_leaves_out_empty_columns():
    head, cells = format_layer_table(summarize_layers({"conv": torch.ones(2, 3, 5, 5)}))
    assert head == ["layer", "shape", "weights", "kept", "sparsity"]
    assert cells == [["conv", "2×3×5×5", "150", "150", "0.00%"]]
    head, _ = format_layer_table(summarize_layers({"conv": torch.ones(2, 3)}, {"conv": 10}, {"conv": 0}))
    assert head[5:] == ["FLOPs kept", "revived"]


def test_a_callback_returns_one_row_per_layer():
    class Example(Net):
        example_input_array = torch.zeros(1, 12)

    callback = AutoPruneCallback(target_sparsity=0.8)
    model, _ = fit(callback, model=Example(), epochs=12)
    first, last = callback.layers()
    assert (first.name, first.shape, first.weights) == ("first", (16, 12), 192)
    assert first.kept == int((model.first.weight != 0).sum())
    assert first.flops == 2 * 192
    assert last.sparsity == pytest.approx(callback.layer_sparsity()["last"])
    assert first.revived + last.revived > 0
