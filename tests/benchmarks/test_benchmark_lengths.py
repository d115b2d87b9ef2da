"""The benchmark of error against the length of the run."""

from __future__ import annotations

import lengths
from harness.report import length_picture, length_table

LABELS = {"dense": "not pruned", "autoprune": "A", "other": "B"}


def row(method: str, target: str, epochs: int, error: float) -> dict[str, str]:
    return {"task": "lenet-5", "method": method, "target": target, "epochs": str(epochs), "error": str(error)}


ROWS = [
    row("dense", "", 38, 0.6),
    row("dense", "", 38, 0.8),
    row("autoprune", "310", 38, 0.9),
    row("autoprune", "310", 38, 1.1),
    row("autoprune", "310", 152, 0.7),
    row("other", "310", 38, 0.8),
    row("other", "310", 38, 1.0),
    row("autoprune", "500", 38, 1.3),
]


def test_the_best_cell_of_each_compression_and_length_is_bold_if_it_has_all_seeds():
    assert length_table(ROWS, "lenet-5", LABELS).splitlines() == [
        "| lenet-5: error, % | compression | 38 epochs | 152 epochs |",
        "| --- | --- | --- | --- |",
        "| not pruned | – | 0.70 ± 0.14 | – |",
        "| A | 310× | 1.00 ± 0.14 | 0.70 (1) |",
        "| B | 310× | **0.90 ± 0.14** | – |",
        "| A | 500× | 1.30 (1) | – |",
    ]


def test_the_picture_has_a_panel_per_compression_with_the_dense_network_in_each():
    panels = length_picture(ROWS, ["lenet-5"], LABELS).axes
    assert [axes.get_title() for axes in panels] == ["lenet-5, 310×", "lenet-5, 500×"]
    assert [sorted(axes.get_legend_handles_labels()[1]) for axes in panels] == [["A", "B", "not pruned"]] * 1 + [
        ["A", "not pruned"]
    ]


def test_runs_are_of_all_lengths_and_compressions_and_dense_ones_once_each():
    runs = lengths.list_runs(["lenet-5"], ["dense", "autoprune"], [0])
    assert {run.epochs for run in runs} == {38, 76, 152, 300}
    assert [run.target for run in runs if run.epochs == 38] == [None, 310.0, 500.0]
    [only] = lengths.list_runs(["lenet-300-100"], ["hyperflux"], [1], epochs=2)
    assert (only.epochs, only.target, only.seed) == (2, 80.0, 1)
    assert "speed" in only.options, "the other methods have their best settings"
