"""The error of this package, and the checks and words that several modules share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real

__all__ = ["AutoPruneError", "check_choice", "check_range", "listed"]


class AutoPruneError(ValueError):
    """A setting, a model or a checkpoint that pruning can't work with.

    The message names what was given, what is allowed, and the way out.
    """


def listed(names: Iterable[str]) -> str:
    """Names for a message: quoted, with commas between them."""
    return ", ".join(repr(name) for name in names)


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raises unless ``value`` is one of ``allowed``.

    Raises:
        AutoPruneError: naming the argument, the value and all allowed values.
    """
    if value not in allowed:
        raise AutoPruneError(f"`{name}` is {value!r}; allowed are {listed(allowed)}.")


def check_range(
    name: str,
    value: float,
    low: float,
    high: float = float("inf"),
    *,
    low_open: bool = False,
    high_open: bool = False,
    whole: bool = False,
    hint: str = "",
) -> None:
    """Raises unless ``value`` is a finite number between ``low`` and ``high``.

    Args:
        name: the argument's name, for the message.
        value: the number given.
        low: lower end.
        high: upper end.
        low_open: whether ``low`` itself is refused.
        high_open: whether ``high`` itself is refused.
        whole: whether it must be an integer.
        hint: a way out, appended to the message.

    Raises:
        AutoPruneError: naming the argument, the value and the interval.
    """
    high_open = high_open or high == math.inf
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    inside = number and (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
    if not inside:
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
        kind = "an integer" if whole else "a number"
        raise AutoPruneError(f"`{name}` is {value!r}; it must be {kind} in {interval}.{' ' + hint if hint else ''}")
