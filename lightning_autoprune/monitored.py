"""The user's metric that is followed beside the sparsity: the one that their other callbacks monitor."""

from __future__ import annotations

import math
from itertools import takewhile

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_autoprune.history import History

__all__ = ["HELD_OUT_LOSS", "best_values", "followed_metric"]

HELD_OUT_LOSS = "autoprune/held_out_loss"


def followed_metric(trainer: Trainer) -> tuple[str, float] | None:
    """The name and the value now of the metric to follow; None where there is none yet.

    It is what the first ``ModelCheckpoint`` or ``EarlyStopping`` monitors, if that is the user's own; else the first
    metric whose name begins with ``val``.
    """
    metrics = trainer.callback_metrics
    chosen = _monitor(trainer)
    name = chosen[0] if chosen else next((key for key in metrics if key.startswith("val")), None)
    value = metrics.get(name) if name else None
    return (name, float(value)) if name and isinstance(value, Tensor) and value.numel() == 1 else None


def best_values(trainer: Trainer, history: History, sparsity: float) -> dict[str, float]:
    """The best value of the monitored metric, and the best since the model has been as sparse as it is now.

    Args:
        trainer: the trainer, whose callbacks know whether small values are good.
        history: what has been measured.
        sparsity: that of all prunable weights now.

    Returns:
        ``best_<metric>`` and ``best_pruned_<metric>``; empty where nothing is monitored, or nothing was measured.
    """
    chosen = _monitor(trainer)
    if chosen is None or chosen[0] != history.metric:
        return {}
    best = min if chosen[1] == "min" else max
    points = [(then, value) for _, then, value in history.points if math.isfinite(value)]
    found = {f"best_{chosen[0]}": [value for _, value in points]}
    since = takewhile(lambda point: point[0] == sparsity, reversed(points))  # it may have been above it while pruning
    found[f"best_pruned_{chosen[0]}"] = [value for _, value in since]
    return {name: best(values) for name, values in found.items() if values}


def _monitor(trainer: Trainer) -> tuple[str, str] | None:
    """The metric, and ``"min"`` or ``"max"``."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)):
            name = callback.monitor
            if name and not name.startswith("autoprune/"):
                return name, callback.mode
    return None
