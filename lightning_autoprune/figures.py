"""Pictures and tables of the run for the loggers that can take them. Nothing of it can stop a training."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_autoprune.history import History
from lightning_autoprune.plots import metric_path, sparsity_heatmap
from lightning_autoprune.summary import LayerSummary, as_table, total

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_figures"]


def log_figures(
    trainer: Trainer, step: int, rows: Sequence[LayerSummary], history: History, best: Mapping[str, float] | None = None
) -> None:
    """Hands each logger what it can take: a ``WandbLogger`` and a ``TensorBoardLogger`` all, a ``CSVLogger`` the table.

    These are, under ``autoprune/``: ``sparsity_map`` (layers × steps), ``layers`` (a table), ``m/<layer>`` (how M is
    spread, of a few layers) and ``path`` (the metric that is followed against the sparsity). The summary of a W&B run
    gets ``final_sparsity``, ``final_compression`` and the best values. The table of a ``CSVLogger`` is
    ``autoprune_layers.csv`` beside its ``metrics.csv``. A failure is a warning.

    Args:
        trainer: the trainer, on its first process.
        step: number of training steps that are over.
        rows: the layers.
        history: the run so far.
        best: best values of the monitored metric, by name, when fitting ends; None before.
    """
    for logger in trainer.loggers:
        try:
            if isinstance(logger, WandbLogger):
                from lightning_autoprune._wandb import log_figures as log_to_wandb

                log_to_wandb(logger, step, rows, history, _heatmap(history), best)
            elif isinstance(logger, TensorBoardLogger):
                _log_to_tensorboard(logger.experiment, step, rows, history)
            elif isinstance(logger, CSVLogger):
                _write_table(Path(logger.log_dir) / "autoprune_layers.csv", rows)
        except Exception as error:
            rank_zero_warn(
                f"The figures of the pruning were not logged by {type(logger).__name__}:"
                f" {type(error).__name__}: {error}"
            )


def _heatmap(history: History) -> Figure | None:
    return sparsity_heatmap(history.curves) if _can_draw() and history.curves else None


def _can_draw() -> bool:
    """Whether matplotlib is there; the figures that need it are left out without."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _log_to_tensorboard(writer: Any, step: int, rows: Sequence[LayerSummary], history: History) -> None:
    if (heatmap := _heatmap(history)) is not None:
        writer.add_figure("autoprune/sparsity_map", heatmap, step)
    if history.metric and history.points and _can_draw():
        path = [(sparsity, value) for _, sparsity, value in history.points]
        writer.add_figure("autoprune/path", metric_path(path, history.metric), step)
    head, cells = as_table([*rows, total(rows)])
    lines = [head, ["---"] * len(head), *cells]
    writer.add_text("autoprune/layers", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
    for name, (counts, edges) in history.histograms.items():
        centres = [(a + b) / 2 for a, b in pairwise(edges)]
        writer.add_histogram_raw(
            f"autoprune/m/{name}",
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(n * c for n, c in zip(counts, centres, strict=True)),
            sum_squares=sum(n * c * c for n, c in zip(counts, centres, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )


def _write_table(path: Path, rows: Sequence[LayerSummary]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["name", "shape", "weights", "kept", "sparsity", "flops", "flops_kept", "revived"]
        )
        writer.writeheader()
        for row in rows:
            writer.writerow({**row.as_dict(), "shape": "x".join(map(str, row.shape))})
