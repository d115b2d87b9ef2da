"""Tensors that share memory: views of one storage that lie in several parameters. Torch only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_autoprune.tensors.sharding import local_shard

__all__ = ["covers", "find_overlaps", "shares_entries"]


def find_overlaps(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return groups of two or more names whose tensors lie in overlapping memory, each in the order given.

    Tensors of one group may still have no entry in common, as two columns of a matrix: see :func:`shares_entries`.

    Example:
        >>> matrix = torch.ones(4, 3)
        >>> find_overlaps({"a": matrix, "b": torch.ones(3), "c": matrix.t(), "d": matrix[1]})
        [['a', 'c', 'd']]
    """
    places = {name: i for i, name in enumerate(tensors)}
    groups = _group_spans({name: span for name, x in tensors.items() if (span := _memory_span(x))})
    return sorted((sorted(group, key=places.__getitem__) for group in groups), key=lambda group: places[group[0]])


def _group_spans(spans: Mapping[str, tuple[str, int, int]]) -> Iterator[list[str]]:
    group: list[str] = []
    device, end = "", 0
    for name, span in sorted(spans.items(), key=lambda item: item[1]):
        if group and (span[0] != device or span[1] >= end):
            if len(group) > 1:
                yield group
            group = []
        device, end = span[0], max(span[2], end) if group else span[2]
        group.append(name)
    if len(group) > 1:
        yield group


def shares_entries(a: Tensor, b: Tensor) -> bool:
    """Return True if an entry of one tensor is an entry of the other, in the same memory.

    Example:
        >>> matrix = torch.ones(4, 3)
        >>> shares_entries(matrix[:, 0], matrix[:, 1]), shares_entries(matrix[:, 0], matrix[1])
        (False, True)
    """
    return any(bool(flags.any()) for flags in _entries_within(b, a))


def covers(a: Tensor, b: Tensor) -> bool:
    """Return True if all entries of ``b`` are entries of ``a``, in the same memory.

    Example:
        >>> matrix = torch.ones(4, 3)
        >>> covers(matrix, matrix.t()), covers(matrix[0], matrix)
        (True, False)
    """
    return any(bool(flags.all()) for flags in _entries_within(b, a))


def _entries_within(inner: Tensor, outer: Tensor) -> list[Tensor]:
    """Return one bool per entry of a tensor that tells whether it is an entry of the other; [] if none can be."""
    spans = _memory_span(inner), _memory_span(outer)
    if spans[0] is None or spans[1] is None or spans[0][0] != spans[1][0]:
        return []
    inner, outer = local_shard(inner), local_shard(outer)
    first = min(spans[0][1], spans[1][1])
    size = inner.element_size()
    if size != outer.element_size() or (spans[0][1] - spans[1][1]) % size:
        return []
    length = (max(spans[0][2], spans[1][2]) - first) // size
    flags = torch.zeros(length, dtype=torch.bool)
    _view_like(flags, outer, (spans[1][1] - first) // size).fill_(True)
    return [_view_like(flags, inner, (spans[0][1] - first) // size)]


def _view_like(flags: Tensor, x: Tensor, offset: int) -> Tensor:
    sizes: Sequence[int] = x.shape
    return flags.as_strided(sizes, x.stride(), offset)


def _memory_span(x: Tensor) -> tuple[str, int, int] | None:
    """Return the device and the addresses of the first byte and past the last one; None if there are none."""
    shard = local_shard(x)
    if shard.is_meta or shard.layout != torch.strided or not shard.numel():
        return None
    try:
        start = shard.data_ptr()
    except RuntimeError:  # some subclasses of Tensor have no memory of their own
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shard.shape, shard.stride(), strict=True))
    return (str(shard.device), start, start + extent * shard.element_size()) if start else None
