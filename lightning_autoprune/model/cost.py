"""Count what a model costs: floating-point operations and parameters by layer, with and without the zero weights."""

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

from lightning_autoprune.model.forward import ExampleInput, run_model
from lightning_autoprune.model.weight_places import is_plain_linear

__all__ = ["LayerCost", "ModelCost", "model_cost"]


@dataclass(frozen=True)
class LayerCost:
    """The cost of a layer.

    Attributes:
        flops: floating-point operations of all its matrix products and convolutions; a multiplication and an addition
            count as two.
        effective_flops: those with weights that are not 0.
        parameters: number of its parameters.
        kept: number of its parameters that are not 0.
    """

    flops: int
    effective_flops: int
    parameters: int
    kept: int


@dataclass(frozen=True)
class ModelCost(LayerCost):
    """The cost of a model, in total and by layer.

    Attributes:
        layers: by name, the cost of each layer that has parameters. Operations between layers count in the total only.
        tied: by name of each layer that shares its weight, the names of all layers with that weight.
    """

    layers: dict[str, LayerCost]
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def flops_of(self, name: str) -> int:
        """Return the operations with a layer's weight: those of the layer, and of layers that share the weight."""
        return sum(self.layers[layer].flops for layer in self.tied.get(name, (name,)))

    def flops_left(self, sparsity: Mapping[str, float]) -> float:
        """Return the fraction of operations, in [0, 1], that remains at a given sparsity of the layers.

        Args:
            sparsity: fraction of zeros in each layer's weight, by name. A layer that is missing counts as dense, unless
                it shares its weight with a layer that is given.
        """
        by_layer = {layer: zeros for name, zeros in sparsity.items() for layer in self.tied.get(name, (name,))}
        saved = sum(self.layers[name].flops * zeros for name, zeros in by_layer.items() if name in self.layers)
        return 1 - saved / self.flops if self.flops else 1.0


def model_cost(model: nn.Module, example_input: ExampleInput) -> ModelCost:
    """Count the operations of one forward with torch's own counter, and how many of them are with nonzero weights.

    The effective operations of linear layers (GPT-2's too) and convolutions are those with a nonzero weight. Everything
    else (attention, computed weights, products in the code of a ``forward``) counts as dense. For a model from
    :func:`shrink`, ``flops`` is what runs. For a masked model, ``effective_flops`` is what would run if zeros cost
    nothing.

    Args:
        model: a module; run once in evaluation mode, and left as it was.
        example_input: an :data:`~lightning_autoprune.model.forward.ExampleInput` on which the model runs. Give one
            sample to get the cost per sample.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = model[0].weight.data[1:].zero_()
        >>> cost = model_cost(model, torch.zeros(1, 4))
        >>> cost.flops, cost.effective_flops, cost.layers["0"].effective_flops
        (36, 20, 8)
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _unfused_products(), counter:
        run_model(model, example_input)
    flops = _flops_by_module(model, counter)
    layers = {}
    sharing: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if parameters:
            layers[name] = LayerCost(
                flops=flops[module],
                effective_flops=round(flops[module] * _density(module)),
                parameters=sum(p.numel() for p in parameters),
                kept=sum(int(p.count_nonzero()) for p in parameters),
            )
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


def _flops_by_module(model: nn.Module, counter: FlopCounterMode) -> dict[nn.Module, int]:
    """Return the operations of each layer; 0 for modules with submodules, which have counts of their own."""
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    flops: dict[nn.Module, int] = defaultdict(int)
    for name, module in model.named_modules(remove_duplicate=False):  # counted under one of the module's names
        is_layer = isinstance(module, (nn.Linear, _ConvNd, nn.MultiheadAttention)) or not list(module.children())
        flops[module] += counts.get(name, 0) if is_layer else 0
    return flops


@contextmanager
def _unfused_products() -> Iterator[None]:
    """Switch off fused attention, and the recurrent layers of oneDNN and cuDNN: torch does not count their products."""
    mha_fastpath = torch.backends.mha.get_fastpath_enabled()
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    enabled = [library.enabled for library in libraries]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for library in libraries:
            library.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(mha_fastpath)
        for library, flag in zip(libraries, enabled, strict=True):
            library.enabled = flag


def _weight(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("weight")  # reading a computed weight may change it (spectral norm)


def _density(module: nn.Module) -> float:
    """Return the fraction of nonzero weights in a linear layer or convolution; 1 for other modules."""
    weight = _weight(module)
    if weight is not None and (isinstance(module, (nn.Linear, nn.Bilinear, _ConvNd)) or is_plain_linear(module)):
        return float(weight.count_nonzero()) / max(weight.numel(), 1)
    return 1.0
