"""Context managers after which tensors or buffers are as they were before the block. Torch only."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["preserve_attributes", "preserve_buffers", "preserve_values"]


@contextmanager
def preserve_values(tensors: Collection[Tensor]) -> Iterator[None]:
    """Restore the values of tensors after the block.

    Autograd does not take the restoring for a change: a backward pass that was pending before the block can still run.
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
        for tensor, value in saved:
            tensor.data.copy_(value)  # past the version counter


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


@contextmanager
def preserve_attributes(objects: Iterable[object]) -> Iterator[None]:
    """Restore the attributes of Python objects after the block, and the items of lists, dicts and sets among them.

    Tensors and other objects among them keep the values that they have by then.

    Example:
        >>> module = nn.Identity()
        >>> module.count, module.losses = 1, [0.5]
        >>> with preserve_attributes([module]):
        ...     module.count += 1
        ...     module.losses.append(0.25)
        >>> module.count, module.losses
        (1, [0.5])
    """
    saved = [(vars(thing), {name: (value, _items(value)) for name, value in vars(thing).items()}) for thing in objects]
    try:
        yield
    finally:
        for attributes, values in saved:
            for name in attributes.keys() - values.keys():
                del attributes[name]
            for name, (value, items) in values.items():
                attributes[name] = value
                if items is not None:
                    _restore(value, items)


def _items(value: Any) -> Any:
    """Return a copy of a container, which holds the same items; None for anything else."""
    return value.copy() if type(value) in (list, dict, OrderedDict, set, deque) else None


def _restore(container: Any, items: Any) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(items)
    else:
        container.update(items)
