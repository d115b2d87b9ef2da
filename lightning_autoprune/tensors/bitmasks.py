"""Masks as bits: clear, count and pack them, exactly and fast. Torch only.

A mask is an integer tensor with the item size of the weight: -1 where a weight is kept, 0 where it is pruned. AND on
the bits is several times faster than ``masked_fill`` or ``where`` on the CPU, and it clears exactly: NaN, infinity and
-0.0 become 0.0. A large mask that no longer changes takes one bit per entry, as a :class:`PackedMask`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["PackedMask", "as_bits", "pack", "pack_if_large", "unpack", "zero_pruned"]

_INTEGER_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by item size in bytes

_LARGE_MASK = 2**16  # entries; for smaller masks, the time to unpack matters more than the memory

_CHUNK = 2**15  # bytes of a packed mask; unpacked for float32 they are 1 MiB, which stays in the cache


def as_bits(x: Tensor) -> Tensor:
    """View a tensor as integers of its item size, in the same storage.

    AND with -1 leaves an entry as it is, and AND with 0 clears it, NaN and -0.0 included.
    """
    return x.view(_INTEGER_TYPES[x.element_size()])


class PackedMask:
    """A mask with one bit per entry.

    Args:
        bits: the mask as integers, -1 where an entry is kept and 0 where it is pruned; their item size must be that of
            the tensors to clear.

    Example:
        >>> mask = PackedMask(torch.tensor([-1, 0, -1], dtype=torch.int32))
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> mask.zero_pruned_(x)
        >>> x, mask.bool()
        (tensor([1., 0., 3.]), tensor([ True, False,  True]))
    """

    def __init__(self, bits: Tensor) -> None:
        self.shape = bits.shape
        self.packed = pack(bits.bool()).to(bits.device)
        ones = (torch.arange(256, device=bits.device).unsqueeze(1) >> torch.arange(8, device=bits.device)) & 1
        self._entries_of_byte = ones.neg().to(bits.dtype)  # shape (256, 8): the entries that each byte stands for

    def bool(self) -> Tensor:
        """Return the mask as a bool tensor, True where an entry is kept."""
        return unpack(self.packed.cpu(), self.shape).to(self.packed.device)

    def zero_pruned_(self, x: Tensor) -> None:
        """Set the pruned entries of a tensor of the mask's shape to 0.0, in place."""
        bits = as_bits(x)
        if not x.is_contiguous():
            bits.bitwise_and_(self._unpacked(self.packed)[: x.numel()].view(self.shape))
            return
        chunks = zip(torch.split(bits.view(-1), 8 * _CHUNK), torch.split(self.packed, _CHUNK), strict=True)
        for chunk, packed in chunks:
            chunk.bitwise_and_(self._unpacked(packed)[: len(chunk)])

    def _unpacked(self, packed: Tensor) -> Tensor:
        return self._entries_of_byte.index_select(0, packed.int()).view(-1)


def pack_if_large(bits: Tensor) -> Tensor | PackedMask:
    """Pack a mask that no longer changes if it is large enough for the memory to be worth the time."""
    return PackedMask(bits) if bits.numel() >= _LARGE_MASK else bits


def zero_pruned(x: Tensor, mask: Tensor | PackedMask) -> None:
    """Set the pruned entries of a tensor to 0.0, in place."""
    if isinstance(mask, PackedMask):
        mask.zero_pruned_(x)
    else:
        as_bits(x).bitwise_and_(mask)


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bytes of eight entries each, shape (ceil(numel / 8),), on the CPU."""
    flat = torch.nn.functional.pad(mask.flatten().cpu().to(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bytes that :func:`pack` made into a bool tensor of the given shape."""
    flat = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return flat.flatten()[: math.prod(shape)].view(tuple(shape)).bool()
