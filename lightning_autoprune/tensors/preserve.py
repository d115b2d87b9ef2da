"""Buffers, and other tensors, that a block may write to and that are afterwards as they were. Torch only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["preserve_buffers", "preserve_values"]


@contextmanager
def preserve_values(tensors: Collection[Tensor]) -> Iterator[None]:
    """Puts the values of tensors back; inference tensors and expanded ones can't be written to here.

    Example:
        >>> x = torch.ones(2)
        >>> with preserve_values([x]):
        ...     _ = x.zero_()
        >>> x
        tensor([1., 1.])
    """
    saved = [(t, t.detach().clone()) for t in tensors if not (t.is_inference() or _is_expanded(t))]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)


def _is_expanded(tensor: Tensor) -> bool:
    strided = tensor.layout == torch.strided
    return strided and any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


@contextmanager
def preserve_buffers(module: nn.Module) -> Iterator[None]:
    """Puts back the buffers of one module, not of those in it: the same tensors, with the same values."""
    saved = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    with preserve_values(saved.values()):
        try:
            yield
        finally:
            if not isinstance(module, torch.jit.ScriptModule):  # whose code can't put others in their place
                module._buffers.update(saved)
