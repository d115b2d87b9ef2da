"""Finds the channels of a model that can be pruned whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.neurons import Neurons
from lightning_autoprune.model.attention_heads import with_heads
from lightning_autoprune.model.channels import find_channels, fix_entangled, weight_dim

__all__ = ["find_neurons"]


def find_neurons(model: nn.Module, weights: Mapping[str, Tensor], example_input: Any) -> Neurons:
    """Finds the channels of a model that are made and read by the given weights alone.

    Args:
        model: a module.
        weights: weights by layer name; those of layers that are neither linear nor convolutions are left out.
        example_input: what its ``forward`` takes.

    Raises:
        AutoPruneError: if there are none (says why), or the model does not run on the example.
    """
    modules = dict(model.named_modules())
    weights = {n: w for n, w in weights.items() if isinstance(modules.get(n), (nn.Linear, _ConvNd))}
    channels = find_channels(model, example_input)
    fix_entangled(model, channels, example_input)
    channels = with_heads(model, channels, example_input)
    free = [c for c in channels if not c.fixed and c.read and {*c.made, *c.read} <= weights.keys()]
    if not free:
        reasons = list(dict.fromkeys(c.fixed or "its layers are not chosen, or nothing reads it" for c in channels))
        raise AutoPruneError(
            f'`granularity="neuron"` finds no channel to prune in {type(model).__name__}:'
            f" {'; '.join(reasons) or 'its outputs carry no gradient'}. Use"
            ' `granularity="weight"`.'
        )
    dims = {name: (weight_dim(modules[name], 0), weight_dim(modules[name], 1)) for name in weights}
    rows = {n: torch.full((w.shape[dims[n][0]],), len(free)) for n, w in weights.items()}
    columns = {n: torch.full((w.shape[dims[n][1]],), len(free)) for n, w in weights.items()}
    together: dict[frozenset[str], list[int]] = {}
    for number, channel in enumerate(free):
        for maps, parts in ((rows, channel.made), (rows, channel.passed), (columns, channel.read)):
            for name in parts.keys() & weights.keys():  # of what a channel passes, depthwise convolutions
                maps[name][parts[name]] = number
        together.setdefault(frozenset(channel.made), []).append(number)
    device = next(iter(weights.values())).device
    sizes = {name: float(weight.numel()) for name, weight in weights.items()}
    groups = [torch.tensor(numbers) for numbers in together.values()]
    return Neurons(len(free), groups, rows, columns, dims, sizes, costs=dict(sizes)).to(device)
