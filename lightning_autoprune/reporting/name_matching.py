"""Which name in one list is which name in another, if wrappers or the user have changed prefixes in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

__all__ = ["match_names"]

_WRAPPERS = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
"""What ``torch.compile``, DeepSpeed, FSDP, activation checkpointing and DDP add to the names of what they wrap."""


def match_names(
    names: Iterable[str], keys: Iterable[str], fits: Callable[[str, str], bool] = lambda name, key: True
) -> dict[str, str]:
    """Return for each name the key that means the same, in the order of the names; leave out names without one.

    A key is the same as the name, or differs only in what wrappers add, or in a prefix. Of several prefixes the one
    that is shared by the most names comes first. A key that two names would fit equally well is given to neither.

    Args:
        names: names of parameters, such as ``"net.0.weight"``.
        keys: names of the same kind from elsewhere.
        fits: takes a name and another key; returns False if they can't be the same.

    Example:
        >>> match_names(["net._orig_mod.0.weight"], ["net.0.weight", "net.0.bias"])
        {'net._orig_mod.0.weight': 'net.0.weight'}
        >>> match_names(["net.0.weight", "head.weight"], ["0.weight", "head.weight"])
        {'net.0.weight': '0.weight', 'head.weight': 'head.weight'}
        >>> match_names(["encoder.0.weight", "decoder.0.weight"], ["0.weight"])
        {}
    """
    names, free = list(names), dict.fromkeys(keys)
    found = {name: name for name in names if name in free}
    for find in (_same_without_wrappers, _same_but_for_a_prefix):
        for key in found.values():
            free.pop(key, None)
        for pairs in find([name for name in names if name not in found], list(free)):
            found |= _choose(pairs, found, fits)
    return {name: found[name] for name in names if name in found}


_Pairs = list[tuple[str, str]]


def _choose(pairs: _Pairs, found: dict[str, str], fits: Callable[[str, str], bool]) -> dict[str, str]:
    """Return the first key of each name, out of pairs that are equally likely, without keys that several names fit."""
    taken = set(found.values())
    possible = [(name, key) for name, key in pairs if name not in found and key not in taken and fits(name, key)]
    claims: dict[str, set[str]] = defaultdict(set)
    for name, key in possible:
        claims[key].add(name)
    chosen: dict[str, str] = {}
    for name, key in possible:
        if len(claims[key]) == 1:
            chosen.setdefault(name, key)
    return chosen


def _same_without_wrappers(names: list[str], keys: list[str]) -> Iterator[_Pairs]:
    """Yield the pairs of a name and a key that differ only in what wrappers add."""
    by_path: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in keys:
        by_path[_path(key)].append(key)
    yield [(name, key) for name in names for key in by_path.get(_path(name), [])]


def _same_but_for_a_prefix(names: list[str], keys: list[str]) -> Iterator[_Pairs]:
    """Yield the pairs that one change of a prefix explains, those of the changes that explain the most names first."""
    by_suffix: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in keys:
        path = _path(key)
        for i in range(len(path)):
            by_suffix[path[i:]].append(key)
    changes: dict[tuple[tuple[str, ...], tuple[str, ...]], _Pairs] = defaultdict(list)
    for name in names:
        path = _path(name)
        start = next((i for i in range(len(path)) if path[i:] in by_suffix), len(path))
        for key in by_suffix.get(path[start:], []):
            other = _path(key)[: start - len(path)]
            if len(path) - start > 1 or not (start and other):  # sharing only "weight" says nothing
                changes[path[:start], other].append((name, key))
    by_size = sorted(changes.values(), key=len, reverse=True)
    for _, group in groupby(by_size, key=len):
        yield [pair for pairs in group for pair in pairs]


def _path(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part not in _WRAPPERS)
