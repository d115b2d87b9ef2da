"""Splits the samples of a collated batch, however it is nested: at random, or over the ranks. Torch only.

A container holds its samples in one of three layouts:

* items: each item is a sample (``[sample, sample, …]``);
* lists: each item of each of its lists belongs to a sample (``tuple(zip(*samples))``);
* columns: the samples are the rows of the tensors in it, as the default collation makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.random_state import derive_seed

__all__ = ["UnclearSamplesError", "count_samples", "hold_out", "number_to_hold_out", "part_of_rank", "split_batch"]

Layouts = dict[str, str]  # by the container's place in the batch, such as "['boxes'][0]"

_ITEMS, _LISTS, _COLUMNS = "items", "lists", "columns"

_WAY_OUT = 'pass `held_out=DataLoader(...)` or `held_out="train"`.'


class UnclearSamplesError(AutoPruneError):
    """Neither a batch nor the batches before it make clear what a sample is."""


def split_batch(
    batch: Any, fraction: float, *seeds: int, min_samples: int = 0, layouts: Layouts | None = None
) -> tuple[Any, Any]:
    """Split the samples of a batch at random into a training part and a held-out part.

    Tensors are split along their first dimension, however they are nested (dict, tuple, named tuple, list). Lists of
    samples, and lists with one item per sample, are split by item; examples are the texts of the default collation, and
    what ``tuple(zip(*samples))`` makes. Scalars and strings go to both parts.

    Args:
        batch: a batch of a data loader; all its tensors have the same number of rows.
        fraction: fraction of the samples to hold out, in (0, 1), rounded to whole samples.
        seeds: integers that decide which samples.
        min_samples: least number of samples of each part, whatever the fraction; half the batch if it is smaller.
        layouts: the layouts of earlier batches, used if this one's is unclear; a clear one is added.

    Returns:
        The training part and the held-out part; the whole batch and None if one of them would be empty.

    Raises:
        UnclearSamplesError: if it is unclear whether an item of a list is a sample.
        AutoPruneError: if there are no samples, or tensors with different numbers of rows.

    Example:
        >>> train, held_out = split_batch((torch.arange(4), torch.ones(4, 2)), 0.25, 0)
        >>> [len(part) for part in train], [len(part) for part in held_out]
        ([3, 3], [1, 1])
    """
    layouts = {} if layouts is None else layouts
    samples = count_samples(batch, layouts)
    held = number_to_hold_out(samples, fraction, min_samples)
    return hold_out(batch, samples, held, *seeds, layouts=layouts)


def hold_out(batch: Any, samples: int, held: int, *seeds: int, layouts: Layouts) -> tuple[Any, Any]:
    """Split a batch whose number of samples is known; see :func:`split_batch` for the result.

    Args:
        batch: the batch.
        samples: number of its samples.
        held: number of samples to hold out.
        seeds: integers that decide which samples.
        layouts: the layouts of the batches so far, this one included.
    """
    if not 0 < held < samples:
        return batch, None
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(*seeds)))
    return _take(batch, order[held:], samples, layouts), _take(batch, order[:held], samples, layouts)


def number_to_hold_out(samples: int, fraction: float, min_samples: int = 0) -> int:
    """Return how many samples :func:`split_batch` holds out; 0 or all of them if the batch can't be split."""
    min_samples = min(min_samples, samples // 2)
    return min(max(round(fraction * samples), min_samples), samples - min_samples)


def part_of_rank(batch: Any, rank: int, ranks: int) -> tuple[Any, float]:
    """Return one rank's samples of a batch that all ranks have; together the ranks have each sample once.

    Args:
        batch: the batch, see :func:`split_batch`.
        rank: the rank, from 0 to ``ranks`` - 1.
        ranks: number of ranks that divide the batch among them.

    Returns:
        Every ``ranks``-th sample, and the weight of this part in a mean over the ranks, which is 1 if all parts have
        the same size. The whole batch and 1 if a part would have fewer than two samples, which BatchNorm needs.

    Example:
        >>> part_of_rank(torch.arange(5), 1, 2)
        (tensor([1, 3]), 0.8)
    """
    layouts: Layouts = {}
    samples = count_samples(batch, layouts)
    if samples < 2 * ranks:
        return batch, 1.0
    index = torch.arange(rank, samples, ranks)
    return _take(batch, index, samples, layouts), len(index) * ranks / samples


def count_samples(batch: Any, layouts: Layouts | None = None) -> int:
    """Return the number of samples of a batch.

    It is the number of rows of the least nested tensor, or the number of items if those are the samples.

    Args:
        batch: the batch, see :func:`split_batch`.
        layouts: the layouts of earlier batches; a clear one is added.

    Raises:
        UnclearSamplesError: if it is unclear whether an item of a list is a sample.
        AutoPruneError: if there are no samples.
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
    raise AutoPruneError(f"A batch of type {type(batch).__name__} has no tensor with samples to hold out: {_WAY_OUT}")


def _layout(batch: Any, place: str, layouts: Layouts, rows: int | None = None, beside: bool = False) -> str:
    """Return the layout of a container.

    Args:
        batch: the container.
        place: its place in the batch.
        layouts: the layouts of earlier batches; a clear one is added.
        rows: number of samples, if it is known.
        beside: whether a tensor stands beside the container, or beside a container around it.

    Raises:
        UnclearSamplesError: if it is unclear whether an item of a list is a sample.
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
            raise UnclearSamplesError(
                f"A batch has {len(lists)} lists of {len(lists[0])} items with tensors of {found.pop()} rows, and it is"
                f" unclear whether an item is a sample or a column: stack the tensors, or {_WAY_OUT}"
            )
        else:
            alike = isinstance(values[0], Mapping) and len(set(map(_form, values))) == 1
            return _ITEMS if beside and may_be[_ITEMS] and alike else _COLUMNS
    layouts.setdefault(place, told)
    return told


def _told_by_kinds(values: list[Any]) -> str | None:
    """Return the layout of containers of one form, by what is alike in them: each is a sample, or a field of samples.

    None if they may be columns, which have no plain values, and the same number of rows in all tensors. Lists in a dict
    do not count: lists of boxes may stand beside the columns of each view.
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
    """Return True if the values of each group are of one kind; None stands for a missing value of any kind."""
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
    """Yield the number of rows of each tensor in a batch; without `lists`, those in its lists are left out."""
    if isinstance(batch, Tensor) and batch.dim() > 0:
        yield batch.size(0)
    elif lists or not _is_list(batch):
        for value in _values(batch):
            yield from _rows(value, lists)


def _children(batch: Any, place: str) -> list[tuple[str, Any]]:
    """Return the contents of a container, each with its place in the batch."""
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
    """Return True for a plain value, or if there is one outside of lists, where texts may be a column's entries."""
    return _is_plain(item) or (not _is_list(item) and any(map(_has_plain, _values(item))))


def _has_columns(batch: Any, place: str, layouts: Layouts, rows: int, beside: bool) -> bool:
    """Return True if the contents of a container can be split as columns of so many rows."""
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
                f"A batch has tensors of {rows} and of {batch.size(0)} rows (shape {tuple(batch.shape)}), so its"
                f" samples can't be split: {_WAY_OUT}"
            )
        if batch.layout == torch.sparse_coo:
            return batch.index_select(0, index.to(batch.device))
        if batch.layout != torch.strided or batch.is_nested:
            raise AutoPruneError(
                f"A batch has a tensor of the layout {'nested' if batch.is_nested else batch.layout}, whose samples"
                f" can't be split: {_WAY_OUT}"
            )
        return batch[index.to(batch.device)]
    if batch is None or isinstance(batch, (str, bytes, int, float, bool, complex)):
        return batch
    if not isinstance(batch, (Mapping, list, tuple)):
        raise AutoPruneError(f"A batch holds a {type(batch).__name__}, whose samples can't be split: {_WAY_OUT}")
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
