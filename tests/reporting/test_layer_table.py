"""The rows of the layers say what the weights say."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, fit

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.reporting.layer_table import LayerSummary, summarize_layers, table_cells, total_row


def test_zeros_are_counted_and_what_is_known_is_added():
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


def test_the_whole_knows_what_all_layers_know():
    rows = summarize_layers({"a": torch.ones(2, 2), "b": torch.zeros(4, 1)}, {"a": 8, "b": 8}, {"a": 1})
    assert total_row(rows) == LayerSummary("all", (), 8, 4, 16, None)
    assert total_row([]).sparsity == 0


def test_a_table_leaves_out_what_no_layer_knows():
    head, cells = table_cells(summarize_layers({"conv": torch.ones(2, 3, 5, 5)}))
    assert head == ["layer", "shape", "weights", "kept", "sparsity"]
    assert cells == [["conv", "2×3×5×5", "150", "150", "0.00%"]]
    head, _ = table_cells(summarize_layers({"conv": torch.ones(2, 3)}, {"conv": 10}, {"conv": 0}))
    assert head[5:] == ["FLOPs kept", "revived"]


def test_a_callback_gives_a_row_a_layer_with_what_it_saves():
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
