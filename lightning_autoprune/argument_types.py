"""Types for the command line's numbers: what argparse accepts, and what it says of anything else."""

from __future__ import annotations

import argparse

__all__ = ["parse_positive_int", "parse_seed"]


def parse_positive_int(text: str) -> int:
    """Return the integer, which must be at least 1.

    Raises:
        argparse.ArgumentTypeError: if it is below 1, or no integer.
    """
    number = _parse_int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def parse_seed(text: str) -> int:
    """Return the integer, which must be a seed that NumPy accepts: 0 to 2³² - 1.

    Raises:
        argparse.ArgumentTypeError: if it is outside that range, or no integer.
    """
    number = _parse_int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is not from 0 to {2**32 - 1}")
    return number


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
