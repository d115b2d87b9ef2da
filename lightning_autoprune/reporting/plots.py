"""Pictures of a pruning run, as matplotlib figures, in colors that color-blind people can tell apart."""

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
    from matplotlib.lines import Line2D
from lightning_autoprune.errors import AutoPruneError, check_range
from lightning_autoprune.reporting.metric_names import LAYER_SPARSITY, SPARSITY
from lightning_autoprune.reporting.run_history import Histogram, MetricPoint, compute_histogram, find_pareto_front

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

"""Pairs (training step, sparsity in [0, 1]) by layer name, and under ``"all"`` for all layers together."""

# Okabe and Ito, "Color universal design", 2008
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")

_DASHES = ("-", "--", ":", "-.")

_LAST_VALUE = "last value"  # title of the legends that show each curve's last value


def read_curves(metrics: str | os.PathLike[str]) -> dict[str, list[tuple[int, float]]]:
    """Read the curves that the callback logged from the ``metrics.csv`` of a ``CSVLogger``.

    Args:
        metrics: path of the file.

    Returns:
        Pairs (step, sparsity) by layer name, and under ``"all"`` for all layers together. With ``log_layers=False``
        there is only ``"all"``.

    Raises:
        AutoPruneError: if the file has no curves.
        OSError: if it can't be read.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    with open(metrics, newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                name = "all" if key == SPARSITY else key.removeprefix(f"{LAYER_SPARSITY}/")
                if value and name != key:
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    if not curves:
        raise AutoPruneError(f"{metrics} has no column `{SPARSITY}`: no AutoPruneCallback has logged to it.")
    return curves


def sparsity_curves(curves: Curves) -> Figure:
    """Draw the sparsity of every layer and of all layers together over the training steps.

    More than 28 layers can't be told apart by color and dashes. They are drawn in gray without their names;
    :func:`sparsity_heatmap` shows the names.

    Args:
        curves: from :func:`read_curves` or ``callback.curves``.

    Raises:
        AutoPruneError: if no layer has a point, or matplotlib is not installed.

    Example:
        >>> figure = sparsity_curves({"first": [(0, 0.0), (50, 0.9)], "all": [(0, 0.0), (50, 0.8)]})
        >>> figure.axes[0].get_ylabel()
        'pruned weights (%)'
    """
    curves = _require_points(curves)
    figure, axes = _new_figure(7.5, 4.2)
    names = [name for name in curves if name != "all"] + ["all"] * ("all" in curves)
    layers = len(names) - ("all" in curves)
    anonymous = layers > len(COLORS) * len(_DASHES)
    legend_lines: dict[str, Line2D] = {}
    for i, name in enumerate(names):
        steps, values = zip(*curves[name], strict=True)
        marker = "o" if len(steps) == 1 else ""  # a line through a single point is invisible
        label = f"{name}: {values[-1]:.2%}"
        (line,) = axes.plot(steps, [100 * v for v in values], lw=1.8, marker=marker, label=label)
        line.set(color=COLORS[i % len(COLORS)], linestyle=_DASHES[i // len(COLORS) % len(_DASHES)])
        if name == "all":
            line.set(color="black", linestyle="-", linewidth=2.6)
        elif anonymous:
            label = f"each of {layers} layers"
            line.set(color="0.6", linestyle="-", linewidth=0.8)
        legend_lines.setdefault(label, line)
    _style_axes(axes, "Sparsity of each layer", "training step", "pruned weights (%)")
    axes.set_ylim(-2, 102)
    if anonymous or len(names) <= 8:
        _add_legend(axes, legend_lines, title=None if anonymous else _LAST_VALUE)
    else:
        columns = -(-len(names) // 24)
        letters = max(map(len, names)) + len(": 95.00%")
        figure.set_size_inches(6.8 + columns * (0.5 + 0.055 * letters), 4.2)
        _add_legend(figure, legend_lines, title=_LAST_VALUE, loc="outside right upper", fontsize=7, ncols=columns)
    return figure


def sparsity_heatmap(curves: Curves) -> Figure:
    """Draw sparsity as a map with one row per layer and one column per step, to show many layers at a glance.

    Args:
        curves: from :func:`read_curves` or ``callback.curves``; all layers have the same steps.

    Raises:
        AutoPruneError: if no layer has a point, or matplotlib is not installed.

    Example:
        >>> figure = sparsity_heatmap({"first": [(0, 0.0), (50, 0.9)], "last": [(0, 0.0), (50, 0.4)]})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['first', 'last']
    """
    curves = _require_points(curves)
    names = [name for name in curves if name != "all"]
    figure, axes = _new_figure(7.5, min(max(1.2 + 0.28 * len(names), 2), 16))
    label_interval = -(-len(names) // 110)  # there is room for 110 names
    steps = [step for step, _ in curves[names[0]]]
    edges = [steps[0], *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + 1]
    values = [[100 * value for _, value in curves[name]] for name in names]
    image = axes.pcolormesh(edges, range(len(names) + 1), values, cmap="cividis", vmin=0, vmax=100)
    axes.set_yticks([i + 0.5 for i in range(0, len(names), label_interval)], names[::label_interval], fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Sparsity of each layer", xlabel="training step")
    figure.colorbar(image, label="pruned weights (%)")
    return figure


def input_survivors(weight: Tensor, shape: Sequence[int] | None = None) -> Figure:
    """Draw how many weights a first layer keeps for each of its inputs; an input with none is dead.

    Args:
        weight: weight of a linear layer, shape (outputs, inputs), or of a convolution, shape (outputs, inputs, height,
            width), with zeros where it is pruned.
        shape: (height, width) of the image that the inputs form; several channels are summed. None: for a linear
            layer the shape closest to a square, for a convolution the (height, width) of its kernel.

    Raises:
        AutoPruneError: if the inputs do not form such an image, or matplotlib is not installed.

    Example:
        >>> weight = torch.zeros(3, 4)
        >>> weight[:, :2] = 1
        >>> input_survivors(weight, (2, 2)).axes[0].get_title()
        '2 of 4 inputs are dead'
    """
    if weight.dim() < 2:
        raise AutoPruneError(f"The weight has shape {tuple(weight.shape)}; it must be (outputs, inputs, …).")
    kept = (weight.detach() != 0).sum(0).cpu()
    shape = tuple(shape or (kept.shape[1:] if kept.dim() == 3 else _squarest_shape(kept.numel())))
    if len(shape) != 2 or min(shape) < 1 or kept.numel() % math.prod(shape):
        raise AutoPruneError(
            f"{kept.numel()} inputs do not form images of `shape` {shape}: give (height, width), whose product times"
            " the number of channels is the number of inputs."
        )
    image = kept.reshape(-1, *shape).sum(0)
    figure, axes = _new_figure(4.4, 3.8)
    from matplotlib import colormaps

    most = max(int(image.max()), 1)
    dead_as_nan = image.double().where(image > 0, torch.nan).numpy()
    picture = axes.imshow(dead_as_nan, cmap=colormaps["cividis"].with_extremes(bad="white"), vmin=0, vmax=most)
    axes.set(title=f"{int((image == 0).sum())} of {image.numel()} inputs are dead", xticks=[], yticks=[])
    axes.set_xlabel("white: dead")
    figure.colorbar(picture, label="weights kept per input")
    return figure


def auxiliary_histograms(auxiliary: Mapping[str, Tensor | Histogram]) -> Figure:
    """Draw a histogram of each layer's auxiliary parameters m; weights with m above 0 are kept.

    Args:
        auxiliary: by layer name, M of any shape, or its histogram (counts, edges) with one edge at 0.

    Raises:
        AutoPruneError: if there are none, or matplotlib is not installed.

    Example:
        >>> len(auxiliary_histograms({"first": torch.linspace(-1, 1, 50)}).axes)
        1
    """
    if not auxiliary:
        raise AutoPruneError("There are no auxiliary parameters to draw: they exist only while masks are trained.")
    columns = min(len(auxiliary), 3)
    rows = -(-len(auxiliary) // columns)
    figure = _new_empty_figure(3.2 * columns, 2.6 * rows)
    for i, (name, M) in enumerate(auxiliary.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        counts, edges = compute_histogram(M) if isinstance(M, Tensor) else M
        kept = [left >= 0 for left in edges[:-1]]
        colors = [COLORS[0] if k else COLORS[1] for k in kept]
        axes.bar(edges[:-1], counts, [b - a for a, b in pairwise(edges)], align="edge", color=colors)
        axes.axvline(0, color="black", lw=1)
        share = sum(count for count, k in zip(counts, kept, strict=True) if k) / max(sum(counts), 1)
        short_name = name if len(name) <= 34 else f"…{name[-33:]}"
        _style_axes(axes, f"{short_name}\n{share:.1%} kept", "m", "weights")
        axes.title.set_fontsize(9)
    return figure


def metric_path(points: Sequence[tuple[float, float]], metric: str) -> Figure:
    """Draw a metric against the sparsity at which it was measured, in the order of the run.

    Args:
        points: pairs (sparsity in [0, 1], value), in the order of the run.
        metric: name of the metric.

    Raises:
        AutoPruneError: if there are no points, or matplotlib is not installed.

    Example:
        >>> metric_path([(0.0, 0.9), (0.5, 0.92), (0.9, 0.91)], "val_accuracy").axes[0].get_ylabel()
        'val_accuracy'
    """
    if not points:
        raise AutoPruneError(f"There is no point to draw: {metric!r} has not been measured.")
    figure, axes = _new_figure(6, 4)
    x, y = [100 * sparsity for sparsity, _ in points], [value for _, value in points]
    axes.plot(x, y, "o-", color=COLORS[0], ms=4, lw=1.2, label="validations, in order")
    axes.plot(x[-1], y[-1], "D", color=COLORS[5], ms=8, label=f"the last: {y[-1]:.4g} at {x[-1] / 100:.2%}")
    _style_axes(axes, f"{metric} during the run", "pruned weights (%)", metric)
    axes.legend(frameon=False)
    return figure


def pareto(runs: Mapping[str, tuple[float, float]], metric: str = "error", *, lower_is_better: bool = True) -> Figure:
    """Draw several runs by compression and quality, with the Pareto front of the runs that no other run beats in both.

    Args:
        runs: pairs (sparsity in [0, 1), value), by name of the run.
        metric: name of the value.
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
    figure, axes = _new_figure(6.5, 4.4)
    for name, (sparsity, _) in runs.items():
        check_range(f"sparsity of {name}", sparsity, 0, 1, high_open=True)
    points = [(1 / (1 - sparsity), value) for sparsity, value in runs.values()]
    best = find_pareto_front([MetricPoint(0, *run) for run in runs.values()], "min" if lower_is_better else "max")
    front = sorted((points[i] for i in best), reverse=True)
    for name, (x, value) in zip(runs, points, strict=True):
        axes.plot(x, value, "o", color=COLORS[0] if (x, value) in front else "0.6", ms=7)
        axes.annotate(name, (x, value), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.plot(*zip(*front, strict=True), color=COLORS[5], lw=1.5, zorder=0, label="Pareto front")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}×" if f"{x:.0e}"[0] in "235" else "")
    axes.tick_params(axis="x", which="both", length=3)
    _style_axes(axes, f"Compression and {metric}", "compression of the prunable weights", metric)
    axes.legend(frameon=False)
    return figure


def _new_empty_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AutoPruneError("Pictures need matplotlib: pip install 'lightning-autoprune[plots]'.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _new_empty_figure(width, height)
    return figure, figure.add_subplot()


def _style_axes(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(parent: Axes | Figure, lines: Mapping[str, Line2D], title: str | None, **options: Any) -> None:
    """Add a legend of lines by label, including labels that begin with an underscore."""
    # matplotlib may skip labels that begin with an underscore, so it gets numbers first.
    numbers = list(map(str, range(len(lines))))
    legend = parent.legend(list(lines.values()), numbers, frameon=False, title=title, **options)
    for text, label in zip(legend.get_texts(), lines, strict=True):
        text.set_text(label)


def _require_points(curves: Curves) -> Curves:
    """Return the curves that have points; raise unless a layer is among them."""
    nonempty = {name: points for name, points in curves.items() if points}
    if not nonempty.keys() - {"all"}:
        raise AutoPruneError("There is no point to draw: no layer's sparsity has been logged.")
    return nonempty


def _squarest_shape(count: int) -> tuple[int, int]:
    height = next((n for n in range(math.isqrt(count), 0, -1) if count % n == 0), 1)
    return height, count // height
