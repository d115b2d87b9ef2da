"""The user's metric that is followed alongside the sparsity: the one that their other callbacks monitor."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.training.lightning_internals import metric_logs
from lightning_autoprune.training.lightning_package import Callback, EarlyStopping, ModelCheckpoint, Trainer, both

__all__ = ["HELD_OUT_LOSS", "best_values", "followed_metric"]

HELD_OUT_LOSS = "autoprune/held_out_loss"


def followed_metric(trainer: Trainer, known: str | None, *, late: bool = False) -> tuple[str, float] | None:
    """Return the name and the value of the metric to follow; None if there is none, or if it has no new value.

    It is the first metric that a ``ModelCheckpoint`` or ``EarlyStopping`` monitors, that the user logs, and that has a
    value. If nothing is monitored, it is the first metric whose name begins with ``val``.

    Args:
        trainer: the trainer, when a validation or a training epoch ends.
        known: the metric that has been followed so far. Monitored metrics that come after it in the order are not
            considered: after resuming, ``known`` may just not have been logged yet.
        late: whether the hooks of the epoch's end, which may log the metric too, have run.
    """
    metrics = trainer.callback_metrics
    candidates = list(_monitored_metrics(trainer)) or [key for key in metrics if key.startswith("val")][:1]
    if known in candidates:
        candidates = candidates[: candidates.index(known) + 1]
    name = next((name for name in candidates if name in metrics), None)
    if name is None or not _is_new(trainer, name, late):
        return None
    value = metrics[name]
    return (name, float(value)) if isinstance(value, Tensor) and value.numel() == 1 else None


def best_values(trainer: Trainer, history: RunHistory) -> dict[str, float]:
    """Return the best value of the followed metric, and the best since the masks have been final.

    Args:
        trainer: the trainer, whose callbacks tell whether small values are good.
        history: the measured values.

    Returns:
        ``best_<metric>`` and ``best_pruned_<metric>``, each only if there is such a value; empty if the metric is not
        monitored.
    """
    mode = _monitored_metrics(trainer).get(history.metric or "")
    if mode is None:
        return {}
    best = min if mode == "min" else max
    points = [(step, value) for step, _, value in history.points if math.isfinite(value)]
    values_by_name = {
        f"best_{history.metric}": [value for _, value in points],
        f"best_pruned_{history.metric}": [value for step, value in points if step >= history.masks_final_at],
    }
    return {name: best(values) for name, values in values_by_name.items() if values}


def _monitored_metrics(trainer: Trainer) -> dict[str, str]:
    """Return the user's monitored metrics in the order of the callbacks, each with its mode, ``"min"`` or ``"max"``."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    modes: dict[str, str] = {}
    for callback in callbacks:
        if isinstance(callback, (both(ModelCheckpoint), both(EarlyStopping))):
            name = callback.monitor
            if name and not name.startswith("autoprune/"):
                modes.setdefault(name, callback.mode)
    return modes


def _is_new(trainer: Trainer, name: str, late: bool) -> bool:
    """Return True if the loop that ends has logged a metric.

    While a validation ends, values of training metrics are one epoch old.
    """
    loop = trainer.fit_loop.epoch_loop
    validation_logs, training_logs = metric_logs(loop.val_loop, name), metric_logs(loop, name)
    if not validation_logs and not training_logs:  # the user has set the value by hand
        return trainer.validating or not trainer.enable_validation
    logs = validation_logs if trainer.validating else training_logs
    if not trainer.validating and validation_logs:  # taken when the validation ended
        return False
    if late:
        return any(log.meta.fx == "on_train_epoch_end" for log in logs)
    return any(not log.has_reset for log in logs)
