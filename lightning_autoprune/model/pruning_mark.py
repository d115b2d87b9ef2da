"""A mark on modules whose masks still change, so that they are not shrunk by mistake. Torch only."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["is_being_pruned", "mark_as_being_pruned", "remove_mark"]

_NAME = "_autoprune_mark"


class _Mark:
    """An attribute of one module: neither a copy of the module nor a pickle of it carries the mark."""

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
        vars(module)[_NAME] = _Mark()


def remove_mark(model: nn.Module) -> None:
    """Remove the mark from a model and all modules in it."""
    for module in model.modules():
        vars(module).pop(_NAME, None)


def is_being_pruned(model: nn.Module) -> bool:
    """Return True if any module of a model is marked."""
    return any(isinstance(vars(module).get(_NAME), _Mark) for module in model.modules())
