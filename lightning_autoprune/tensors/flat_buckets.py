"""Many small tensors as one flat tensor, and large ones in pieces, for fast elementwise operations. Torch only.

An elementwise operation on a small tensor spends most of its time in the call; on a large one, in moving the entries
through memory. A :class:`Bucket` therefore lays small tensors one after the other in one flat tensor, and holds a large
one alone. :func:`split_pieces` cuts flat tensors into pieces that stay in the processor's cache through a sequence of
operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Bucket", "fill_buckets", "split_pieces"]

_PIECE = 2**16  # entries; eight tensors of float32 then take 2 MiB

_PIECE_ON_ACCELERATOR = 2**24  # entries; there a call costs more, and staying in a cache gains nothing

_SMALL = 2**14  # entries; larger tensors get a bucket of their own


class Bucket:
    """Some tensors of a list, and how their entries are laid out in one flat tensor.

    The entries of a tensor come in the order of its memory, one tensor after the other.

    Args:
        numbers: the indices of the bucket's tensors in the list.
        tensors: the list. Only shapes, strides, dtypes and devices are read.

    Attributes:
        numbers: the indices, as given.
        sizes: number of entries of each tensor in the bucket.
        total: number of entries of all of them.

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
        members = [tensors[i] for i in numbers]
        self.numbers = list(numbers)
        self.sizes = [t.numel() for t in members]
        self.total = sum(self.sizes)
        self._ends = torch.tensor([0, *self.sizes], device=members[0].device).cumsum(0)
        self._shapes = [t.shape for t in members]
        # the strides that a new tensor of this memory order would have: without gaps, even if t has some
        self._strides = [torch.empty_like(t, device="meta").stride() for t in members]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat tensor, with the shapes and the memory order of the bucket's tensors."""
        slices = zip(torch.split(flat, self.sizes), self._shapes, self._strides, strict=True)
        return [entries.as_strided(shape, stride) for entries, shape, stride in slices]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the entries of the bucket's tensors as one flat tensor.

        The result shares memory with a tensor that is alone in its bucket and has no gaps; else it is a copy.

        Args:
            tensors: a list with the shapes of the first one, all of one dtype.
        """
        flattened = [_flatten(tensors[i], stride) for i, stride in zip(self.numbers, self._strides, strict=True)]
        return flattened[0] if len(flattened) == 1 else torch.cat(flattened)

    def sums(self, flat: Tensor) -> Tensor:
        """Return the sum of a flat integer tensor over each of the bucket's tensors, shape (len(numbers),)."""
        running = torch.cumsum(flat, 0)
        return torch.cat([running.new_zeros(1), running])[self._ends].diff()

    def write(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write the result of :meth:`flatten`, changed in place since, back into the tensors."""
        members = [tensors[i] for i in self.numbers]
        if flat.data_ptr() != members[0].data_ptr():
            torch._foreach_copy_(members, self.views(flat))


def _flatten(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the entries in the order of a stride without gaps; the tensor's own memory if that is its stride."""
    if tensor.stride() == stride:
        return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
    copy = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return _flatten(copy, stride)


def fill_buckets(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Bucket]:
    """Group tensors into buckets: small ones of the same dtype and device together, each large one alone.

    Args:
        tensors: all tensors.
        sizes: the number of entries that decides about each tensor. For sharded tensors that is the size of the whole,
            so that all ranks get the same buckets.

    Example:
        >>> tensors = [torch.zeros(5), torch.zeros(99_999), torch.zeros(5)]
        >>> [bucket.numbers for bucket in fill_buckets(tensors, [t.numel() for t in tensors])]
        [[0, 2], [1]]
    """
    groups: list[list[int]] = []
    open_groups: dict[object, list[int]] = {}  # those with room, by dtype and device
    for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        if size > _SMALL:
            groups.append([i])
            continue
        key = (tensor.dtype, tensor.device)
        if key not in open_groups or sum(sizes[j] for j in open_groups[key]) + size > _PIECE:
            open_groups[key] = []
            groups.append(open_groups[key])
        open_groups[key].append(i)
    return [Bucket(group, tensors) for group in groups]


def split_pieces(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut flat tensors of the same length into pieces at the same places, to be worked on one after the other.

    Example:
        >>> [len(piece) for piece, _ in split_pieces(torch.zeros(100_000), torch.ones(100_000))]
        [65536, 34464]
    """
    size = _PIECE if flat[0].device.type == "cpu" else _PIECE_ON_ACCELERATOR
    if len(flat[0]) <= size:
        return iter([flat])
    return zip(*(torch.split(tensor, size) for tensor in flat), strict=True)
