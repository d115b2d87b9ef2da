"""Holds rows out of each batch after it is collated: for streams, and loaders that are no ``DataLoader``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_autoprune.training.held_out.overriding import MethodHook
from lightning_autoprune.training.lightning_internals import is_moving_training_batch
from lightning_autoprune.training.lightning_package import Trainer

__all__ = ["CollatedBatches"]


class CollatedBatches:
    """Passes each training batch through a function, once it is on the model's device.

    Args:
        trainer: the trainer.
        change: takes a batch and returns the one to train on.
    """

    def __init__(self, trainer: Trainer, change: Callable[[Any], Any]) -> None:
        self._trainer, self._change = trainer, change
        self._is_changing = False  # the user's code, run in a trial, may move batches of its own
        self._hook = MethodHook(trainer.strategy, "batch_to_device", self._batch_to_device)

    def _batch_to_device(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        is_training_batch = is_moving_training_batch(self._trainer)  # asked first: the move may run the user's hooks
        batch = original(*args, **kwargs)
        if batch is None or not is_training_batch or self._is_changing:
            return batch
        self._is_changing = True
        try:
            return self._change(batch)
        finally:
            self._is_changing = False

    def stop(self) -> None:
        """Leave all batches whole from now on."""
        self._hook.remove()
