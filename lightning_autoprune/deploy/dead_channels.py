"""Dead channels: which they are, what they add to the layers that read them, and cutting them out.

A channel is dead if the input can't change it (no weight leads into it), or if nothing reads it. A constant one adds a
constant to the layers that read it, which belongs into their biases.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_autoprune.model.channel_removal import _index, zero_slices
from lightning_autoprune.model.channels import Channel, weight_dim
from lightning_autoprune.model.example_inputs import outputs, unknown

__all__ = ["zero_dead_channels"]


class NonzeroWeights:
    """Which rows and columns of the layers have a weight that is not 0, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[tuple[str, int], list[bool]] = {}

    def __call__(self, name: str, dim: int, i: int) -> bool:
        """Whether row (0) or column (1) ``i`` of a layer has one; True for layers without such weights."""
        if (name, dim) not in self._found:
            module = self._model.get_submodule(name)
            weight = module.weight
            if not isinstance(weight, Tensor) or isinstance(module, nn.PReLU):
                return True
            slices = (weight != 0).movedim(weight_dim(module, dim), 0)
            self._found[name, dim] = slices.reshape(len(slices), -1).any(1).tolist()
        return self._found[name, dim][i]

    def readers(self, channel: Channel) -> list[tuple[str, int]]:
        """Layers and columns that read a channel with such a weight."""
        return [(name, i) for name, indices in channel.read.items() for i in indices if self(name, 1, i)]

    def alive(self, channel: Channel) -> bool:
        """Whether the input can change the channel, and the change can reach a layer that reads it."""
        reached: set[Any] = set()
        front: list[Any] = [name for name, rows in channel.made.items() if any(self(name, 0, i) for i in rows)]
        while front:
            for after in channel.follows[front.pop()] - reached:
                reached.add(after)
                if any(self(after, 1, i) for i in channel.read.get(after, ())):
                    return True
                blocked = after in channel.passed and not any(self(after, 0, i) for i in channel.passed[after])
                if not blocked and after not in channel.made and after not in channel.read:
                    front.append(after)
        return False


def zero_dead_channels(
    model: nn.Module, channels: list[Channel], inputs: list[Any], constants_too: bool
) -> list[Channel]:
    """Finds the dead channels, moves what they add into biases, and zeroes the weights that make and read them.

    Args:
        model: the model that they are of, changed in place.
        channels: those that may go.
        inputs: examples, on which constants are measured.
        constants_too: whether a channel that is read, and measured to be constant, counts as dead.

    Returns:
        Those that are dead, and that nothing reads any more.
    """
    dead: list[Channel] = []
    left, found = list(channels), True
    while found:
        used, found = NonzeroWeights(model), False
        places = {id(channel): used.readers(channel) for channel in left if not used.alive(channel)}
        places = {key: some for key, some in places.items() if constants_too or not some}
        read = [place for some in places.values() for place in some]
        constants = _constants(model, read, inputs, channels, used)
        for channel in [channel for channel in left if id(channel) in places]:
            columns = places[id(channel)]
            if all(_can_fold(model.get_submodule(name), constants[name, i]) for name, i in columns):
                for name, i in columns:
                    _fold(model.get_submodule(name), i, constants[name, i])
                for name, indices in channel.made.items():
                    zero_slices(model.get_submodule(name), indices, 0)
                dead.append(channel)
                found = True
        gone = {id(channel) for channel in dead}
        left = [channel for channel in left if id(channel) not in gone]
    return dead


# What constant channels add


def _constants(
    model: nn.Module, places: list[tuple[str, int]], inputs: list[Any], channels: list[Channel], used: NonzeroWeights
) -> dict[tuple[str, int], float]:
    """The value that reaches each place (a layer and its column); NaN where it is not one value.

    That it is one on some inputs is not enough: a ReLU may be off on them. So it is measured too where all floating
    numbers that go in are NaN, and must be the same.
    """
    columns: dict[str, list[int]] = defaultdict(list)
    for name, i in places:
        columns[name].append(i)
    seen: dict[tuple[str, int], list[float]] = defaultdict(list)
    values: dict[tuple[str, int], float] = defaultdict(lambda: float("nan"))
    if not places:
        return values

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        dim = _channel_dim(module)
        rows = x.index_select(dim, _index(columns[name], x)).movedim(dim, 0).reshape(len(columns[name]), -1)
        for i, low, high in zip(columns[name], rows.amin(1).tolist(), rows.amax(1).tolist(), strict=True):
            seen[name, i] += [low, high]

    modules = {name: model.get_submodule(name) for name in columns}
    handles = [m.register_forward_pre_hook(partial(look, n), with_kwargs=True) for n, m in modules.items()]
    try:
        for example in inputs:
            outputs(model, example)
        with _weights_block(model, channels, used):
            try:
                outputs(model, unknown(inputs[0]))
            except Exception:  # of any kind: a forward may refuse NaN
                return values
    finally:
        for handle in handles:
            handle.remove()
    for key, (first, *others) in seen.items():
        if all(abs(value - first) <= 1e-5 * abs(first) for value in others):  # false if one is NaN
            values[key] = first
    return values


@contextmanager
def _weights_block(model: nn.Module, channels: list[Channel], used: NonzeroWeights) -> Iterator[None]:
    """What makes and passes channels blocks NaN where its weights are 0 (0 * NaN is NaN); embeddings give NaN."""

    def block(name: str, module: nn.Module, _: Any, y: Tensor) -> Tensor:
        dim = _channel_dim(module)
        alive = torch.tensor([used(name, 0, i) for i in range(y.shape[dim])], device=y.device)
        bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros_like(alive)
        return torch.where(alive, y.movedim(dim, -1), bias).movedim(-1, dim)

    names = {name for channel in channels for name in (*channel.made, *channel.passed)}
    modules = {name: model.get_submodule(name) for name in names}
    handles = [
        m.register_forward_hook(partial(block, n), prepend=True)
        for n, m in modules.items()
        if not isinstance(m, nn.PReLU)
    ]
    handles += [
        m.register_forward_hook(lambda m, x, y: y * torch.nan)
        for m in model.modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_dim(module: nn.Module) -> int:
    """The dimension of a layer's inputs and outputs that has the channels."""
    if isinstance(module, _ConvNd):
        return -1 - len(module.kernel_size)
    return 1 if isinstance(module, _BatchNorm) else -1


def _can_fold(layer: nn.Module, value: float) -> bool:
    """Whether a constant in a column of a layer adds a constant to each of its outputs."""
    if value == 0:
        return True
    if isinstance(layer, _ConvTransposeNd):
        return False
    edges = isinstance(layer, _ConvNd) and layer.padding_mode == "zeros"
    padded = edges and layer.padding != "valid" and any(size != 0 for size in layer.padding)  # type: ignore[union-attr]
    return value == value and not padded


def _fold(layer: nn.Module, column: int, value: float) -> None:
    """Moves what a constant column adds into the bias, and zeroes the column."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if value:
        added = value * weight[:, column].flatten(1).sum(1) if weight.dim() > 2 else value * weight[:, column]
        if isinstance(layer.bias, Tensor):
            added += layer.bias
        layer.bias = nn.Parameter(added, requires_grad=weight.requires_grad)
    zero_slices(layer, [column], 1)
