"""Cuts channels out of the layers that make and read them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_autoprune.model.channels import Channel, is_depthwise, weight_dim

__all__ = ["remove_channels", "zero_slices"]


def zero_slices(module: nn.Module, indices: list[int], dim: int) -> None:
    """Zeroes rows (0) or columns (1) of a layer."""
    assert isinstance(module.weight, Tensor)
    module.weight.index_fill_(weight_dim(module, dim), _index(indices, module.weight), 0)


def _index(indices: list[int], like: Tensor) -> Tensor:
    return torch.tensor(indices, device=like.device)


# Removing


def remove_channels(model: nn.Module, dead: list[Channel]) -> None:
    """Cuts channels out of the layers of a model, but for one where a layer would lose all."""
    while full := [key for key, indices in _gone(dead).items() if len(indices) == _count(model, *key)]:
        stays = next(channel for channel in dead if _has(channel, *full[0], 0))
        dead = [channel for channel in dead if channel is not stays]
    for (name, dim), indices in _gone(dead).items():
        stay = [i for i in range(_count(model, name, dim)) if i not in indices]
        _cut(model.get_submodule(name), dim, stay)
    for path, counts in (item for channel in dead for item in channel.counted.items()):
        module = model.get_submodule(path)
        for attribute, amount in counts.items():
            setattr(module, attribute, getattr(module, attribute) - amount)


def _gone(dead: list[Channel]) -> dict[tuple[str, int], set[int]]:
    gone: dict[tuple[str, int], set[int]] = defaultdict(set)
    for channel in dead:
        for dim, parts in ((0, channel.made), (0, channel.passed), (1, channel.read)):
            for name, indices in parts.items():
                gone[name, dim] |= set(indices)
    return gone


def _has(channel: Channel, name: str, dim: int, i: int) -> bool:
    return i in (channel.read.get(name, []) if dim else channel.made.get(name, channel.passed.get(name, [])))


def _count(model: nn.Module, name: str, dim: int) -> int:
    """Number of rows (0) or columns (1) of a layer."""
    module = model.get_submodule(name)
    if isinstance(module, _BatchNorm):
        return module.num_features
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[weight_dim(module, dim)]


_PARTS = {0: ("weight", "bias", "running_mean", "running_var"), 1: ("weight",)}

_SIZES = {0: ("out_features", "out_channels", "num_features", "num_parameters"), 1: ("in_features", "in_channels")}


def _cut(module: nn.Module, dim: int, stay: list[int]) -> None:
    """Keeps some rows (0) or columns (1) of a layer, and says so in its sizes."""
    depthwise = is_depthwise(module)
    for name in _PARTS[dim]:
        old = getattr(module, name, None)
        if isinstance(old, Tensor):
            new = old.index_select(weight_dim(module, dim) if name == "weight" else 0, _index(stay, old))
            parameter = isinstance(old, nn.Parameter)
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if parameter else new)
    for size in (*_SIZES[0], *_SIZES[1], "groups") if depthwise else _SIZES[dim]:
        if hasattr(module, size):
            setattr(module, size, len(stay))
