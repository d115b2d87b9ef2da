"""What is told of a run that goes on from a checkpoint under other settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

__all__ = ["warn_of_changes"]


def warn_of_changes(saved: Mapping[str, Any], here: Mapping[str, Any], frozen: bool) -> None:
    """Warns of settings that differ from those of the checkpoint.

    Args:
        saved: the settings of the checkpoint's run, and its length as ``steps``.
        here: those of this run.
        frozen: whether the masks are final; the length of the run does not matter then.
    """
    names = [name for name in here if saved[name] != here[name] and not (frozen and name == "steps")]
    if not names:
        return
    if frozen:
        what = "Its masks are final, so they stay: to prune anew, start a new fit from its weights alone."
    else:
        what = "The run goes on with the new ones, as far as they still matter."
    changes = ", ".join(f"{name} {saved[name]} (here {here[name]})" for name in names)
    rank_zero_warn(f"The checkpoint's run had other settings: {changes}. {what}")
