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


def split_batch(batch: Any, fraction: float, *seeds: int, least: int = 0) -> tuple[Any, Any]:
    """Splits the rows of a batch at random into a training part and a held-out part.

    Tensors are split along their first dimension, whatever they are nested in (dict, tuple, named tuple, list);
    other lists and tuples of as many items are split by item, such as the texts of the default collation; scalars and
    strings go to both parts.

    Args:
        batch: what a data loader gives; all tensors have as many rows.
        fraction: share of the rows to hold out, in (0, 1), rounded to whole rows.
        seeds: integers that decide which rows.
        least: rows that each part has, whatever the fraction, where the batch is large enough; else half of it.

    Returns:
        Training part and held-out part; the whole batch and None where one of them would be empty.

    Raises:
        AutoPruneError: if the batch has no rows, or parts with different numbers of rows.

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
        raise AutoPruneError(
            f"A batch of type {type(batch).__name__} has no tensor with rows to hold out: pass"
            ' `held_out=DataLoader(...)` or `held_out="train"`.'
        )
    return rows


def _rows(batch: Any) -> Iterator[int]:
    """Numbers of rows of the tensors in a batch, outermost first."""
    if isinstance(batch, Tensor):
        if batch.dim() > 0:
            yield batch.size(0)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _rows(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _rows(value)


def _take(batch: Any, index: Tensor, rows: int) -> Any:
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            return batch
        if batch.size(0) != rows:
            raise AutoPruneError(
                f"A batch has tensors of {rows} and of {batch.size(0)} rows (shape {tuple(batch.shape)}), so its rows"
                ' can\'t be split: pass `held_out=DataLoader(...)` or `held_out="train"`.'
            )
        return batch[index.to(batch.device)]
    if isinstance(batch, Mapping):
        parts = {key: _take(value, index, rows) for key, value in batch.items()}
        if isinstance(batch, dict):  # a defaultdict can't be made of its items alone
            taken = copy(batch)
            taken.update(parts)
            return taken
        return type(batch)(parts)  # type: ignore[call-arg]
    if hasattr(batch, "_fields"):
        return type(batch)(*(_take(value, index, rows) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_items(batch, index, rows))
    if batch is None or isinstance(batch, (str, bytes, int, float, bool, complex)):
        return batch
    raise AutoPruneError(
        f"A batch holds a {type(batch).__name__}, whose rows can't be split: pass `held_out=DataLoader(...)` or"
        ' `held_out="train"`.'
    )


def _items(batch: Sequence[Any], index: Tensor, rows: int) -> list[Any]:
    """The chosen rows of each column, as the default collation makes them, or else the chosen items."""
    try:
        columns = [_take(value, index, rows) for value in batch]
        if len(batch) != rows or next(_rows(batch), None) is not None:
            return columns
    except AutoPruneError:
        if len(batch) != rows:
            raise
    return [batch[i] for i in index.tolist()]
