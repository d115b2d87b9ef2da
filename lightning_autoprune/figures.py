"""Pictures and tables of the run for the loggers that can take them. Nothing of it can stop a training."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import WarningCache, rank_zero_warn

from lightning_autoprune.history import History
from lightning_autoprune.plots import metric_path, sparsity_heatmap
from lightning_autoprune.summary import LayerSummary, as_table, total

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_figures"]

_once = WarningCache()


def log_figures(
    trainer: Trainer, step: int, rows: Sequence[LayerSummary], history: History, best: Mapping[str, float] | None = None
) -> None:
    """Hands each logger what it can take: a ``WandbLogger`` and a ``TensorBoardLogger`` all, a ``CSVLogger`` the table.

    These are, under ``autoprune/``, after the logger's own ``prefix``: ``sparsity_map`` (layers × steps), ``layers`` (a
    table), ``m/<layer>`` (how M is spread, of a few layers) and ``path`` (the metric that is followed against the
    sparsity). The summary of a W&B run gets ``final_sparsity``, ``final_compression`` and the best values. The table of
    a ``CSVLogger`` is ``autoprune_layers.csv`` beside its ``metrics.csv``. A failure is a warning; so are pictures that
    matplotlib is missing for.

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

                log_to_wandb(logger, _root(logger), step, rows, history, _heatmap(history), best)
            elif isinstance(logger, TensorBoardLogger):
                _log_to_tensorboard(logger.experiment, _root(logger), step, rows, history)
            elif isinstance(logger, CSVLogger):
                _write_table(logger.log_dir, rows)
        except Exception as error:
            rank_zero_warn(
                f"The figures of the pruning were not logged by {type(logger).__name__}:"
                f" {type(error).__name__}: {error}"
            )


def _root(logger: WandbLogger | TensorBoardLogger) -> str:
    """What names begin with: as Lightning's loggers have it for the scalars."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}autoprune" if logger._prefix else "autoprune"


def _heatmap(history: History) -> Figure | None:
    return sparsity_heatmap(history.curves) if _can_draw() and history.curves else None


def _can_draw() -> bool:
    """Whether matplotlib is there; the figures that need it are left out without."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        _once.warn(
            "The loggers get the figures of the pruning without its pictures, which need matplotlib: pip install"
            " 'lightning-autoprune[plots]'."
        )
        return False
    return True


def _log_to_tensorboard(writer: Any, root: str, step: int, rows: Sequence[LayerSummary], history: History) -> None:
    if (heatmap := _heatmap(history)) is not None:
        writer.add_figure(f"{root}/sparsity_map", heatmap, step)
    if history.metric and history.points and _can_draw():
        path = [(sparsity, value) for _, sparsity, value in history.points]
        writer.add_figure(f"{root}/path", metric_path(path, history.metric), step)
    head, cells = as_table([*rows, total(rows)])
    lines = [head, ["---"] * len(head), *cells]
    writer.add_text(f"{root}/layers", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
    for name, (counts, edges) in history.histograms.items():
        centres = [(a + b) / 2 for a, b in pairwise(edges)]
        writer.add_histogram_raw(
            f"{root}/m/{name}",
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(n * c for n, c in zip(counts, centres, strict=True)),
            sum_squares=sum(n * c * c for n, c in zip(counts, centres, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )


def _write_table(folder: str, rows: Sequence[LayerSummary]) -> None:
    files = get_filesystem(folder)  # it may be a remote one
    files.makedirs(folder, exist_ok=True)
    with files.open(os.path.join(folder, "autoprune_layers.csv"), "w", newline="") as file:
        writer = csv.DictWriter(
            file, ["name", "shape", "weights", "kept", "sparsity", "flops", "flops_kept", "revived"]
        )
        writer.writeheader()
        for row in rows:
            writer.writerow({**row.as_dict(), "shape": "x".join(map(str, row.shape))})
