"""Detects which tensors have been written to, also through ``.data``. Torch only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_autoprune.tensors.bitmasks import as_bits
from lightning_autoprune.tensors.sharding import local_shard

__all__ = ["WriteDetector"]


class WriteDetector:
    """Remembers the state of tensors, and reports which of them have been written to since.

    Most writes increment a version counter that torch keeps, which is cheap to read. Writes through ``.data`` do not.
    They are found by the sum of a tensor's bits, which takes a pass over all values.

    Args:
        tensors: the tensors to watch. Inference tensors are left out: they can't be written to.
        check_values: whether ``modified(check_values=True)`` will be called, which needs the sums of now.

    Example:
        >>> x, y, z = torch.ones(2), torch.ones(2), torch.ones(2)
        >>> detector = WriteDetector([x, y, z], check_values=True)
        >>> _ = x.add_(1), y.data.add_(2)
        >>> detector.modified(), detector.modified(check_values=True)
        ([tensor([2., 2.])], [tensor([2., 2.]), tensor([3., 3.])])
    """

    def __init__(self, tensors: Iterable[Tensor], *, check_values: bool = False) -> None:
        self._before: list[tuple[Tensor, int, int | None]] = []
        self._changed_values: set[int] = set()  # the ids of tensors that were found by their values
        self.watch(tensors, check_values=check_values)

    def watch(self, tensors: Iterable[Tensor], *, check_values: bool = False) -> None:
        """Watch these tensors from now on; those that were watched already keep their remembered state.

        Args:
            tensors: as for the class.
            check_values: as for the class.
        """
        known = {id(entry[0]): entry for entry in self._before}
        watched = [tensor for tensor in tensors if not tensor.is_inference()]
        self._before = [known.get(id(t)) or (t, t._version, _sum_bits(t) if check_values else None) for t in watched]
        self._changed_values &= {id(t) for t in watched}

    def modified(self, *, check_values: bool = False) -> list[Tensor]:
        """Return the tensors that have been written to since the detector was made.

        Args:
            check_values: whether to compare the values of tensors whose version is unchanged. A tensor found in this
                way is reported by all later calls too.
        """
        for t, version, bits in self._before if check_values else ():
            if t._version == version and bits is not None and bits != _sum_bits(t):
                self._changed_values.add(id(t))
        return [t for t, version, _ in self._before if t._version != version or id(t) in self._changed_values]


def _sum_bits(tensor: Tensor) -> int | None:
    """Sum a tensor's bits as integers; None for kinds of tensors whose bits can't be viewed as integers."""
    shard = local_shard(tensor)
    has_plain_bits = (
        type(shard) in (Tensor, nn.Parameter) and shard.layout == torch.strided and shard.element_size() <= 8
    )
    return int(as_bits(shard).sum(dtype=torch.int64)) if has_plain_bits else None
