"""The base class of the sources of held-out batches, and the source that holds nothing out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_autoprune.training.lightning_package import Trainer

__all__ = ["HeldOutSource", "TrainSource"]


class HeldOutSource:
    """Where the held-out batches of a run come from.

    The callback makes one source and uses it in every fit. In each fit it calls the hooks in the order in which they
    stand below.

    Args:
        seed: decides everything that is random about the held-out data.

    Attributes:
        description: what is held out, for messages. A checkpoint stores it: resuming with another one is refused.
        has_batches: whether there are held-out batches at all.
        default_train_gradients: whether M follows the gradients of the weight steps too, if the user does not set
            ``train_gradients``.
        rank_weight: weight of this rank's last batch in the mean over the ranks; the mean of the weights is 1.
        held_out_share: if M follows the gradients of the weight step too, the weight in [0, 1] of those on the last
            held-out batch in the mean of both.
        steps_done: returns the number of training steps that are over; the callback sets it before ``setup``.
    """

    description: str
    has_batches = True
    default_train_gradients = False
    rank_weight = 1.0
    held_out_share = 0.5
    steps_done: Callable[[], int] = int

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def setup(self, trainer: Trainer) -> None:
        """Prepare the trainer. Called when a fit is set up, before the training data is loaded."""

    def start(self, trainer: Trainer, upcoming_step: Callable[[], int | None]) -> None:
        """Get ready to give batches. Called before the first step of a fit, when the loaders exist.

        Args:
            trainer: the trainer.
            upcoming_step: returns the number of the training step that the next batch ends, if an auxiliary step
                follows it, else None.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`.

        Called after :meth:`start` when a run resumes, and when a run in progress goes back to an earlier state; not if
        the masks are final.
        """

    def next_batch(self, trainer: Trainer) -> Any:
        """Return the next held-out batch on the model's device; None if there is none for this step.

        Called after each weight step that an auxiliary step follows, if the source has batches.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, in plain types. Called whenever a checkpoint is saved after :meth:`start`."""
        return {}

    def on_masks_final(self) -> None:
        """Stop holding data out. Called when the masks become final.

        If a checkpoint already has final masks, this is called before the training data is loaded, and again after
        :meth:`start`.
        """

    def stop(self, trainer: Trainer) -> None:
        """Take back all changes to the trainer. Called when training ends or fails, maybe more than once."""


class TrainSource(HeldOutSource):
    """Holds nothing out: M follows the gradients of the weight steps alone."""

    description = '"train"'
    has_batches = False
    default_train_gradients = True
