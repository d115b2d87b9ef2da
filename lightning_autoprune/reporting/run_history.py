"""The course of a run in a few kilobytes: each layer's sparsity, a metric, and histograms of M."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Histogram", "MetricPoint", "RunHistory", "compute_histogram", "find_pareto_front"]

_MAX_POINTS = 256  # per curve; beyond that, every second point is dropped

_HISTOGRAM_LAYERS = 6  # so many layers have a histogram

Histogram = tuple[list[int], list[float]]

"""Counts, and the edges of their bins: one more edge than counts."""


class MetricPoint(NamedTuple):
    """One measurement of a metric.

    Attributes:
        step: training step of the measurement.
        sparsity: fraction of zeros among all prunable weights at that step, in [0, 1].
        value: value of the metric.
    """

    step: int
    sparsity: float
    value: float


class RunHistory:
    """What the pictures of a run are drawn from, thinned out as the run gets longer.

    Attributes:
        names: names of the layers.
        metric: name of the metric that is followed; None before one is known.
        points: measurements of that metric, in order.
        masks_final_at: step of the first measurement with final masks, or the step at which the masks became final;
            infinite before.
        histograms: histograms of a few layers' auxiliary parameters when last recorded, by layer name.
        revived: number of each layer's weights that came back, counted from log to log.

    Example:
        >>> history = RunHistory(["first", "last"])
        >>> history.record_sparsity(0, [0.0, 0.0], 0.0)
        >>> history.record_sparsity(50, [0.9, 0.5], 0.8)
        >>> history.curves["last"], history.curves["all"]
        ([(0, 0.0), (50, 0.5)], [(0, 0.0), (50, 0.8)])
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = list(names)
        self.metric: str | None = None
        self.points: list[MetricPoint] = []
        self.masks_final_at = math.inf
        self.histograms: dict[str, Histogram] = {}
        self.revived = [0] * len(self.names)
        self._steps: list[int] = []
        self._rows: list[list[float]] = []  # per step: the sparsity of each layer, then of all together
        self._interval, self._offered = 1, 0

    def record_sparsity(self, step: int, layers: Sequence[float], overall: float, *, always: bool = False) -> None:
        """Record the sparsity of each layer and of all; once there are too many steps, drop every second one.

        Args:
            step: number of completed training steps.
            layers: sparsity of each layer, in [0, 1], in the order of the names.
            overall: sparsity of all layers together.
            always: record this step even if it does not fall on the current interval.
        """
        if self._steps[-1:] == [step]:
            return
        if always or self._offered % self._interval == 0:
            self._steps.append(step)
            self._rows.append([*layers, overall])
        self._offered += 1
        if len(self._steps) > _MAX_POINTS:
            self._steps, self._rows, self._interval = self._steps[::2], self._rows[::2], 2 * self._interval

    def set_layers(self, names: Sequence[str]) -> None:
        """Set the names of all layers from now on: new ones were dense so far, and missing ones are removed."""
        places = {name: i for i, name in enumerate(self.names)}
        order = [places.get(name) for name in names]
        self._rows = [[*(0.0 if i is None else row[i] for i in order), row[-1]] for row in self._rows]
        self.revived = [0 if i is None else self.revived[i] for i in order]
        self.names = list(names)

    def record_metric(
        self, metric: str, step: int, sparsity: float, value: float, *, masks_final: bool = False
    ) -> None:
        """Record a metric; once there are too many points, drop every second one, except the best and the last.

        Args:
            metric: name of the metric; another name than before starts a new list of points.
            step: training step, as Lightning's loggers count it.
            sparsity: sparsity of all layers together, in [0, 1].
            value: value of the metric.
            masks_final: whether the masks are final.
        """
        self.masks_final_at = min(self.masks_final_at, step) if masks_final else math.inf
        if metric != self.metric:
            self.metric, self.points = metric, []
        if not self.points or self.points[-1].step != step:
            self.points.append(MetricPoint(step, sparsity, value))
        if len(self.points) > _MAX_POINTS:
            self._thin_points()

    def _thin_points(self) -> None:
        """Drop every second point, except the last, and the best of the run and of its part with final masks."""
        first_final = sum(point.step < self.masks_final_at for point in self.points)
        best = {
            start + i
            for start in (0, first_final)
            for mode in ("min", "max")
            for i in find_pareto_front(self.points[start:], mode)
        }
        last = len(self.points) - 1
        self.points = [point for i, point in enumerate(self.points) if i % 2 == 0 or i == last or i in best]

    def record_histograms(self, auxiliary: Mapping[str, Tensor]) -> None:
        """Compute the histograms of M in a few evenly spaced layers, including the first and the last."""
        names = list(auxiliary)
        count = min(len(names), _HISTOGRAM_LAYERS)
        chosen = {names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)}
        self.histograms = {name: compute_histogram(auxiliary[name]) for name in names if name in chosen}

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Pairs (step, sparsity) for the plots, by layer name, and under ``"all"`` for all layers together."""
        columns = zip(*self._rows, strict=True)
        names = [*self.names, "all"]
        return {name: list(zip(self._steps, column, strict=True)) for name, column in zip(names, columns, strict=False)}

    def state_dict(self) -> dict[str, Any]:
        """Return the whole history in plain types and tensors, which ``torch.load(weights_only=True)`` accepts."""
        return {
            "names": self.names,
            "steps": torch.tensor(self._steps, dtype=torch.int64, device="cpu"),
            "rows": torch.tensor(self._rows, dtype=torch.float64, device="cpu"),
            "thinned": (self._interval, self._offered),
            "metric": self.metric,
            "points": [tuple(point) for point in self.points],
            "final": self.masks_final_at,
            "histograms": dict(self.histograms),
            "revived": list(self.revived),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunHistory:
        """Restore a history from its :meth:`state_dict`."""
        history = cls(state["names"])
        history._steps, history._rows = state["steps"].tolist(), state["rows"].tolist()
        history._interval, history._offered = state["thinned"]
        history.metric, history.points = state["metric"], [MetricPoint(*point) for point in state["points"]]
        history.masks_final_at = state.get("final", math.inf)  # files of earlier versions lack it
        history.histograms, history.revived = dict(state["histograms"]), list(state["revived"])
        return history


def find_pareto_front(points: Sequence[MetricPoint], mode: str) -> set[int]:
    """Return the indices of the Pareto-optimal points: no other point is at least as sparse and at least as good.

    Of points with equal sparsity and value, only the first is returned.

    Args:
        points: measurements; those whose value is not finite are ignored.
        mode: ``"min"`` if small values are good, else ``"max"``.

    Example:
        >>> runs = [(1, 0.0, 0.3), (2, 0.5, 0.4), (3, 0.9, 0.8), (4, 0.9, 0.5)]
        >>> sorted(find_pareto_front([MetricPoint(*run) for run in runs], "min"))
        [0, 1, 3]
    """
    sign = 1 if mode == "min" else -1
    cost = {i: sign * point.value for i, point in enumerate(points) if math.isfinite(point.value)}
    front, least = set(), math.inf
    for i in sorted(cost, key=lambda i: (-points[i].sparsity, cost[i])):
        if cost[i] < least:
            front.add(i)
            least = cost[i]
    return front


def compute_histogram(M: Tensor, bins: int = 60) -> Histogram:
    """Count the entries in at most ``bins`` + 2 bins of equal width, with one edge at 0.

    An edge belongs to the bin on its left, since m = 0 is pruned.

    Example:
        >>> compute_histogram(torch.tensor([-1.0, 0.0, 0.25, 1.0]), bins=4)
        ([1, 1, 1, 1], [-1.0, -0.5, 0.0, 0.5, 1.0])
    """
    m = M.detach().flatten().float().cpu()
    low, high = min(float(m.min()), 0.0), max(float(m.max()), 0.0)
    width = (high - low) / bins or 1.0
    first, last = min(math.floor(low / width), -1), math.ceil(high / width)
    edges = torch.arange(first, last + 1, dtype=torch.float64, device="cpu") * width
    # torch.histogram gives an edge to the bin on its right: negated, an edge falls to the bin on its left.
    counts = torch.histogram(-m, -edges.float().flip(0)).hist.flip(0)
    return [int(count) for count in counts], edges.tolist()
