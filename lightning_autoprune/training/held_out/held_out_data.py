"""The held-out data of a fit: the source that the user asked for, or none where the default can't hold anything out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.tensors.collectives import all_ranks_agree
from lightning_autoprune.training.callback_settings import CallbackSettings
from lightning_autoprune.training.held_out.held_out_source import HeldOutError, HeldOutSource, TrainSource
from lightning_autoprune.training.held_out.sources import DEFAULT_FRACTION, make_source
from lightning_autoprune.training.held_out.trial import try_batches
from lightning_autoprune.training.lightning_internals import ends_step, next_batch_index
from lightning_autoprune.training.lightning_package import Trainer
from lightning_autoprune.training.trainer_checks import check_monitors, check_training_step

__all__ = ["HeldOutData"]


class HeldOutData:
    """Chooses the source of the held-out batches in each fit, and tells it what it asks of the run.

    If the user left ``held_out`` open, a source that can't hold anything out is replaced by one that holds nothing out,
    with a warning that says why. If the user asked for held-out data, it is an error.

    The hooks are called in the order in which they stand below.

    Args:
        settings: those of the callback.

    Attributes:
        source: the source of the fit under way.

    Raises:
        AutoPruneError: if ``held_out`` has no source.
    """

    def __init__(self, settings: CallbackSettings) -> None:
        self._settings = settings
        self._own_source = make_source(settings.held_out, settings.redraw_held_out, settings.seed)
        self.source: HeldOutSource = self._own_source
        self._trainer: Trainer | None = None
        self._pruner: Pruner | None = None
        self._optimizers = 0

    # A fit

    def setup(self, trainer: Trainer, steps_done: Callable[[], int]) -> None:
        """Prepare the trainer, before the training data is loaded.

        Args:
            trainer: the trainer.
            steps_done: returns the number of training steps that are over.

        Raises:
            AutoPruneError: if the user asked for data that can't be held out.
        """
        self._trainer, self.source = trainer, self._own_source
        if self.source.has_batches:
            try:
                check_training_step(trainer.lightning_module, self._settings.loss_fn is not None)
            except HeldOutError as error:
                self.stop_holding_out(error)
        self.source.steps_done = steps_done
        self.source.setup(trainer)

    def start(self, trainer: Trainer, resumed: Mapping[str, Any] | None) -> None:
        """Get ready to give batches, before the first step, when the loaders exist.

        Args:
            trainer: the trainer.
            resumed: the state of the run that is resumed, if one is.

        Raises:
            AutoPruneError: if the user asked for data that can't be held out.
        """
        if resumed and resumed["source"] == TrainSource.description and self._may_fall_back:
            self._hold_nothing_out()
        try:
            self.source.start(trainer)
        except HeldOutError as error:
            self.stop_holding_out(error)

    def follow(self, pruner: Pruner, optimizers: int) -> None:
        """Serve a run, whose first step can begin.

        Args:
            pruner: the course of the run.
            optimizers: number of optimizers that train prunable weights.
        """
        self._pruner, self._optimizers = pruner, optimizers
        self.source.follow(self)

    @property
    def follows_training(self) -> bool:
        """True if M follows the gradients of the weight steps."""
        if not self.source.has_batches:
            return True
        if self._settings.train_gradients is not None:
            return self._settings.train_gradients
        return self.source.default_train_gradients and self._optimizers <= 1  # if there is none yet, there will be one

    def stop(self, trainer: Trainer) -> None:
        """Take back all changes to the trainer, when training ends or fails."""
        self.source.stop(trainer)
        self._own_source.stop(trainer)
        self._trainer = self._pruner = None

    # What the source asks of the run

    def next_batch_index(self) -> int:
        """Return the number in its epoch of the batch that is trained on next."""
        return next_batch_index(self._fit)

    def ends_step(self, batch: int) -> bool:
        """Return True if a batch ends in an optimizer step, rather than only adding to the gradients."""
        return ends_step(self._fit, batch)

    def step(self) -> int:
        """Return the number of training steps that are over."""
        assert self._pruner is not None
        return self._pruner.step

    def is_due(self, step: int) -> bool:
        """Return True if an auxiliary step belongs to a training step, given the number of steps before it.

        If pruning begins early, M follows the weight steps alone until the planned start: loaders ask ahead of time, so
        they can't be told.
        """
        if self._pruner is None:
            return False
        dense_phase = self._pruner.dense_phase
        is_told = step >= dense_phase.late_start or not dense_phase.begins_early
        return is_told and self._pruner.is_due(step)

    def all_ranks_agree(self, ok: bool) -> bool:
        """Return True on every rank if the argument is True on all of them, else False on every rank."""
        return all_ranks_agree(ok, self._fit.world_size, self._fit.strategy.root_device)

    def try_batches(self, whole: Any, rest: Any, held_out: Any) -> None:
        """Try whether the network takes parts of a batch, without effect on the run.

        Raises:
            HeldOutError: if it does not, on any rank.
        """
        settings = self._settings
        try_batches(self._fit, whole, rest, held_out, settings.loss_fn, self.all_ranks_agree, settings.seed)

    @property
    def _fit(self) -> Trainer:
        assert self._trainer is not None, "no fit is under way"
        return self._trainer

    # Where nothing can be held out

    @property
    def _may_fall_back(self) -> bool:
        return self._settings.held_out is None and self._settings.redraw_held_out

    def stop_holding_out(self, error: HeldOutError) -> None:
        """Train M on the training batches from now on, and say why, if the user left open what it is trained on.

        Args:
            error: why no data can be held out.

        Raises:
            HeldOutError: the given one, if the user asked for held-out data.
            AutoPruneError: if another callback monitors the held-out loss.
        """
        if not self._may_fall_back:
            raise error
        check_monitors(self._fit, holds_out=False)
        rank_zero_warn(
            "`held_out` is not set, and nothing can be held out, so M is trained on the training batches"
            f' (`held_out="train"`): {error.reason}.'
        )
        self._hold_nothing_out()

    def _hold_nothing_out(self) -> None:
        self.source.stop(self._fit)
        self.source = TrainSource(self._settings.seed)

    # What is said and saved

    def describe(self) -> Any:
        """Return what is held out in the fit under way, as a value of the setting; a ``DataLoader`` by its name."""
        if self._settings.held_out is None:
            return DEFAULT_FRACTION if self.source.has_batches else "train"
        return self._settings.hyperparameters()["held_out"]

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {"source": self.source.description, "held_out": self.source.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, after :meth:`start`.

        If nothing can be held out in this fit, that remains so: the state may be from before the first batch told it.

        Raises:
            AutoPruneError: if other data was held out.
        """
        if self.source is not self._own_source and state["source"] == self._own_source.description:
            return
        if self.source.description != state["source"]:
            raise AutoPruneError(
                f"The checkpoint's run held out {state['source']}; this callback holds out {self.source.description}."
                " Resume with the same `held_out`, `redraw_held_out` and `seed`, or start from the checkpoint's weights"
                " alone."
            )
        self.source.load_state_dict(state["held_out"])
