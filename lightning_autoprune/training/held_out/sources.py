"""Makes the source of held-out batches that the callback's ``held_out`` asks for.

To add a source, write a subclass of :class:`HeldOutSource`. If it has a word of its own, add it to
:data:`HELD_OUT_SOURCES` and to the type of ``held_out`` in ``AutoPruneCallback``.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_autoprune.errors import check_choice, check_range
from lightning_autoprune.training.held_out.held_out_source import HeldOutSource, TrainSource
from lightning_autoprune.training.held_out.loader_sources import FixedSource, LoaderSource, ValidationSource
from lightning_autoprune.training.held_out.redrawn_source import RedrawnSource

__all__ = ["DEFAULT_FRACTION", "HELD_OUT_SOURCES", "HeldOutSource", "make_source"]

DEFAULT_FRACTION = 0.25
"""What is held out of the training data if the user leaves it open, where it can be."""

HELD_OUT_SOURCES: dict[str, type[TrainSource | ValidationSource]] = {"val": ValidationSource, "train": TrainSource}
"""The sources that have a word, by that word; each is made with the seed alone."""


def make_source(held_out: Any, redraw: bool, seed: int) -> HeldOutSource:
    """Make the source that ``held_out`` asks for.

    Args:
        held_out: a fraction of the training data in (0, 1), a word in :data:`HELD_OUT_SOURCES`, or a ``DataLoader``;
            None stands for :data:`DEFAULT_FRACTION`.
        redraw: whether a fraction is drawn anew from each batch, or once from the training set.
        seed: decides which samples are held out.

    Raises:
        AutoPruneError: for anything else.
    """
    if held_out is None:
        held_out = DEFAULT_FRACTION
    if isinstance(held_out, str):
        check_choice("held_out", held_out, HELD_OUT_SOURCES)
        return HELD_OUT_SOURCES[held_out](seed)
    if isinstance(held_out, DataLoader):
        return LoaderSource(held_out, seed)
    hint = '`held_out` may also be "val", "train" or a DataLoader.'
    check_range("held_out", held_out, 0, 1, low_open=True, high_open=True, hint=hint)
    return RedrawnSource(held_out, seed) if redraw else FixedSource(held_out, seed)
