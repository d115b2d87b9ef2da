"""Find the channels of a model that can be pruned as a whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.neurons import Neurons
from lightning_autoprune.model.attention_heads import group_attention_heads
from lightning_autoprune.model.channels import Channel, find_channels, weight_dim
from lightning_autoprune.model.forward import ExampleInput
from lightning_autoprune.model.removal_trial import RemovalTrial, fix_unremovable

__all__ = ["find_neurons"]


def find_neurons(model: nn.Module, weights: Mapping[str, Tensor], example_input: ExampleInput) -> Neurons:
    """Find the channels of a model that only the given weights make and read.

    Args:
        model: a module; it is left as it was.
        weights: weights by layer name; those of layers that are neither linear nor convolutions are ignored.
        example_input: an :data:`~lightning_autoprune.model.forward.ExampleInput` on which the model runs.

    Returns:
        The channels, numbered in the order of the model.

    Raises:
        AutoPruneError: if there are no such channels (says why), or the model does not run on the example.
    """
    modules = dict(model.named_modules())
    weights = {name: w for name, w in weights.items() if isinstance(modules.get(name), (nn.Linear, _ConvNd))}
    channels = _prunable_channels(model, weights, example_input)
    count = len(channels)
    dims = {name: (weight_dim(modules[name], 0), weight_dim(modules[name], 1)) for name in weights}
    rows = {name: torch.full((w.shape[dims[name][0]],), count) for name, w in weights.items()}
    columns = {name: torch.full((w.shape[dims[name][1]],), count) for name, w in weights.items()}
    groups: dict[frozenset[str], list[int]] = {}
    for number, channel in enumerate(channels):
        for numbers, slices in ((rows, channel.made_by), (rows, channel.passes), (columns, channel.read_by)):
            for name in slices.keys() & weights.keys():  # of ``passes`` the depthwise convolutions
                numbers[name][slices[name]] = number
        groups.setdefault(frozenset(channel.made_by), []).append(number)
    device = next(iter(weights.values())).device
    sizes = {name: float(weight.numel()) for name, weight in weights.items()}
    group_tensors = [torch.tensor(numbers) for numbers in groups.values()]
    return Neurons(count, group_tensors, rows, columns, dims, sizes, costs=dict(sizes)).to(device)


def _prunable_channels(model: nn.Module, weights: Mapping[str, Tensor], example_input: ExampleInput) -> list[Channel]:
    """Return the channels that may be removed, and whose makers and readers all have one of the weights."""
    channels = find_channels(model, example_input)
    trial = RemovalTrial(model, example_input)
    channels = group_attention_heads(model, channels, trial)
    fix_unremovable(channels, trial)
    prunable = [c for c in channels if not c.fixed_reason and c.read_by and {*c.made_by, *c.read_by} <= weights.keys()]
    if not prunable:
        unchosen = "its layers are not chosen, or nothing reads it"
        reasons = list(dict.fromkeys(channel.fixed_reason or unchosen for channel in channels))
        raise AutoPruneError(
            f'`granularity="neuron"` finds no channel to prune in {type(model).__name__}:'
            f" {'; '.join(reasons) or 'its outputs carry no gradient'}. Use"
            ' `granularity="weight"`.'
        )
    return prunable
