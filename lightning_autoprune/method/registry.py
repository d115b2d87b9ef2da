"""Look up what a setting names: an entry of a registry, or an object of the user's own. Torch only.

A registry maps each allowed name to what it stands for. A name that is in no registry raises an error, so that a typo
never becomes some other choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import Tensor

from lightning_autoprune.errors import AutoPruneError, quote_names

__all__ = ["describe", "describe_result", "look_up", "plain_value"]

Entry = TypeVar("Entry")


def look_up(
    setting: str,
    value: str | Entry,
    registry: Mapping[str, Entry],
    is_allowed: Callable[[Any], bool] = lambda value: False,
    objects: str = "",
) -> Entry:
    """Return the entry that a name stands for, or the user's own object unchanged.

    Args:
        setting: name of the setting, for the message.
        value: a name in ``registry``, or an object.
        registry: what each allowed name stands for.
        is_allowed: returns True for an object that may be used in place of a name.
        objects: what such objects are, for the message.

    Raises:
        AutoPruneError: for a name that is not in the registry and an object that is not allowed.

    Example:
        >>> look_up("power", "cubic", {"linear": 1, "cubic": 3})
        3
        >>> look_up("power", 5, {"linear": 1, "cubic": 3}, lambda value: isinstance(value, int))
        5
    """
    if isinstance(value, str) and value in registry:
        return registry[value]
    if isinstance(value, str) or not is_allowed(value):
        also = f", or {objects}" if objects else ""
        raise AutoPruneError(f"`{setting}` is {value!r}; allowed are {quote_names(registry)}{also}.")
    return value


def describe(value: object) -> object:
    """Return a setting as plain data: names and numbers unchanged, any other object as ``module.name``.

    Example:
        >>> describe("cubic"), describe(0.5), describe(max)
        ('cubic', 0.5, 'builtins.max')
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def describe_result(value: object) -> str:
    """Describe what a user's function returned, for a message: a tensor's dtype and shape, or the type."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def plain_value(value: Any) -> Any:
    """Return a number or flag from another library, such as NumPy, as Python's, and a sequence as a list.

    Anything else is returned unchanged.

    Example:
        >>> from fractions import Fraction
        >>> plain_value(Fraction(1, 2)), plain_value(3), plain_value("cubic"), plain_value(("a", "b"))
        (0.5, 3, 'cubic', ['a', 'b'])
    """
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():  # a flag: no number to NumPy
        return value.item()
    return list(value) if isinstance(value, Sequence) else value
