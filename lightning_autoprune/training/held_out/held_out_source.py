"""The base class of the sources of held-out batches, and the source that holds nothing out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.lightning_package import Trainer

__all__ = ["HeldOutError", "HeldOutSource", "RunUnderWay", "TrainSource"]


class HeldOutError(AutoPruneError):
    """No data can be held out in this run; the default setting then trains M on the training batches.

    Args:
        reason: why, as a clause.
        way_out: what to do, as a sentence.
    """

    def __init__(self, reason: str, way_out: str | None = None) -> None:
        way_out = way_out or (
            'Pass `held_out="train"`, which holds nothing out, or `held_out=DataLoader(...)` with other samples.'
        )
        super().__init__(f"No data can be held out: {reason}. {way_out}")
        self.reason = reason


class RunUnderWay(Protocol):
    """What a source asks of the run that it serves. Batches are numbered within an epoch, like ``batch_idx``."""

    def next_batch_index(self) -> int:
        """Return the number of the batch that is trained on next."""

    def ends_step(self, batch: int) -> bool:
        """Return True if a batch ends in an optimizer step, rather than only adding to the gradients."""

    def step(self) -> int:
        """Return the number of training steps that are over."""

    def is_due(self, step: int) -> bool:
        """Return True if an auxiliary step belongs to a training step, given the number of steps before it."""

    def all_ranks_agree(self, ok: bool) -> bool:
        """Return True on every rank if the argument is True on all of them, else False on every rank."""

    def try_batches(self, whole: Any, rest: Any, held_out: Any) -> None:
        """Try whether the network takes parts of a batch, without effect on the run.

        Args:
            whole: a training batch on the model's device.
            rest: a part of it that W would be trained on.
            held_out: the other part.

        Raises:
            HeldOutError: if it does not, on any rank.
        """

    def stop_holding_out(self, error: HeldOutError) -> None:
        """Train M on the training batches from now on, if the user left open what it is trained on.

        Raises:
            HeldOutError: the given one, if the user asked for held-out data.
        """


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

    def start(self, trainer: Trainer) -> None:
        """Get ready to give batches. Called before the first step of a fit, when the loaders exist.

        Raises:
            AutoPruneError: if the source can't give batches in this fit; a :class:`HeldOutError` if another can.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`.

        Called after :meth:`start` when a run resumes, and when a run in progress goes back to an earlier state; not if
        the masks are final.
        """

    def follow(self, run: RunUnderWay) -> None:
        """Serve a run. Called once its first step can begin, after :meth:`start` and :meth:`load_state_dict`."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Called when the first batch of an epoch has been loaded."""

    def next_batch(self, trainer: Trainer) -> Any:
        """Return the next held-out batch on the model's device; None if there is none for this step.

        Called once in each training step with an auxiliary step, before or after the weight step.
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

    live: Sequence[str] = ()
    """Attributes that have content only during a fit, such as iterators; a pickle has None or an empty list instead."""

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        return state | {name: [] if isinstance(state[name], list) else None for name in self.live}


class TrainSource(HeldOutSource):
    """Holds nothing out: M follows the gradients of the weight steps alone."""

    description = '"train"'
    has_batches = False
    default_train_gradients = True
