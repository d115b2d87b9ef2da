"""The callback's settings in each logger, so that a run says how it was pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_autoprune.training.lightning_internals import logged_hyperparameters, logger_key
from lightning_autoprune.training.lightning_package import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    Trainer,
    WandbLogger,
    both,
)

__all__ = ["log_settings", "stage_settings"]

_ROOT = "autoprune_callback"  # not "autoprune", which may be a hyperparameter of the user's own

_ADDING = (
    *both(CSVLogger),
    *both(MLFlowLogger),
    *both(WandbLogger),
)  # they add hyperparameters to those that they have


def stage_settings(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Hand the settings to loggers that write their hyperparameters once, before Lightning logs the module's.

    A ``TensorBoardLogger`` writes ``hparams.yaml`` when Lightning first saves it, be it to validate, and never again.

    Args:
        trainer: the trainer, before Lightning logs hyperparameters.
        settings: as for :func:`log_settings`.
    """

    def stage(logger: Logger) -> None:
        if isinstance(logger, both(TensorBoardLogger)):
            for name, value in _name_hyperparameters(settings).items():
                logger.hparams.setdefault(name, value)

    _for_each_logger(trainer, stage)


def log_settings(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Log the settings as hyperparameters, beside those of the module, which Lightning has logged before.

    Their names begin with ``autoprune_callback/``. TensorBoard gets them in ``hparams.yaml``, see
    :func:`stage_settings`, and as a text: it shows only the first hyperparameters of a run, which must be the module's.

    If a logger fails, a warning says so. MLflow does, for example, if a run goes on with other settings. With
    ``Trainer(enable_autolog_hparams=False)`` nothing is logged. A logger that may replace the hyperparameters that it
    has gets those of the module again, together with the settings.

    Args:
        trainer: the trainer, once Lightning has logged hyperparameters.
        settings: the settings by name, as plain data.
    """

    def log(logger: Logger) -> None:
        if isinstance(logger, both(TensorBoardLogger)):
            logger.experiment.add_text(logger_key(logger, "autoprune/settings"), _markdown_table(settings))
            return
        known = {} if isinstance(logger, _ADDING) else logged_hyperparameters(trainer)
        logger.log_hyperparams({**known, **_name_hyperparameters(settings)})
        logger.save()

    _for_each_logger(trainer, log)


def _for_each_logger(trainer: Trainer, do: Callable[[Logger], None]) -> None:
    """Call a function with each logger, unless hyperparameters are not to be logged; an error becomes a warning."""
    if not trainer.enable_autolog_hparams:
        return
    for logger in trainer.loggers:
        try:
            do(logger)
        except Exception as error:
            rank_zero_warn(
                f"The settings of the pruning were not logged by {type(logger).__name__}, and training goes on:"
                f" {type(error).__name__}: {error}"
            )


def _name_hyperparameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{_ROOT}/{name}": value for name, value in settings.items()}


def _markdown_table(settings: Mapping[str, Any]) -> str:
    lines = [f"| `{name}` | `{value}` |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])
