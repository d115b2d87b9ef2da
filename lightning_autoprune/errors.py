"""The package's error class, and argument checks that several modules share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real

__all__ = [
    "AutoPruneError",
    "check_choice",
    "check_flag",
    "check_function",
    "check_patterns",
    "check_range",
    "quote_names",
]


class AutoPruneError(ValueError):
    """A setting, model or checkpoint that pruning can't work with.

    The message names what was given, what is allowed, and the way out.
    """


def quote_names(names: Iterable[str]) -> str:
    """Return names as they appear in a message: each in quotes, separated by commas."""
    return ", ".join(repr(name) for name in names)


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise an error unless ``value`` is one of ``allowed``.

    Raises:
        AutoPruneError: names the argument, the value and all allowed values.
    """
    if not isinstance(value, str) or value not in allowed:
        raise AutoPruneError(f"`{name}` is {value!r}; allowed are {quote_names(allowed)}.")


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
    """Raise an error unless ``value`` is a finite number between ``low`` and ``high``.

    Args:
        name: the argument's name, for the message.
        value: the number given.
        low: lower end of the interval.
        high: upper end of the interval.
        low_open: whether ``low`` itself is excluded.
        high_open: whether ``high`` itself is excluded.
        whole: whether the value must be an integer.
        hint: a way out, appended to the message.

    Raises:
        AutoPruneError: names the argument, the value and the interval.
    """
    high_open = high_open or high == math.inf
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    above = is_number and (low < value if low_open else low <= value)
    below = is_number and (value < high if high_open else value <= high)
    if not (above and below):
        interval = f"{'(' if low_open else '['}{low:.15g}, {high:.15g}{')' if high_open else ']'}"
        kind = "an integer" if whole else "a number"
        raise AutoPruneError(f"`{name}` is {value!r}; it must be {kind} in {interval}.{' ' + hint if hint else ''}")


def check_flag(name: str, value: object, *, also: str = "") -> None:
    """Raise an error unless ``value`` is True or False, or one of NumPy's two.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        also: what else is allowed, for the message.

    Raises:
        AutoPruneError: names the argument and the value.
    """
    kind = type(value)
    if kind is not bool and (kind.__module__, kind.__name__.rstrip("_")) != ("numpy", "bool"):
        raise AutoPruneError(f"`{name}` is {value!r}; it must be True or False{also}.")


def check_function(name: str, value: object, arguments: str) -> None:
    """Raise an error unless ``value`` can be called.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        arguments: what it is called with, for the message.

    Raises:
        AutoPruneError: names the argument, the value and what is allowed.
    """
    if not callable(value):
        raise AutoPruneError(f"`{name}` is {value!r}; it must be a function of {arguments}, or None.")


def check_patterns(name: str, value: object, *, empty: str = "") -> None:
    """Raise an error unless ``value`` is a list of texts, or another sequence of them.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        empty: what is wrong with an empty list; "": it is allowed.

    Raises:
        AutoPruneError: names the argument, the value and what is allowed.
    """
    if isinstance(value, str):
        raise AutoPruneError(f"`{name}` is {value!r}; it must be a list of patterns: [{value!r}].")
    if not isinstance(value, Sequence) or not all(isinstance(pattern, str) for pattern in value):
        raise AutoPruneError(f"`{name}` is {value!r}; it must be a list of patterns, each of them a text, or None.")
    if empty and not value:
        raise AutoPruneError(f"`{name}` is empty, {empty}")
