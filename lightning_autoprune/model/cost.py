"""What a model costs: floating-point operations and parameters by layer, dense and with the zeros left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from lightning_autoprune.model.example_inputs import outputs
from lightning_autoprune.model.prunable_layers import is_transposed_linear

__all__ = ["LayerCost", "ModelCost", "model_cost"]


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs.

    Attributes:
        flops: floating-point operations of all its matrix products and convolutions; a multiplication and an addition
            are two.
        effective_flops: those with weights that are not 0.
        parameters: number of its parameters.
        kept: number of those that are not 0.
    """

    flops: int
    effective_flops: int
    parameters: int
    kept: int


@dataclass(frozen=True)
class ModelCost(LayerCost):
    """What a model costs, in all and by layer.

    Attributes:
        layers: the cost of each layer that has parameters of its own, by name. Operations between layers are in the
            sum alone.
        tied: the names of all layers that have the same weight, by the name of each of them.
    """

    layers: dict[str, LayerCost]
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def flops_of(self, name: str) -> int:
        """Operations with the weight of a layer: its own, and those of the layers that share the weight."""
        return sum(self.layers[layer].flops for layer in self.tied.get(name, (name,)))

    def flops_left(self, sparsity: Mapping[str, float]) -> float:
        """Fraction of the operations, in [0, 1], that is left if layers have so many zeros.

        Args:
            sparsity: fraction of zeros of each layer's weights, by name; layers that are not there, and share no weight
                with one that is, have none.
        """
        of_each = {layer: zeros for name, zeros in sparsity.items() for layer in self.tied.get(name, (name,))}
        gone = sum(self.layers[name].flops * zeros for name, zeros in of_each.items() if name in self.layers)
        return 1 - gone / self.flops if self.flops else 1.0


def model_cost(model: nn.Module, example_input: Any) -> ModelCost:
    """Counts the operations of one forward, by torch's own counter, and how many of them are with zeros.

    Of linear layers (GPT-2's too) and convolutions the effective operations are the share of their weights that is not
    0. Everything else (attention, computed weights, products in the code of a ``forward``) counts as dense. Of a model
    from :func:`shrink`, ``flops`` is what runs; of a masked one, ``effective_flops`` is what would, if zeros cost
    nothing.

    Args:
        model: a module; run once, in evaluation mode, and left as it was.
        example_input: what its ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments. Give
            one row to have the cost of one row.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = model[0].weight.data[1:].zero_()
        >>> cost = model_cost(model, torch.zeros(1, 4))
        >>> cost.flops, cost.effective_flops, cost.layers["0"].effective_flops
        (36, 20, 8)
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _separate_products(), counter:
        outputs(model, example_input)
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    flops_of: dict[nn.Module, int] = defaultdict(int)  # counted under one of the names that a module has
    for name, module in model.named_modules(remove_duplicate=False):
        flops_of[module] += counts.get(name, 0)
    layers = {}
    sharing: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            whole = isinstance(module, (nn.Linear, _ConvNd, nn.MultiheadAttention)) or not list(module.children())
            flops = flops_of[module] if whole else 0
            kept = sum(int(p.count_nonzero()) for p in own)
            layers[name] = LayerCost(flops, round(flops * _density(module)), sum(p.numel() for p in own), kept)
            if (weight := _weight(module)) is not None:
                sharing[weight].append(name)
    parameters, total = list(model.parameters()), counter.get_total_flops()
    return ModelCost(
        flops=total,
        effective_flops=total - sum(layer.flops - layer.effective_flops for layer in layers.values()),
        parameters=sum(p.numel() for p in parameters),
        kept=sum(int(p.count_nonzero()) for p in parameters),
        layers=layers,
        tied={name: tuple(names) for names in sharing.values() if len(names) > 1 for name in names},
    )


@contextmanager
def _separate_products() -> Iterator[None]:
    """Without fused attention, and the fused recurrent layers of oneDNN and cuDNN, whose products are not counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    enabled = [library.enabled for library in libraries]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for library in libraries:
            library.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for library, flag in zip(libraries, enabled, strict=True):
            library.enabled = flag


def _weight(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("weight")  # reading one that is computed may change it (spectral norm)


def _density(module: nn.Module) -> float:
    weight = _weight(module)
    if weight is not None and (isinstance(module, (nn.Linear, _ConvNd)) or is_transposed_linear(module)):
        return float(weight.count_nonzero()) / max(weight.numel(), 1)
    return 1.0
