"""Find short ``fnmatch`` patterns that match some names and no others."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

__all__ = ["collapse_numbers", "find_patterns"]


def find_patterns(wanted: Collection[str], unwanted: Collection[str]) -> list[str]:
    """Return patterns that match all wanted names and none of the unwanted ones, as few as is easy.

    Args:
        wanted: dotted names.
        unwanted: other names, of which none is wanted.

    Example:
        >>> find_patterns(["net.0.a", "net.0.b", "net.1.a", "net.1.b", "head"], ["net.0.norm", "net.1.norm", "embed"])
        ['net.*.a', 'net.*.b', 'head']
        >>> find_patterns(["net.0.a", "net.1.a", "head"], ["embed"])
        ['net.*', 'head']
    """
    patterns = _cover("", list(wanted), list(unwanted))
    short = {pattern: collapse_numbers(pattern) for pattern in patterns}
    safe = [p if _matches_any(unwanted, [short[p]]) else short[p] for p in patterns]
    if _matches_any(unwanted, safe) or not all(_matches_any([name], safe) for name in wanted):
        return [glob.escape(name) for name in wanted]  # a name has the characters of a pattern in it
    return list(dict.fromkeys(safe))


def collapse_numbers(name: str) -> str:
    """Return a dotted name with "*" in place of each part that is a number.

    Example:
        >>> collapse_numbers("blocks.12.conv1")
        'blocks.*.conv1'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _cover(prefix: str, wanted: list[str], unwanted: list[str]) -> list[str]:
    """Return patterns for the names below a prefix: one for all of them if they are all wanted."""
    if not unwanted and (len(wanted) > 1 or not prefix):
        return [f"{glob.escape(prefix)}*"]
    branches: dict[str, list[str]] = {}
    for name in wanted:
        part, dot, _ = name.removeprefix(prefix).partition(".")
        branches.setdefault(part + dot, []).append(name)
    patterns = []
    for branch, names in branches.items():
        below = prefix + branch
        if branch.endswith("."):
            patterns += _cover(below, names, [name for name in unwanted if name.startswith(below)])
        else:
            patterns.append(glob.escape(below))
    return patterns


def _matches_any(names: Iterable[str], patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
