"""The course of a run in a few kilobytes: each layer's sparsity, a metric, and how m was spread. Torch only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Histogram", "RunHistory", "best_points", "histogram"]

_ROWS = 256  # at most so many steps are kept

_LAYERS = 6  # of so many layers the spread of m is kept

Histogram = tuple[list[int], list[float]]

"""Counts, and the edges between them, one more."""


class RunHistory:
    """Remembers what the pictures of a run need, thinned out as the run gets longer.

    Attributes:
        metric: name of the metric that is followed; None before one is known.
        points: (step, sparsity, value) of that metric, in order.
        final: step from which on the masks are final, or that of the first point that says so; infinite before.
        histograms: how the auxiliary parameters of a few layers were spread when last looked at, by layer name.
        revived: number of weights that came back, of each layer, from log to log.

    Example:
        >>> history = RunHistory(["first", "last"])
        >>> history.add(0, [0.0, 0.0], 0.0)
        >>> history.add(50, [0.9, 0.5], 0.8)
        >>> history.curves["last"], history.curves["all"]
        ([(0, 0.0), (50, 0.5)], [(0, 0.0), (50, 0.8)])
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = list(names)
        self.metric: str | None = None
        self.points: list[tuple[int, float, float]] = []
        self.final = math.inf
        self.histograms: dict[str, Histogram] = {}
        self.revived = [0] * len(self.names)
        self._steps: list[int] = []
        self._rows: list[list[float]] = []
        self._stride, self._count = 1, 0

    def add(self, step: int, layers: Sequence[float], overall: float, *, always: bool = False) -> None:
        """Takes the sparsity of each layer and of all; every second one goes when there are too many.

        Args:
            step: number of training steps that are over.
            layers: sparsity of each layer, in [0, 1], in the order of the names.
            overall: sparsity of all together.
            always: whether this one is kept whatever the interval.
        """
        if self._steps[-1:] == [step]:
            return
        if always or self._count % self._stride == 0:
            self._steps.append(step)
            self._rows.append([*layers, overall])
        self._count += 1
        if len(self._steps) > _ROWS:
            self._steps, self._rows, self._stride = self._steps[::2], self._rows[::2], 2 * self._stride

    def extend(self, names: Sequence[str]) -> None:
        """Takes in layers that have not been pruned so far; ``names`` is the order of all from now on."""
        places = {name: i for i, name in enumerate(self.names)}
        order = [places.get(name) for name in names]
        self._rows = [[*(0.0 if i is None else row[i] for i in order), row[-1]] for row in self._rows]
        self.revived = [0 if i is None else self.revived[i] for i in order]
        self.names = list(names)

    def measure(self, metric: str, step: int, sparsity: float, value: float, final: bool = False) -> None:
        """Takes the value of the metric that is followed; every second one, the best aside, goes when too many.

        Args:
            metric: its name.
            step: that Lightning's loggers have the value at.
            sparsity: of all layers together.
            value: of the metric.
            final: whether the masks are final.
        """
        self.final = min(self.final, step) if final else math.inf
        if metric != self.metric:
            self.metric, self.points = metric, []
        if not self.points or self.points[-1][0] != step:
            self.points.append((step, sparsity, value))
        if len(self.points) > _ROWS:
            last, since = len(self.points) - 1, sum(point[0] < self.final for point in self.points)
            best = {
                start + i
                for start in (0, since)
                for mode in ("min", "max")
                for i in best_points(self.points[start:], mode)
            }
            self.points = [p for i, p in enumerate(self.points) if i % 2 == 0 or i == last or i in best]

    def look_at(self, auxiliary: Mapping[str, Tensor]) -> None:
        """Takes how M is spread in a few layers, the first and the last among them."""
        names = list(auxiliary)
        count = min(len(names), _LAYERS)
        chosen = {names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)}
        self.histograms = {name: histogram(auxiliary[name]) for name in names if name in chosen}

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """By layer name, and ``"all"``, the pairs (step, sparsity): what the plots take."""
        columns = zip(*self._rows, strict=True)
        names = [*self.names, "all"]
        return {name: list(zip(self._steps, column, strict=True)) for name, column in zip(names, columns, strict=False)}

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types and tensors."""
        return {
            "names": self.names,
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "rows": torch.tensor(self._rows, dtype=torch.float64),
            "thinned": (self._stride, self._count),
            "metric": self.metric,
            "points": list(self.points),
            "final": self.final,
            "histograms": dict(self.histograms),
            "revived": list(self.revived),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> RunHistory:
        """What :meth:`state_dict` gave."""
        history = cls(state["names"])
        history._steps, history._rows = state["steps"].tolist(), state["rows"].tolist()
        history._stride, history._count = state["thinned"]
        history.metric, history.points = state["metric"], [tuple(point) for point in state["points"]]
        history.final = state.get("final", math.inf)  # files of earlier versions have none
        history.histograms, history.revived = dict(state["histograms"]), list(state["revived"])
        return history


def best_points(points: Sequence[tuple[int, float, float]], mode: str) -> set[int]:
    """The places of the points of which no other is as sparse and better.

    Args:
        points: (step, sparsity, value); values that are not finite are never the best.
        mode: ``"min"`` where small values are good, else ``"max"``.

    Example:
        >>> sorted(best_points([(1, 0.0, 0.3), (2, 0.5, 0.4), (3, 0.9, 0.8), (4, 0.9, 0.5)], "min"))
        [0, 1, 3]
    """
    cost = {i: value if mode == "min" else -value for i, (_, _, value) in enumerate(points) if math.isfinite(value)}
    found, least = set(), math.inf
    for i in sorted(cost, key=lambda i: (-points[i][1], cost[i])):
        if cost[i] < least:
            found.add(i)
            least = cost[i]
    return found


def histogram(M: Tensor, bins: int = 60) -> Histogram:
    """How entries are spread: at most ``bins`` + 2 counts, and edges one of which is 0.

    An edge belongs to the bin on its left, as m = 0 is pruned.

    Example:
        >>> histogram(torch.tensor([-1.0, 0.0, 0.25, 1.0]), bins=4)
        ([1, 1, 1, 1], [-1.0, -0.5, 0.0, 0.5, 1.0])
    """
    m = M.detach().flatten().float().cpu()
    low, high = min(float(m.min()), 0.0), max(float(m.max()), 0.0)
    width = (high - low) / bins or 1.0
    first, last = min(math.floor(low / width), -1), math.ceil(high / width)
    edges = torch.arange(first, last + 1, dtype=torch.float64) * width
    counts = torch.histogram(-m, -edges.float().flip(0)).hist.flip(0)  # its bins have their left edges
    return [int(n) for n in counts], edges.tolist()
