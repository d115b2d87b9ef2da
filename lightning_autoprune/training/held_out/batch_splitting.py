"""Splits a collated batch of tensors by their rows: at random, or over the ranks. Torch only.

It is for batches whose samples can't be chosen before they are collated, such as those of a stream. A batch can be
split if it is plain: tensors with the same number of rows, in dicts, tuples, lists and dataclasses. A list of more than
three tensors of one shape is not plain, because each of them may be a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.random_state import derive_seed

__all__ = ["count_rows", "draw_samples", "number_to_hold_out", "part_of_rank", "take_rows"]

_MAX_COLUMNS = 3  # of one shape: more of them may be samples


def number_to_hold_out(samples: int, fraction: float, min_samples: int = 0) -> int:
    """Return how many samples of a batch to hold out; 0 or all of them if the batch is too small.

    Args:
        samples: number of samples of the batch.
        fraction: fraction of them to hold out, in (0, 1), rounded to whole samples.
        min_samples: least number of samples of each part, whatever the fraction; half the batch if it is smaller.
    """
    min_samples = min(min_samples, samples // 2)
    return min(max(round(fraction * samples), min_samples), samples - min_samples)


def draw_samples(samples: int, held: int, *seeds: int) -> tuple[list[int], list[int]]:
    """Draw the samples to hold out; return the places of the others and of those, each in ascending order.

    Args:
        samples: number of samples.
        held: number of samples to hold out.
        seeds: integers that decide which.

    Example:
        >>> draw_samples(4, 1, 0)
        ([0, 1, 2], [3])
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(*seeds))).tolist()
    return sorted(order[held:]), sorted(order[:held])


def part_of_rank(batch: Any, rank: int, ranks: int) -> tuple[Any, float]:
    """Return one rank's rows of a batch that all ranks have; together the ranks have each row once.

    Args:
        batch: the batch.
        rank: the rank, from 0 to ``ranks`` - 1.
        ranks: number of ranks that divide the batch among them.

    Returns:
        Every ``ranks``-th row, and the weight of this part in a mean over the ranks, which is 1 if all parts have the
        same size. The whole batch and 1 if it is not plain, or if a part would have fewer than two rows, which
        BatchNorm needs.

    Example:
        >>> part_of_rank(torch.arange(5), 1, 2)
        (tensor([1, 3]), 0.8)
    """
    try:
        rows = count_rows(batch)
    except AutoPruneError:
        return batch, 1.0
    if rows < 2 * ranks:
        return batch, 1.0
    places = list(range(rank, rows, ranks))
    return take_rows(batch, places), len(places) * ranks / rows


def count_rows(batch: Any) -> int:
    """Return the number of rows of a plain batch.

    Raises:
        AutoPruneError: for a batch that is not plain; says what is in it.
    """
    rows: dict[int, tuple[int, ...]] = {}
    for tensor in _tensors(batch):
        rows.setdefault(tensor.size(0), tuple(tensor.shape))
    if not rows:
        raise AutoPruneError(f"a batch of type {type(batch).__name__} has no tensor with rows")
    if len(rows) > 1:
        one, other, *_ = rows.values()
        raise AutoPruneError(f"a batch has tensors of {one[0]} and of {other[0]} rows (shapes {one} and {other})")
    return next(iter(rows))


def take_rows(batch: Any, places: Sequence[int]) -> Any:
    """Return some rows of a plain batch.

    Args:
        batch: the batch; see :func:`count_rows`.
        places: the places of the rows.

    Example:
        >>> take_rows((torch.arange(4), {"y": torch.ones(4, 2)}), [0, 2])
        (tensor([0, 2]), {'y': tensor([[1., 1.],
                [1., 1.]])})
    """
    index = torch.tensor(places, dtype=torch.long)
    return _map(batch, lambda tensor: tensor[index.to(tensor.device)])


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a plain batch."""
    if type(batch) is Tensor and batch.dim() > 0 and batch.layout == torch.strided and not batch.is_nested:
        yield batch
        return
    parts = _parts(batch)
    if parts is None:
        what = f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else "an object"
        raise AutoPruneError(f"a batch has {what} of type {type(batch).__name__}, whose rows can't be told apart")
    if isinstance(batch, (list, tuple)) and len(parts) > _MAX_COLUMNS and _are_alike(parts):
        raise AutoPruneError(f"a batch has a {type(batch).__name__} of {len(parts)} tensors, and each may be a sample")
    for part in parts:
        yield from _tensors(part)


def _are_alike(parts: Sequence[Any]) -> bool:
    """Return True for tensors of one shape and dtype."""
    return all(isinstance(part, Tensor) for part in parts) and len({(p.shape, p.dtype) for p in parts}) == 1


def _parts(batch: Any) -> list[Any] | None:
    """Return what is in a container; None if it is not one of those in which a plain batch may be nested."""
    if batch is None:
        return []
    if type(batch) is dict:
        return list(batch.values())
    if type(batch) in (list, tuple) or _is_namedtuple(batch):
        return list(batch)
    if _is_plain_dataclass(batch):
        return [getattr(batch, field.name) for field in fields(batch)]
    return None


def _map(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if batch is None:
        return None
    if type(batch) is dict:
        return {key: _map(value, function) for key, value in batch.items()}
    if _is_namedtuple(batch):
        return type(batch)(*(_map(value, function) for value in batch))
    if is_dataclass(batch) and not isinstance(batch, type):
        mapped = copy(batch)  # not made anew: `__post_init__` has changed the fields of this one already
        for field in fields(batch):
            object.__setattr__(mapped, field.name, _map(getattr(batch, field.name), function))
        return mapped
    return type(batch)(_map(value, function) for value in batch)


def _is_namedtuple(batch: Any) -> bool:
    return isinstance(batch, tuple) and type(batch).__bases__ == (tuple,) and hasattr(batch, "_fields")


def _is_plain_dataclass(batch: Any) -> bool:
    """Return True for a dataclass that is nothing else, and that has no attributes besides the fields it is made of."""
    cls = type(batch)
    if not (is_dataclass(batch) and all(is_dataclass(base) for base in cls.__mro__[:-1])):
        return False
    names = [field.name for field in fields(cls) if field.init]
    attributes = getattr(batch, "__dict__", {}).keys()  # none with `slots=True`
    return len(names) == len(fields(cls)) and attributes <= {*names} and all(hasattr(batch, name) for name in names)
