"""Which tensors somebody has written to, through ``.data`` too. Torch only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_autoprune.tensors.bitmasks import as_bits
from lightning_autoprune.tensors.sharding import local_shard

__all__ = ["WriteDetector"]


class WriteDetector:
    """Remembers tensors as they are, and tells which of them have been written to since.

    A count that torch keeps tells most of it at once. What is written through ``.data`` is not counted, and is seen by
    the sum of the bits, which takes a pass over all values.

    Args:
        tensors: to be watched; inference tensors, which can't be written to, are left out.
        check_values: whether ``modified(check_values=True)`` will be asked for.

    Example:
        >>> x, y, z = torch.ones(2), torch.ones(2), torch.ones(2)
        >>> detector = WriteDetector([x, y, z], check_values=True)
        >>> _ = x.add_(1), y.data.add_(2)
        >>> detector.modified(), detector.modified(check_values=True)
        ([tensor([2., 2.])], [tensor([2., 2.]), tensor([3., 3.])])
    """

    def __init__(self, tensors: Iterable[Tensor], *, check_values: bool = False) -> None:
        watched = [tensor for tensor in tensors if not tensor.is_inference()]
        self._before = [(t, t._version, _sum_of_bits(t) if check_values else None) for t in watched]
        self._found: set[int] = set()

    def modified(self, *, check_values: bool = False) -> list[Tensor]:
        """Those that have been written to by now.

        Args:
            check_values: whether to look at the values of those that no count tells of; such a find is remembered.
        """
        for t, version, bits in self._before if check_values else ():
            if t._version == version and bits is not None and bits != _sum_of_bits(t):
                self._found.add(id(t))
        return [t for t, version, _ in self._before if t._version != version or id(t) in self._found]


def _sum_of_bits(tensor: Tensor) -> int | None:
    """None for tensors of other kinds than usual, whose bits can't be read."""
    own = local_shard(tensor)
    usual = type(own) in (Tensor, nn.Parameter) and own.layout == torch.strided and own.element_size() <= 8
    return int(as_bits(own).sum(dtype=torch.int64)) if usual else None
