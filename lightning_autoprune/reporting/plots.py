"""Pictures of a pruned run, as matplotlib figures. Colors that color-blind people can tell apart."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from lightning_autoprune.errors import AutoPruneError, check_range
from lightning_autoprune.reporting.run_history import Histogram, best_points, histogram

__all__ = [
    "COLORS",
    "Curves",
    "auxiliary_histograms",
    "input_survivors",
    "metric_path",
    "pareto",
    "read_curves",
    "sparsity_curves",
    "sparsity_heatmap",
]

Curves = Mapping[str, Sequence[tuple[int, float]]]

"""By layer name, and ``"all"`` for all layers together, the pairs (training step, sparsity in [0, 1])."""

# Okabe and Ito, "Color universal design", 2008
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")

_DASHES = ("-", "--", ":", "-.")


def read_curves(metrics: str | os.PathLike[str]) -> dict[str, list[tuple[int, float]]]:
    """Reads the curves that the callback logged from a ``CSVLogger``'s ``metrics.csv``.

    Args:
        metrics: path of the file.

    Returns:
        By layer name, and ``"all"``, the pairs (step, sparsity).

    Raises:
        AutoPruneError: if there are none in the file.
        OSError: if it can't be read.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    with open(metrics, newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and (key == "autoprune/sparsity" or key.startswith("autoprune/sparsity/")):
                    name = key.removeprefix("autoprune/sparsity").removeprefix("/") or "all"
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    if not curves:
        raise AutoPruneError(f"{metrics} has no column `autoprune/sparsity`: no AutoPruneCallback has logged to it.")
    return curves


def sparsity_curves(curves: Curves) -> Figure:
    """Draws every layer's sparsity, and that of all together, over the training steps.

    More than 28 lines can't be told apart: they are drawn alike, and :func:`sparsity_heatmap` has the names.

    Args:
        curves: of :func:`read_curves`, or ``callback.curves``.

    Raises:
        AutoPruneError: if there is no point in them, or matplotlib is not installed.

    Example:
        >>> figure = sparsity_curves({"first": [(0, 0.0), (50, 0.9)], "all": [(0, 0.0), (50, 0.8)]})
        >>> figure.axes[0].get_ylabel()
        'pruned weights (%)'
    """
    curves = _with_points(curves)
    figure, axes = _figure(7.5, 4.2)
    names = [name for name in curves if name != "all"] + ["all"] * ("all" in curves)
    layers = len(names) - ("all" in curves)
    alike = layers > len(COLORS) * len(_DASHES)
    entries: dict[str, Any] = {}  # of the legend, a line by what it says
    for i, name in enumerate(names):
        steps, values = zip(*curves[name], strict=True)
        marker = "o" if len(steps) == 1 else ""  # a single point has no line
        label = f"{name}: {values[-1]:.2%}"
        (line,) = axes.plot(steps, [100 * v for v in values], lw=1.8, marker=marker, label=label)
        line.set(color=COLORS[i % len(COLORS)], linestyle=_DASHES[i // len(COLORS) % len(_DASHES)])
        if name == "all":
            line.set(color="black", linestyle="-", linewidth=2.6)
        elif alike:
            label = f"each of {layers} layers"
            line.set(color="0.6", linestyle="-", linewidth=0.8)
        entries.setdefault(label, line)
    _style(axes, "Sparsity of each layer", "training step", "pruned weights (%)")
    axes.set_ylim(-2, 102)
    lines, texts = list(entries.values()), list(map(str, range(len(entries))))
    if alike or len(names) <= 8:
        legend = axes.legend(lines, texts, frameon=False, title=None if alike else "at the end")
    else:
        columns = -(-len(names) // 24)
        letters = max(map(len, names)) + len(": 95.00%")
        figure.set_size_inches(6.8 + columns * (0.5 + 0.055 * letters), 4.2)
        options: dict[str, Any] = {"frameon": False, "title": "at the end", "fontsize": 7, "ncols": columns}
        legend = figure.legend(lines, texts, loc="outside right upper", **options)
    for text, label in zip(legend.get_texts(), entries, strict=True):
        text.set_text(label)  # where labels begin with an underscore, matplotlib may leave them out
    return figure


def sparsity_heatmap(curves: Curves) -> Figure:
    """Draws sparsity as a map, a row a layer and a column a step: many layers at a glance.

    Args:
        curves: as of :func:`sparsity_curves`; all layers have the same steps.

    Raises:
        AutoPruneError: if there is no point in them, or matplotlib is not installed.

    Example:
        >>> figure = sparsity_heatmap({"first": [(0, 0.0), (50, 0.9)], "last": [(0, 0.0), (50, 0.4)]})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['first', 'last']
    """
    curves = _with_points(curves)
    names = [name for name in curves if name != "all"]
    figure, axes = _figure(7.5, min(max(1.2 + 0.28 * len(names), 2), 16))
    every = -(-len(names) // 110)  # so many names have room
    steps = [step for step, _ in curves[names[0]]]
    edges = [steps[0], *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + 1]
    values = [[100 * value for _, value in curves[name]] for name in names]
    image = axes.pcolormesh(edges, range(len(names) + 1), values, cmap="cividis", vmin=0, vmax=100)
    axes.set_yticks([i + 0.5 for i in range(0, len(names), every)], names[::every], fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Sparsity of each layer", xlabel="training step")
    figure.colorbar(image, label="pruned weights (%)")
    return figure


def input_survivors(weight: Tensor, shape: Sequence[int] | None = None) -> Figure:
    """Draws how many weights of a first layer are left for each input; an input without any is dead.

    Args:
        weight: of a linear layer, shape (outputs, inputs), or of a convolution, shape (outputs, inputs, height, width),
            with zeros where it is pruned.
        shape: (height, width) of the inputs as an image; several channels are summed. None: the most square one of a
            linear layer, (height, width) of a convolution's kernel.

    Raises:
        AutoPruneError: if the inputs don't make such an image, or matplotlib is not installed.

    Example:
        >>> weight = torch.zeros(3, 4)
        >>> weight[:, :2] = 1
        >>> input_survivors(weight, (2, 2)).axes[0].get_title()
        '2 of 4 inputs are dead'
    """
    if weight.dim() < 2:
        raise AutoPruneError(f"The weight has shape {tuple(weight.shape)}; it must be (outputs, inputs, …).")
    kept = (weight.detach() != 0).sum(0).cpu()
    shape = tuple(shape or (kept.shape[1:] if kept.dim() == 3 else _most_square(kept.numel())))
    if len(shape) != 2 or min(shape) < 1 or kept.numel() % math.prod(shape):
        raise AutoPruneError(
            f"{kept.numel()} inputs do not make images of `shape` {shape}: give (height, width), whose product times"
            " the number of channels is the number of inputs."
        )
    image = kept.reshape(-1, *shape).sum(0)
    figure, axes = _figure(4.4, 3.8)
    from matplotlib import colormaps

    most = max(int(image.max()), 1)
    shown = image.double().where(image > 0, torch.nan).numpy()
    picture = axes.imshow(shown, cmap=colormaps["cividis"].with_extremes(bad="white"), vmin=0, vmax=most)
    axes.set(title=f"{int((image == 0).sum())} of {image.numel()} inputs are dead", xticks=[], yticks=[])
    axes.set_xlabel("white: dead")
    figure.colorbar(picture, label="weights left for each input")
    return figure


def auxiliary_histograms(auxiliary: Mapping[str, Tensor | Histogram]) -> Figure:
    """Draws how each layer's auxiliary parameters m are spread; those above 0 are kept.

    Args:
        auxiliary: by layer name, M of any shape, or its histogram (counts, edges) with an edge at 0.

    Raises:
        AutoPruneError: if there are none, or matplotlib is not installed.

    Example:
        >>> len(auxiliary_histograms({"first": torch.linspace(-1, 1, 50)}).axes)
        1
    """
    if not auxiliary:
        raise AutoPruneError("There are no auxiliary parameters: before pruning starts, and once the masks are frozen.")
    columns = min(len(auxiliary), 3)
    rows = -(-len(auxiliary) // columns)
    figure, _ = _figure(3.2 * columns, 2.6 * rows, bare=True)
    for i, (name, M) in enumerate(auxiliary.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        counts, edges = histogram(M) if isinstance(M, Tensor) else M
        kept = [left >= 0 for left in edges[:-1]]
        colors = [COLORS[0] if k else COLORS[1] for k in kept]
        axes.bar(edges[:-1], counts, [b - a for a, b in pairwise(edges)], align="edge", color=colors)
        axes.axvline(0, color="black", lw=1)
        share = sum(n for n, k in zip(counts, kept, strict=True) if k) / max(sum(counts), 1)
        shown = name if len(name) <= 34 else f"…{name[-33:]}"
        _style(axes, f"{shown}\n{share:.1%} kept", "m", "weights")
        axes.title.set_fontsize(9)
    return figure


def metric_path(points: Sequence[tuple[float, float]], metric: str) -> Figure:
    """Draws a metric of the run against the sparsity that it was measured at, in the order of the run.

    Args:
        points: (sparsity in [0, 1], value), in order.
        metric: the name of the value.

    Raises:
        AutoPruneError: if there are no points, or matplotlib is not installed.

    Example:
        >>> metric_path([(0.0, 0.9), (0.5, 0.92), (0.9, 0.91)], "val_accuracy").axes[0].get_ylabel()
        'val_accuracy'
    """
    if not points:
        raise AutoPruneError(f"There is no point to draw: {metric!r} has not been measured.")
    figure, axes = _figure(6, 4)
    x, y = [100 * sparsity for sparsity, _ in points], [value for _, value in points]
    axes.plot(x, y, "o-", color=COLORS[0], ms=4, lw=1.2, label="validations, in order")
    axes.plot(x[-1], y[-1], "D", color=COLORS[5], ms=8, label=f"the last: {y[-1]:.4g} at {x[-1] / 100:.2%}")
    _style(axes, f"{metric} on the way", "pruned weights (%)", metric)
    axes.legend(frameon=False)
    return figure


def pareto(runs: Mapping[str, tuple[float, float]], metric: str = "error", *, lower_is_better: bool = True) -> Figure:
    """Draws runs by what is left and how good it is, and the front of those that no other run beats in both.

    Args:
        runs: (sparsity in [0, 1), value) by the name of the run.
        metric: the name of the value.
        lower_is_better: whether small values are good.

    Raises:
        AutoPruneError: if there are no runs, or matplotlib is not installed.

    Example:
        >>> figure = pareto({"a": (0.9, 1.5), "b": (0.95, 1.6), "c": (0.9, 1.7)})
        >>> [line.get_label() for line in figure.axes[0].lines][-1]
        'Pareto front'
    """
    if not runs:
        raise AutoPruneError("There are no runs to draw.")
    figure, axes = _figure(6.5, 4.4)
    for name, (sparsity, _) in runs.items():
        check_range(f"sparsity of {name}", sparsity, 0, 1, high_open=True)
    points = [(1 / (1 - sparsity), value) for sparsity, value in runs.values()]
    best = best_points([(0, *run) for run in runs.values()], "min" if lower_is_better else "max")
    front = sorted((points[i] for i in best), reverse=True)
    for name, (x, value) in zip(runs, points, strict=True):
        axes.plot(x, value, "o", color=COLORS[0] if (x, value) in front else "0.6", ms=7)
        axes.annotate(name, (x, value), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.plot(*zip(*front, strict=True), color=COLORS[5], lw=1.5, zorder=0, label="Pareto front")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}×" if f"{x:.0e}"[0] in "235" else "")
    axes.tick_params(axis="x", which="both", length=3)
    _style(axes, "Compression and what it costs", "compression of the prunable weights", metric)
    axes.legend(frameon=False)
    return figure


def _figure(width: float, height: float, bare: bool = False) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AutoPruneError("Pictures need matplotlib: pip install 'lightning-autoprune[plots]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, None if bare else figure.add_subplot()  # type: ignore[return-value]


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _with_points(curves: Curves) -> Curves:
    found = {name: points for name, points in curves.items() if points}
    if not found.keys() - {"all"}:
        raise AutoPruneError("There is no point to draw: no layer's sparsity has been logged.")
    return found


def _most_square(count: int) -> tuple[int, int]:
    height = next((n for n in range(math.isqrt(count), 0, -1) if count % n == 0), 1)
    return height, count // height
