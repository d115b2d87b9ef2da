"""Example inputs: how a model is called with one, others of the same kind, and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_arguments", "outputs", "probes", "tensors_in"]


def as_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for ``forward``."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)), {}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in an output of nested containers."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


def probes(example_input: Any) -> Iterable[Any]:
    """The example, then inputs of the same kind: normal numbers for floating ones, a permutation for others."""
    generator = torch.Generator().manual_seed(0)

    def other(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if tensor.is_floating_point():
            scale = float(tensor.std()) if tensor.numel() > 1 and tensor.std() > 0 else 1.0
            return (scale * torch.randn(tensor.shape, generator=generator)).to(tensor)
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)

    yield example_input
    for _ in range(3):
        yield torch.utils._pytree.tree_map(other, example_input)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that a model gives in evaluation mode; its modes are left as they were."""
    args, kwargs = as_arguments(inputs)
    modes = {module: module.training for module in model.modules()}
    try:
        return list(tensors_in(model.eval()(*args, **kwargs)))
    finally:
        for module, mode in modes.items():
            module.training = mode
