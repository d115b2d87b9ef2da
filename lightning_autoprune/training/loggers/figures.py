"""Hands pictures and tables of the run to the loggers that can take them; an error in one never stops the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_autoprune.reporting.layer_table import LayerSummary
from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.training.lightning_package import (
    CSVLogger,
    Logger,
    TensorBoardLogger,
    Trainer,
    WandbLogger,
    both,
)
from lightning_autoprune.training.loggers.csv import CSVFigures
from lightning_autoprune.training.loggers.figure_writer import FigureWriter, RunFigures
from lightning_autoprune.training.loggers.tensorboard import TensorBoardFigures
from lightning_autoprune.training.loggers.wandb import WandbFigures

__all__ = ["WRITERS", "log_figures"]

WRITERS: dict[type[Logger], FigureWriter[Any]] = {
    WandbLogger: WandbFigures(),
    TensorBoardLogger: TensorBoardFigures(),
    CSVLogger: CSVFigures(),
}
"""What writes the figures, by the class of the logger; subclasses included. Other loggers get no figures."""


def log_figures(
    trainer: Trainer,
    step: int,
    rows: Sequence[LayerSummary],
    history: RunHistory,
    best: Mapping[str, float] | None = None,
) -> None:
    """Log the figures of a run: all of them to W&B and TensorBoard, the table of the layers to a ``CSVLogger``.

    The figures are ``sparsity_map`` (layers × steps), ``layers`` (a table), ``m/<layer>`` (the distribution of M in a
    few layers) and ``path`` (the followed metric against the sparsity). Their names begin with ``autoprune/``, after
    the logger's own ``prefix``. When fitting has ended, the summary of a W&B run also gets ``final_sparsity``,
    ``final_compression`` and the best values. A ``CSVLogger`` gets the table as ``autoprune_layers.csv``, beside its
    ``metrics.csv``.

    If a logger fails, a warning says so. Without matplotlib the pictures are left out, with a warning.

    Args:
        trainer: the trainer, on its first process.
        step: number of training steps that are over.
        rows: one row per layer.
        history: the run so far.
        best: best values of the followed metric by name, once fitting has ended; None before.
    """
    figures = RunFigures(step, rows, history, best)
    for logger in trainer.loggers:
        try:
            if writer := _find_writer(logger):
                writer.log(logger, figures)
        except Exception as error:
            rank_zero_warn(
                f"The figures of the pruning were not logged by {type(logger).__name__}:"
                f" {type(error).__name__}: {error}"
            )


def _find_writer(logger: Logger) -> FigureWriter[Any] | None:
    return next((writer for kind, writer in WRITERS.items() if isinstance(logger, both(kind))), None)
