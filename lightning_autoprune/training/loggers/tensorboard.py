"""Figures for TensorBoard."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from typing_extensions import override

from lightning_autoprune.reporting.layer_table import LayerSummary, format_layer_table, sum_layers
from lightning_autoprune.reporting.run_history import Histogram
from lightning_autoprune.training.lightning_internals import logger_key
from lightning_autoprune.training.lightning_package import TensorBoardLogger
from lightning_autoprune.training.loggers.figure_writer import LAYERS, PATH, SPARSITY_MAP, FigureWriter, RunFigures

__all__ = ["TensorBoardFigures"]


class TensorBoardFigures(FigureWriter[TensorBoardLogger]):
    """Writes images of the pictures, the table as Markdown, and the histograms."""

    @override
    def log(self, logger: TensorBoardLogger, figures: RunFigures) -> None:
        writer, root = logger.experiment, logger_key(logger, "autoprune")
        for name, picture in ((SPARSITY_MAP, figures.draw_sparsity_map()), (PATH, figures.draw_path())):
            if picture is not None:
                writer.add_figure(f"{root}/{name}", picture, figures.step)
        writer.add_text(
            f"{root}/{LAYERS}", _markdown_table([*figures.layers, sum_layers(figures.layers)]), figures.step
        )
        for name, histogram in figures.histograms.items():
            _add_histogram(writer, f"{root}/{name}", histogram, figures.step)


def _markdown_table(layers: list[LayerSummary]) -> str:
    head, cells = format_layer_table(layers)
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _add_histogram(writer: Any, name: str, histogram: Histogram, step: int) -> None:
    """Add a histogram whose entries are taken to lie at the centers of their bins."""
    counts, edges = histogram
    centers = [(a + b) / 2 for a, b in pairwise(edges)]
    writer.add_histogram_raw(
        name,
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(n * c for n, c in zip(counts, centers, strict=True)),
        sum_squares=sum(n * c * c for n, c in zip(counts, centers, strict=True)),
        bucket_limits=edges[1:],
        bucket_counts=counts,
        global_step=step,
    )
