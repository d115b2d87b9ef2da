"""Figures for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_autoprune.reporting.layer_table import LayerSummary, format_layer_table, sum_layers
from lightning_autoprune.reporting.plots import metric_path
from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.training.loggers.pictures import _can_draw, _heatmap

__all__ = ["_log_to_tensorboard"]


def _log_to_tensorboard(writer: Any, root: str, step: int, rows: Sequence[LayerSummary], history: RunHistory) -> None:
    if (heatmap := _heatmap(history)) is not None:
        writer.add_figure(f"{root}/sparsity_map", heatmap, step)
    if history.metric and history.points and _can_draw():
        path = [(sparsity, value) for _, sparsity, value in history.points]
        writer.add_figure(f"{root}/path", metric_path(path, history.metric), step)
    head, cells = format_layer_table([*rows, sum_layers(rows)])
    lines = [head, ["---"] * len(head), *cells]
    writer.add_text(f"{root}/layers", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
    for name, (counts, edges) in history.histograms.items():
        centers = [(a + b) / 2 for a, b in pairwise(edges)]
        writer.add_histogram_raw(
            f"{root}/m/{name}",
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(n * c for n, c in zip(counts, centers, strict=True)),
            sum_squares=sum(n * c * c for n, c in zip(counts, centers, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )
