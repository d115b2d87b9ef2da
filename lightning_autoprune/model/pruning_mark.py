"""A mark on modules whose masks still change, so that they are not shrunk by mistake. Torch only."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

__all__ = ["is_being_pruned", "mark_as_being_pruned", "remove_mark"]

_NAME = "_autoprune_mark"


class _Mark:
    """An attribute that marks one module. A copy of the module, or a pickle, is not marked."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = weakref.ref(owner)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def mark_as_being_pruned(model: nn.Module) -> None:
    """Mark a model and all modules in it.

    Example:
        >>> import copy
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> mark_as_being_pruned(model)
        >>> is_being_pruned(model), is_being_pruned(model[0]), is_being_pruned(copy.deepcopy(model))
        (True, True, False)
        >>> remove_mark(model)
        >>> is_being_pruned(model)
        False
    """
    for module in model.modules():
        vars(module)[_NAME] = _Mark(module)


def remove_mark(model: nn.Module) -> None:
    """Remove the mark from a model and all modules in it."""
    for module in model.modules():
        vars(module).pop(_NAME, None)


def is_being_pruned(model: nn.Module) -> bool:
    """Return True if any module of a model is marked."""
    marks = ((module, vars(module).get(_NAME)) for module in model.modules())
    return any(isinstance(mark, _Mark) and mark.owner() is module for module, mark in marks)
