"""Many small tensors as one flat tensor, and large ones in pieces, so that neither costs more than it must. Torch only.

An elementwise operation costs its call on a small tensor, and the way of every entry through the memory on a large one.
A :class:`Bucket` holds small tensors one after the other, or a large one alone; :func:`split_pieces` cuts what
is in it into parts that stay in the processor's cache through a sequence of operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Bucket", "fill_buckets", "split_pieces"]

_PIECE = 2**16  # entries: of eight tensors of float32, 2 MiB

_PIECE_ON_AN_ACCELERATOR = 2**24  # where a call costs more, and nothing is gained by staying in a cache

_SMALL = 2**14  # entries; larger tensors have a bucket of their own


class Bucket:
    """Some tensors of a list, whose entries have an order: that of their memory, one tensor after the other.

    Args:
        numbers: their places in the list.
        tensors: the list; of theirs the shapes, strides, dtype and device are taken.

    Attributes:
        numbers: as given.
        sizes: number of entries of each.
        total: of all.

    Example:
        >>> weights = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0]), torch.tensor([4.0])]
        >>> bucket = Bucket([0, 2], weights)
        >>> flat = bucket.flatten(weights)
        >>> flat
        tensor([1., 2., 4.])
        >>> bucket.write(flat.mul_(10), weights)
        >>> weights[0], weights[2], bucket.views(flat)[0]
        (tensor([[10., 20.]]), tensor([40.]), tensor([[10., 20.]]))
    """

    def __init__(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        mine = [tensors[i] for i in numbers]
        self.numbers = list(numbers)
        self.sizes = [t.numel() for t in mine]
        self.total = sum(self.sizes)
        self._ends = torch.tensor([0, *self.sizes], device=mine[0].device).cumsum(0)
        self._shapes = [t.shape for t in mine]
        self._strides = [torch.empty_like(t, device="meta").stride() for t in mine]  # dense, whatever those of t

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor, in the shapes and strides of the tensors."""
        places = zip(torch.split(flat, self.sizes), self._shapes, self._strides, strict=True)
        return [part.as_strided(shape, stride) for part, shape, stride in places]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The entries of its tensors in one flat tensor: of a tensor that is alone, its own memory if that is dense.

        Args:
            tensors: a list like the first one, of any one dtype.
        """
        parts = [_flat(tensors[i], stride) for i, stride in zip(self.numbers, self._strides, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sums(self, flat: Tensor) -> Tensor:
        """The sum of a flat tensor of small integers over each of the tensors, shape (len(numbers),)."""
        upto = torch.cumsum(flat, 0)
        return torch.cat([upto.new_zeros(1), upto])[self._ends].diff()

    def write(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Writes what :meth:`flatten` gave, after it was changed in place, into the tensors."""
        mine = [tensors[i] for i in self.numbers]
        if flat.data_ptr() != mine[0].data_ptr():
            torch._foreach_copy_(mine, self.views(flat))


def _flat(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The entries in the order that a stride lays them out in; the tensor's own memory where that is its stride."""
    if tensor.stride() == stride:
        return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
    copy = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return _flat(copy, stride)


def fill_buckets(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Bucket]:
    """Buckets of tensors that go together: of the same dtype and device, not too many entries.

    Args:
        tensors: all.
        sizes: numbers of entries to go by: of whole tensors, where ranks have parts of them, so that all ranks have the
            same buckets.

    Example:
        >>> tensors = [torch.zeros(5), torch.zeros(99_999), torch.zeros(5)]
        >>> [bucket.numbers for bucket in fill_buckets(tensors, [t.numel() for t in tensors])]
        [[0, 2], [1]]
    """
    buckets: list[list[int]] = []
    open_ones: dict[object, list[int]] = {}  # by dtype and device, those with room
    for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        if size > _SMALL:
            buckets.append([i])
            continue
        key = (tensor.dtype, tensor.device)
        if key not in open_ones or sum(sizes[j] for j in open_ones[key]) + size > _PIECE:
            open_ones[key] = []
            buckets.append(open_ones[key])
        open_ones[key].append(i)
    return [Bucket(bucket, tensors) for bucket in buckets]


def split_pieces(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors of the same length, cut alike into parts that are worked on one after the other.

    Example:
        >>> [len(part) for part, _ in split_pieces(torch.zeros(100_000), torch.ones(100_000))]
        [65536, 34464]
    """
    size = _PIECE if flat[0].device.type == "cpu" else _PIECE_ON_AN_ACCELERATOR
    if len(flat[0]) <= size:
        return iter([flat])
    return zip(*(torch.split(tensor, size) for tensor in flat), strict=True)
