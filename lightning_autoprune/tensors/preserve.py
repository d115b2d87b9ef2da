"""Context managers after which tensors or buffers are as they were before the block. Torch only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["preserve_buffers", "preserve_values"]


@contextmanager
def preserve_values(tensors: Collection[Tensor]) -> Iterator[None]:
    """Restore the values of tensors after the block.

    Inference tensors and expanded tensors are left out: they can't be written to.

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
    """Restore the buffers of one module after the block: the same tensors, with the same values.

    Buffers of submodules are not restored.
    """
    saved = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    with preserve_values(saved.values()):
        try:
            yield
        finally:
            if not isinstance(module, torch.jit.ScriptModule):  # compiled code can't have replaced a buffer
                module._buffers.update(saved)
