"""The rows of a batch, whatever it is nested in: split at random, or shared out over ranks. Torch only.

Where a container has its rows is one of three: each of its items is one (``[sample, sample, …]``), each item of each of
its lists is one (``tuple(zip(*samples))``), or they are the rows of what is in it, as the default collation makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.random_state import derive_seed

__all__ = ["UnclearRowsError", "batch_rows", "held_rows", "hold_out", "shard_batch", "split_batch"]

Layouts = dict[str, str]  # by place in the batch, as "['boxes'][0]"

_ITEMS, _LISTS, _COLUMNS = "items", "lists", "columns"

_INSTEAD = 'pass `held_out=DataLoader(...)` or `held_out="train"`.'


class UnclearRowsError(AutoPruneError):
    """A batch, and the batches before it, don't tell what is a row."""


def split_batch(
    batch: Any, fraction: float, *seeds: int, least: int = 0, layouts: Layouts | None = None
) -> tuple[Any, Any]:
    """Splits the rows of a batch at random into a training part and a held-out part.

    Tensors are split along their first dimension, whatever they are nested in (dict, tuple, named tuple, list);
    other lists and tuples of as many items are split by item, such as the texts of the default collation, and so are
    lists of samples, and lists with an item for each row, as ``tuple(zip(*samples))`` makes them; scalars and strings
    go to both parts.

    Args:
        batch: what a data loader gives; all tensors have as many rows.
        fraction: share of the rows to hold out, in (0, 1), rounded to whole rows.
        seeds: integers that decide which rows.
        least: rows that each part has, whatever the fraction, where the batch is large enough; else half of it.
        layouts: where earlier batches had their rows, for batches that don't tell; what this one tells is added.

    Returns:
        Training part and held-out part; the whole batch and None where one of them would be empty.

    Raises:
        UnclearRowsError: if the batch has lists of which it can't be told whether an item is a row.
        AutoPruneError: if it has no rows, or parts with different numbers of rows.

    Example:
        >>> train, held_out = split_batch((torch.arange(4), torch.ones(4, 2)), 0.25, 0)
        >>> [len(part) for part in train], [len(part) for part in held_out]
        ([3, 3], [1, 1])
    """
    layouts = {} if layouts is None else layouts
    rows = batch_rows(batch, layouts)
    return hold_out(batch, rows, held_rows(rows, fraction, least), *seeds, layouts=layouts)


def hold_out(batch: Any, rows: int, held: int, *seeds: int, layouts: Layouts) -> tuple[Any, Any]:
    """What :func:`split_batch` gives for a batch of so many rows, with so many of them held out."""
    if not 0 < held < rows:
        return batch, None
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(derive_seed(*seeds)))
    return _take(batch, order[held:], rows, layouts), _take(batch, order[:held], rows, layouts)


def held_rows(rows: int, fraction: float, least: int = 0) -> int:
    """How many of so many rows :func:`split_batch` holds out; 0 or all of them where it does not split."""
    least = min(least, rows // 2)
    return min(max(round(fraction * rows), least), rows - least)


def shard_batch(batch: Any, rank: int, ranks: int) -> tuple[Any, float]:
    """One rank's rows of a batch that all ranks have, so that together they pass each row once.

    Args:
        batch: as of :func:`split_batch`.
        rank: from 0 to ``ranks`` - 1.
        ranks: number of processes that share the batch.

    Returns:
        Every ``ranks``-th row, and the weight of this part in a mean over the ranks (1 where all have as many); the
        whole batch and 1 where a part would have less than two rows, which BatchNorm needs.

    Example:
        >>> shard_batch(torch.arange(5), 1, 2)
        (tensor([1, 3]), 0.8)
    """
    layouts: Layouts = {}
    rows = batch_rows(batch, layouts)
    if rows < 2 * ranks:
        return batch, 1.0
    index = torch.arange(rank, rows, ranks)
    return _take(batch, index, rows, layouts), len(index) * ranks / rows


def batch_rows(batch: Any, layouts: Layouts | None = None) -> int:
    """Number of rows of a batch: of the first tensor that is nested the least, or of items where they are the rows.

    Args:
        batch: as of :func:`split_batch`.
        layouts: as of :func:`split_batch`.

    Raises:
        UnclearRowsError: as :func:`split_batch`.
        AutoPruneError: if there are none.
    """
    layouts = {} if layouts is None else layouts
    level = [("", batch)]
    while level:
        for _, value in level:
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.size(0)
        for place, value in level:
            layout = _layout(value, place, layouts)
            if layout != _COLUMNS:
                return len(value if layout == _ITEMS else next(filter(_is_list, _values(value))))
        level = [child for place, value in level for child in _children(value, place)]
    raise AutoPruneError(f"A batch of type {type(batch).__name__} has no tensor with rows to hold out: {_INSTEAD}")


def _layout(batch: Any, place: str, layouts: Layouts, rows: int | None = None, beside: bool = False) -> str:
    """Where a container has its rows.

    Args:
        batch: the container.
        place: where it is in the batch.
        layouts: as of :func:`split_batch`.
        rows: how many there are, if that is known.
        beside: whether a tensor stands beside it, or beside what it is in.

    Raises:
        UnclearRowsError: as :func:`split_batch`.
    """
    values, found = _values(batch), set(_rows(batch))
    lists = [value for value in values if _is_list(value)]
    side_by_side = len(lists) > 1 and len(set(map(len, lists))) == 1
    may_be = {
        _ITEMS: _is_list(batch) and rows in (None, len(batch)),
        _LISTS: side_by_side and rows in (None, len(lists[0])),
    }
    if not found:
        return _ITEMS if rows and may_be[_ITEMS] else _COLUMNS
    if not any(may_be.values()):
        if beside and _is_list(batch):
            layouts.setdefault(place, _COLUMNS)
        return _COLUMNS
    told = _told_by_kinds(values) if _is_list(batch) else None
    if not (told and may_be[told]):
        known = layouts.get(place)
        if known and may_be.get(known, True):
            return known
        if may_be[_LISTS] and (len(found) > 1 or any(all(map(_is_plain, items)) for items in lists)):
            told = _LISTS  # the default collation leaves neither
        elif rows and may_be[_ITEMS] and not _has_columns(batch, place, layouts, rows, beside):
            told = _ITEMS
        elif side_by_side and all(any(True for _ in _rows(item)) for items in lists for item in items):
            raise UnclearRowsError(
                f"A batch has {len(lists)} lists of {len(lists[0])} items with tensors of {found.pop()} rows, and it"
                f" can't be told whether an item is a row or a column: stack the tensors, or {_INSTEAD}"
            )
        else:
            alike = isinstance(values[0], Mapping) and len(set(map(_form, values))) == 1
            return _ITEMS if beside and may_be[_ITEMS] and alike else _COLUMNS
    layouts.setdefault(place, told)
    return told


def _told_by_kinds(values: list[Any]) -> str | None:
    """Whether containers of one form are samples, or the fields of samples: by what is alike in them.

    None where they may be columns: without plain values, with as many rows in all tensors. (What lists in a dict hold
    is no sign: lists of boxes may stand beside the columns of each view.)
    """
    forms = {_form(value) for value in values}
    if len(forms) > 1 or None in forms:
        return None
    inner, fields = [_values(value) for value in values], _is_list(values[0])
    items = [item for part in inner for item in part]
    if len({n for item in items for n in _rows(item, lists=fields)}) < 2 and not any(map(_has_plain, items)):
        return None
    if not fields:
        return _ITEMS
    for exact in (False, True):
        zipped, samples = _alike(inner, exact), _alike(zip(*inner, strict=True), exact)
        if zipped != samples:
            return _LISTS if zipped else _ITEMS
    return None


def _form(value: Any) -> Any:
    if isinstance(value, Mapping):
        return frozenset(value)
    return (type(value), len(value)) if isinstance(value, (list, tuple)) else None


def _alike(groups: Iterable[Iterable[Any]], exact: bool) -> bool:
    """Whether the values of each group are of one kind; None, for what is missing, is of any."""
    return all(len({_kind(value, exact) for value in group if value is not None}) < 2 for group in groups)


def _kind(value: Any, exact: bool) -> Any:
    if _is_plain(value):
        return str if isinstance(value, (str, bytes)) else float
    if isinstance(value, Tensor):
        return (value.dim(), value.dtype) if exact else Tensor
    if isinstance(value, Mapping):
        return frozenset(value) if exact else Mapping
    return list if isinstance(value, (list, tuple)) else type(value)


def _rows(batch: Any, lists: bool = True) -> Iterator[int]:
    """Numbers of rows of the tensors in a batch, with those in its lists or without."""
    if isinstance(batch, Tensor) and batch.dim() > 0:
        yield batch.size(0)
    elif lists or not _is_list(batch):
        for value in _values(batch):
            yield from _rows(value, lists)


def _children(batch: Any, place: str) -> list[tuple[str, Any]]:
    """What is in a container, by its place in the batch."""
    if isinstance(batch, Mapping):
        return [(f"{place}[{key!r}]", value) for key, value in batch.items()]
    return [(f"{place}[{i}]", value) for i, value in enumerate(_values(batch))]


def _values(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (list, tuple)) else []


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")


def _is_plain(item: Any) -> bool:
    return isinstance(item, (str, bytes, int, float)) or (isinstance(item, Tensor) and item.dim() == 0)


def _has_plain(item: Any) -> bool:
    """Whether it is a plain value, or has one outside of lists, where texts may be the rows of a column."""
    return _is_plain(item) or (not _is_list(item) and any(map(_has_plain, _values(item))))


def _has_columns(batch: Any, place: str, layouts: Layouts, rows: int, beside: bool) -> bool:
    """Whether what is in a container has so many rows and can be split by them."""
    try:
        for at, value in _children(batch, place):
            _take(value, torch.arange(0), rows, dict(layouts), at, beside)
    except AutoPruneError:
        return False
    return True


def _take(batch: Any, index: Tensor, rows: int, layouts: Layouts, place: str = "", beside: bool = False) -> Any:
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            return batch
        if batch.size(0) != rows:
            raise AutoPruneError(
                f"A batch has tensors of {rows} and of {batch.size(0)} rows (shape {tuple(batch.shape)}), so its rows"
                f" can't be split: {_INSTEAD}"
            )
        if batch.layout == torch.sparse_coo:
            return batch.index_select(0, index.to(batch.device))
        if batch.layout != torch.strided or batch.is_nested:
            raise AutoPruneError(
                f"A batch has a tensor of the layout {'nested' if batch.is_nested else batch.layout}, whose rows can't"
                f" be split: {_INSTEAD}"
            )
        return batch[index.to(batch.device)]
    if batch is None or isinstance(batch, (str, bytes, int, float, bool, complex)):
        return batch
    if not isinstance(batch, (Mapping, list, tuple)):
        raise AutoPruneError(f"A batch holds a {type(batch).__name__}, whose rows can't be split: {_INSTEAD}")
    layout = _layout(batch, place, layouts, rows, beside)
    if layout == _ITEMS:
        return _chosen(batch, index)
    beside = beside or any(isinstance(value, Tensor) and value.dim() > 0 for value in _values(batch))
    parts = [
        _chosen(value, index)
        if layout == _LISTS and _is_list(value)
        else _take(value, index, rows, layouts, at, beside)
        for at, value in _children(batch, place)
    ]
    if isinstance(batch, Mapping):
        items = dict(zip(batch, parts, strict=True))
        if isinstance(batch, dict):  # a defaultdict can't be made of its items alone
            taken = copy(batch)
            taken.update(items)
            return taken
        return type(batch)(items)  # type: ignore[call-arg]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _chosen(items: Any, index: Tensor) -> Any:
    return type(items)([items[i] for i in index.tolist()])
