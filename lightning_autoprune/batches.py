"""The rows of a batch, whatever it is nested in: split at random, or shared out over ranks. Torch only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.random_numbers import mix

__all__ = ["batch_rows", "shard_batch", "split_batch"]

_INSTEAD = 'pass `held_out=DataLoader(...)` or `held_out="train"`.'


def split_batch(batch: Any, fraction: float, *seeds: int, least: int = 0) -> tuple[Any, Any]:
    """Splits the rows of a batch at random into a training part and a held-out part.

    Tensors are split along their first dimension, whatever they are nested in (dict, tuple, named tuple, list);
    other lists and tuples of as many items are split by item, such as the texts of the default collation, and so are
    lists with an item for each row, as ``tuple(zip(*samples))`` makes them; scalars and strings go to both parts.

    Args:
        batch: what a data loader gives; all tensors have as many rows.
        fraction: share of the rows to hold out, in (0, 1), rounded to whole rows.
        seeds: integers that decide which rows.
        least: rows that each part has, whatever the fraction, where the batch is large enough; else half of it.

    Returns:
        Training part and held-out part; the whole batch and None where one of them would be empty.

    Raises:
        AutoPruneError: if the batch has no rows, parts with different numbers of rows, or lists of which it can't be
            told whether an item is a row.

    Example:
        >>> train, held_out = split_batch((torch.arange(4), torch.ones(4, 2)), 0.25, 0)
        >>> [len(part) for part in train], [len(part) for part in held_out]
        ([3, 3], [1, 1])
    """
    rows = batch_rows(batch)
    least = min(least, rows // 2)
    held = min(max(round(fraction * rows), least), rows - least)
    if not 0 < held < rows:
        return batch, None
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(mix(*seeds)))
    return _take(batch, order[held:], rows), _take(batch, order[:held], rows)


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
    rows = batch_rows(batch)
    if rows < 2 * ranks:
        return batch, 1.0
    index = torch.arange(rank, rows, ranks)
    return _take(batch, index, rows), len(index) * ranks / rows


def batch_rows(batch: Any) -> int:
    """Number of rows of a batch: that of the first tensor in it.

    Raises:
        AutoPruneError: if there is none.
    """
    rows = next(_rows(batch), None)
    if rows is None:
        raise AutoPruneError(f"A batch of type {type(batch).__name__} has no tensor with rows to hold out: {_INSTEAD}")
    return rows


def _rows(batch: Any) -> Iterator[int]:
    """Numbers of rows of the tensors in a batch, outermost first."""
    if (listed := _listed_rows(batch)) is not None:
        yield listed
    elif isinstance(batch, Tensor):
        if batch.dim() > 0:
            yield batch.size(0)
    else:
        for value in _values(batch):
            yield from _rows(value)


def _listed_rows(batch: Any) -> int | None:
    """The number of rows where they are the items of lists beside each other, as ``tuple(zip(*samples))`` makes them.

    That is so if some hold tensors and others plain values (labels, texts), which the default collation never leaves,
    or if the tensors have different numbers of rows, as images and boxes have.

    Raises:
        AutoPruneError: if all items hold tensors of as many rows, so that the lists may hold columns as well.
    """
    lists = [value for value in _values(batch) if _is_list(value)]
    if len(lists) < 2 or len({len(items) for items in lists}) > 1:
        return None
    each = [set(_rows(item)) for items in lists for item in items]
    found = set().union(*each)
    if len(found) > 1 or (found and any(all(map(_is_plain, items)) for items in lists)):
        return len(lists[0])
    if found and all(each):
        raise AutoPruneError(
            f"A batch has {len(lists)} lists of {len(lists[0])} items with tensors of {found.pop()} rows, and it can't"
            f" be told whether an item is a row or a column: stack the tensors, or {_INSTEAD}"
        )
    return None


def _values(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (list, tuple)) else []


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")


def _is_plain(item: Any) -> bool:
    return isinstance(item, (str, bytes, int, float)) or (isinstance(item, Tensor) and item.dim() == 0)


def _take(batch: Any, index: Tensor, rows: int) -> Any:
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
    by_item = _listed_rows(batch) == rows

    def part(value: Any) -> Any:
        if by_item and _is_list(value):
            return type(value)(_chosen(value, index))
        return _take(value, index, rows)

    if isinstance(batch, Mapping):
        parts = {key: part(value) for key, value in batch.items()}
        if isinstance(batch, dict):  # a defaultdict can't be made of its items alone
            taken = copy(batch)
            taken.update(parts)
            return taken
        return type(batch)(parts)  # type: ignore[call-arg]
    if hasattr(batch, "_fields"):
        return type(batch)(*map(part, batch))
    if by_item:
        return type(batch)(list(map(part, batch)))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_items(batch, index, rows))
    if batch is None or isinstance(batch, (str, bytes, int, float, bool, complex)):
        return batch
    raise AutoPruneError(f"A batch holds a {type(batch).__name__}, whose rows can't be split: {_INSTEAD}")


def _items(batch: Sequence[Any], index: Tensor, rows: int) -> list[Any]:
    """The chosen rows of each column, as the default collation makes them, or else the chosen items."""
    try:
        columns = [_take(value, index, rows) for value in batch]
        if len(batch) != rows or next(_rows(batch), None) is not None:
            return columns
    except AutoPruneError:
        if len(batch) != rows:
            raise
    return _chosen(batch, index)


def _chosen(items: Sequence[Any], index: Tensor) -> list[Any]:
    return [items[i] for i in index.tolist()]
