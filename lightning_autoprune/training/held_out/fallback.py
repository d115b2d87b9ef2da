"""What the default does where no data can be held out: M is trained on the training batches."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_autoprune.training.callback_settings import CallbackSettings
from lightning_autoprune.training.held_out.held_out_source import HeldOutError, HeldOutSource, TrainSource
from lightning_autoprune.training.lightning_package import Trainer
from lightning_autoprune.training.trainer_checks import check_monitors

__all__ = ["fall_back", "may_fall_back"]


def may_fall_back(settings: CallbackSettings) -> bool:
    """Return True if the user left open what M is trained on."""
    return settings.held_out is None and settings.redraw_held_out


def fall_back(trainer: Trainer, settings: CallbackSettings, error: HeldOutError) -> HeldOutSource:
    """Return the source that holds nothing out, and say why.

    Args:
        trainer: the trainer.
        settings: those of the callback.
        error: why no data can be held out.

    Raises:
        HeldOutError: the given one, if the user asked for held-out data.
        AutoPruneError: if another callback monitors the held-out loss.
    """
    if not may_fall_back(settings):
        raise error
    check_monitors(trainer, holds_out=False)
    rank_zero_warn(
        "`held_out` is not set, and nothing can be held out, so M is trained on the training batches"
        f' (`held_out="train"`): {error.reason}.'
    )
    return TrainSource(settings.seed)
