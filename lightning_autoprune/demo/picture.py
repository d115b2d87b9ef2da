"""The picture of the demo: every layer's sparsity over the training steps."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["read_curves", "sparsity_curves"]

# Okabe and Ito's palette, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def read_curves(metrics: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Reads what the callback logged from a ``CSVLogger``'s ``metrics.csv``.

    Returns:
        By layer name, and ``"all"`` for all together, the pairs (step, sparsity).
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    with open(metrics, newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and (key == "autoprune/sparsity" or key.startswith("autoprune/sparsity/")):
                    name = key.removeprefix("autoprune/sparsity").removeprefix("/") or "all"
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return curves


def sparsity_curves(metrics: str | Path) -> Figure:
    """Draws every layer's sparsity, and that of all together, over the training steps.

    Args:
        metrics: a ``metrics.csv`` that a ``CSVLogger`` wrote.
    """
    from matplotlib.figure import Figure

    curves = read_curves(metrics)
    overall = curves.pop("all")
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ends = [*curves.items(), ("all", overall)]
    for i, (name, points) in enumerate(ends):
        steps, values = zip(*points, strict=True)
        colour = "black" if name == "all" else COLOURS[i % len(COLOURS)]
        label = f"{name}: {values[-1]:.2%}"
        axes.plot(steps, [100 * v for v in values], color=colour, lw=2.6 if name == "all" else 1.8, label=label)
    axes.set(xlabel="training step", ylabel="pruned weights (%)", ylim=(-2, 102), title="Sparsity of each layer")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="at the end")
    return figure
