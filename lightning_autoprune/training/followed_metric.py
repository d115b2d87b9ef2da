"""The user's metric that is followed beside the sparsity: the one that their other callbacks monitor."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_autoprune.reporting.run_history import RunHistory

__all__ = ["HELD_OUT_LOSS", "best_values", "followed_metric"]

HELD_OUT_LOSS = "autoprune/held_out_loss"


def followed_metric(trainer: Trainer, known: str | None, *, late: bool = False) -> tuple[str, float] | None:
    """The name and the value of the metric to follow; None where there is none, or none that is new.

    It is the first that a ``ModelCheckpoint`` or ``EarlyStopping`` monitors, is the user's own, and exists; where none
    is monitored, the first whose name begins with ``val``.

    Args:
        trainer: the trainer, when a validation or a training epoch ends.
        known: what was followed before; none after it is, as it may not have been logged yet since resuming.
        late: whether the hooks of the epoch's end are over, which may log too.
    """
    metrics = trainer.callback_metrics
    names = list(_monitors(trainer)) or [key for key in metrics if key.startswith("val")][:1]
    if known in names:
        names = names[: names.index(known) + 1]
    name = next((name for name in names if name in metrics), None)
    if name is None or not _is_new(trainer, name, late):
        return None
    value = metrics[name]
    return (name, float(value)) if isinstance(value, Tensor) and value.numel() == 1 else None


def best_values(trainer: Trainer, history: RunHistory) -> dict[str, float]:
    """The best value of the monitored metric, and the best since the masks have been final.

    Args:
        trainer: the trainer, whose callbacks know whether small values are good.
        history: what has been measured.

    Returns:
        ``best_<metric>`` and ``best_pruned_<metric>``; empty where nothing is monitored, or nothing was measured.
    """
    mode = _monitors(trainer).get(history.metric or "")
    if mode is None:
        return {}
    best = min if mode == "min" else max
    points = [(step, value) for step, _, value in history.points if math.isfinite(value)]
    found = {
        f"best_{history.metric}": [value for _, value in points],
        f"best_pruned_{history.metric}": [value for step, value in points if step >= history.masks_final_at],
    }
    return {name: best(values) for name, values in found.items() if values}


def _monitors(trainer: Trainer) -> dict[str, str]:
    """The metrics that are monitored, in order, and of each ``"min"`` or ``"max"``."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found: dict[str, str] = {}
    for callback in callbacks:
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)):
            name = callback.monitor
            if name and not name.startswith("autoprune/"):
                found.setdefault(name, callback.mode)
    return found


def _is_new(trainer: Trainer, name: str, late: bool) -> bool:
    """Whether the loop that ends has logged a metric: while a validation ends, the training's are an epoch old."""
    loop = trainer.fit_loop.epoch_loop
    validated, trained = _logs(loop.val_loop._results, name), _logs(loop._results, name)
    if not validated and not trained:  # set by hand
        return trainer.validating or not trainer.enable_validation
    logs = validated if trainer.validating else [] if validated else trained
    if late:
        return any(log.meta.fx == "on_train_epoch_end" for log in logs)
    return any(not log.has_reset for log in logs)


def _logs(results: Any, name: str) -> list[Any]:
    """What Lightning keeps of a metric that a loop logs, from each hook that does; reset when the loop has ended."""
    return [
        log for log in results.values() if any(name in results._forked_name(log, on_step) for on_step in (True, False))
    ]
