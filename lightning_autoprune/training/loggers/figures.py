"""Pictures and tables of the run for the loggers that can take them. Nothing of it can stop a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_autoprune.reporting.layer_table import LayerSummary
from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.training.loggers.csv import _write_table
from lightning_autoprune.training.loggers.pictures import _heatmap
from lightning_autoprune.training.loggers.tensorboard import _log_to_tensorboard

__all__ = ["log_figures"]


def log_figures(
    trainer: Trainer,
    step: int,
    rows: Sequence[LayerSummary],
    history: RunHistory,
    best: Mapping[str, float] | None = None,
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
                from lightning_autoprune.training.loggers.wandb import log_figures as log_to_wandb

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
