"""Cut channels out of the layers that make and read them, or give them other places there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_autoprune.model.channels import Channel, is_depthwise, weight_dim

__all__ = ["index_tensor", "move_channels", "remove_channels", "zero_columns", "zero_slices"]

# A slice of a layer is one of its rows (dim 0) or one of its columns (dim 1).

_SLICED_TENSORS = {0: ("weight", "bias", "running_mean", "running_var"), 1: ("weight",)}

_SIZE_ATTRIBUTES = {
    0: ("out_features", "out_channels", "num_features", "num_parameters"),
    1: ("in_features", "in_channels"),
}


def zero_slices(module: nn.Module, indices: list[int], dim: int) -> None:
    """Set rows (``dim=0``) or columns (``dim=1``) of a layer's weight to zero."""
    assert isinstance(module.weight, Tensor)
    module.weight.index_fill_(weight_dim(module, dim), index_tensor(indices, module.weight), 0)


def index_tensor(indices: list[int], like: Tensor) -> Tensor:
    """Return indices as a tensor on the device of another."""
    return torch.tensor(indices, device=like.device)


def zero_columns(model: nn.Module, channels: Sequence[Channel]) -> None:
    """Give the layers that read some channels new weights, in which the columns of these channels are 0."""
    for (name, dim), columns in _slices_of(channels).items():
        if dim:
            module = model.get_submodule(name)
            assert isinstance(module.weight, Tensor)
            _replace(module, "weight", module.weight.clone())
            zero_slices(module, sorted(columns), 1)


def move_channels(model: nn.Module, channels: Sequence[Channel], places: Sequence[Channel]) -> None:
    """Give each channel the slices that another one has now. The layers get new weights, biases and buffers.

    Args:
        model: the model that the channels are of.
        channels: channels with the same numbers of slices in the same layers.
        places: the same channels in another order.
    """
    for part, dim in (("made_by", 0), ("passes", 0), ("read_by", 1)):
        for name in getattr(channels[0], part):
            module = model.get_submodule(name)
            source, target = (
                [i for channel in order for i in sorted(getattr(channel, part)[name])] for order in (channels, places)
            )
            for attribute, old in _sliced_tensors(module, dim):
                along = weight_dim(module, dim) if attribute == "weight" else 0
                moved = old.index_select(along, index_tensor(source, old))
                _replace(module, attribute, old.index_copy(along, index_tensor(target, old), moved))


def remove_channels(model: nn.Module, channels: list[Channel]) -> None:
    """Cut channels out of a model's layers, in place; if a layer would lose all, one channel of it remains."""
    channels = _leave_one_per_layer(model, channels)
    for (name, dim), removed in _slices_of(channels).items():
        remaining = [i for i in range(_slice_count(model, name, dim)) if i not in removed]
        _select_slices(model.get_submodule(name), dim, remaining)
    for channel in channels:
        for path, decrements in channel.counted_in.items():
            module = model.get_submodule(path)
            for attribute, amount in decrements.items():
                setattr(module, attribute, getattr(module, attribute) - amount)


def _leave_one_per_layer(model: nn.Module, channels: list[Channel]) -> list[Channel]:
    """Return the channels without those that must remain, so that no layer loses all rows or all columns."""
    while emptied := [
        (name, dim)
        for (name, dim), removed in _slices_of(channels).items()
        if len(removed) == _slice_count(model, name, dim)
    ]:
        remaining = next(channel for channel in channels if _has_first_slice(channel, *emptied[0]))
        channels = [channel for channel in channels if channel is not remaining]
    return channels


def _slices_of(channels: Sequence[Channel]) -> dict[tuple[str, int], set[int]]:
    """Return the indices of all slices of some channels, by layer name and dim."""
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for channel in channels:
        for dim, slices in ((0, channel.made_by), (0, channel.passes), (1, channel.read_by)):
            for name, indices in slices.items():
                found[name, dim] |= set(indices)
    return found


def _has_first_slice(channel: Channel, name: str, dim: int) -> bool:
    rows = channel.made_by.get(name, channel.passes.get(name, []))
    return 0 in (channel.read_by.get(name, []) if dim else rows)


def _slice_count(model: nn.Module, name: str, dim: int) -> int:
    module = model.get_submodule(name)
    if isinstance(module, _BatchNorm):
        return module.num_features
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[weight_dim(module, dim)]


def _select_slices(module: nn.Module, dim: int, remaining: list[int]) -> None:
    """Reduce a layer to the remaining slices, and update its size attributes."""
    for name, old in _sliced_tensors(module, dim):
        along = weight_dim(module, dim) if name == "weight" else 0
        _replace(module, name, old.index_select(along, index_tensor(remaining, old)))
    sizes = (*_SIZE_ATTRIBUTES[0], *_SIZE_ATTRIBUTES[1], "groups") if is_depthwise(module) else _SIZE_ATTRIBUTES[dim]
    for size in sizes:
        if hasattr(module, size):
            setattr(module, size, len(remaining))


def _sliced_tensors(module: nn.Module, dim: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of each tensor of a layer that has an entry per slice."""
    for name in _SLICED_TENSORS[dim]:
        if isinstance(value := getattr(module, name, None), Tensor):
            yield name, value


def _replace(module: nn.Module, name: str, new: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of a layer."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
