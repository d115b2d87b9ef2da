"""Finds dead channels, folds the constants that they add into biases, and zeroes their weights.

A channel is dead if the input can't change it (no nonzero weight leads into it), or if nothing reads it. A channel that
the input can't change still adds a constant to the layers that read it. This constant belongs in their biases.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_autoprune.model.channel_removal import index_tensor, zero_slices
from lightning_autoprune.model.channels import Channel, weight_dim
from lightning_autoprune.model.example_inputs import replace_floats_with_nan
from lightning_autoprune.model.forward import run_model

__all__ = ["zero_dead_channels"]

Column = tuple[str, int]  # a layer's name, and the index of one of its columns


class NonzeroWeights:
    """Tells which rows and columns of a model's layers have nonzero weights.

    Each layer is looked at once, so make a new instance after weights have changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._nonzero: dict[tuple[str, int], list[bool]] = {}

    def any_in_row(self, name: str, row: int) -> bool:
        """Return whether a row of a layer has a nonzero weight; True for layers whose weight has no rows."""
        return self._any_in_slice(name, 0, row)

    def any_in_column(self, name: str, column: int) -> bool:
        """Return whether a column of a layer has a nonzero weight."""
        return self._any_in_slice(name, 1, column)

    def _any_in_slice(self, name: str, dim: int, index: int) -> bool:
        if (name, dim) not in self._nonzero:
            module = self._model.get_submodule(name)
            weight = module.weight
            if not isinstance(weight, Tensor) or isinstance(module, nn.PReLU):  # no affine weight, or only a slope
                return True
            slices = (weight != 0).movedim(weight_dim(module, dim), 0)
            self._nonzero[name, dim] = slices.reshape(len(slices), -1).any(1).tolist()
        return self._nonzero[name, dim][index]

    def columns_that_read(self, channel: Channel) -> list[Column]:
        """Return the columns with nonzero weights that read a channel."""
        return [(name, i) for name, indices in channel.read_by.items() for i in indices if self.any_in_column(name, i)]

    def is_alive(self, channel: Channel) -> bool:
        """Return whether the input can change a channel, and the change can reach a layer that reads it."""
        changing: list[Any] = [
            name for name, rows in channel.made_by.items() if any(self.any_in_row(name, i) for i in rows)
        ]
        reached: set[Any] = set()
        while changing:
            for part in channel.successors[changing.pop()] - reached:
                reached.add(part)
                if any(self.any_in_column(part, i) for i in channel.read_by.get(part, ())):
                    return True
                if part in channel.made_by or part in channel.read_by:
                    continue
                if part not in channel.passes or any(self.any_in_row(part, i) for i in channel.passes[part]):
                    changing.append(part)
        return False


def zero_dead_channels(
    model: nn.Module, channels: list[Channel], inputs: list[Any], fold_constants: bool
) -> list[Channel]:
    """Find dead channels, fold the constants that they add into biases, and zero the weights that make and read them.

    This is repeated until no further channel is dead, as one dead channel often makes others dead.

    Args:
        model: the model that the channels are of, changed in place.
        channels: those that may be removed.
        inputs: example inputs, on which constants are measured.
        fold_constants: whether a channel that is read, and measured to be constant, counts as dead.

    Returns:
        The dead channels, which nothing reads anymore.
    """
    dead: list[Channel] = []
    remaining = list(channels)
    while True:
        nonzero = NonzeroWeights(model)
        readers = [(c, nonzero.columns_that_read(c)) for c in remaining if not nonzero.is_alive(c)]
        if not fold_constants:
            readers = [(channel, columns) for channel, columns in readers if not columns]
        all_columns = [column for _, columns in readers for column in columns]
        constants = _measure_constants(model, all_columns, inputs, channels, nonzero)
        newly_dead = [
            (channel, columns)
            for channel, columns in readers
            if all(_can_fold(model.get_submodule(name), constants[name, i]) for name, i in columns)
        ]
        if not newly_dead:
            return dead
        for channel, columns in newly_dead:
            for name, i in columns:
                _fold_column(model.get_submodule(name), i, constants[name, i])
            for name, rows in channel.made_by.items():
                zero_slices(model.get_submodule(name), rows, 0)
            dead.append(channel)
        dead_ids = {id(channel) for channel in dead}
        remaining = [channel for channel in remaining if id(channel) not in dead_ids]


# Measuring constants


def _measure_constants(
    model: nn.Module, columns: list[Column], inputs: list[Any], channels: list[Channel], nonzero: NonzeroWeights
) -> dict[Column, float]:
    """Return the constant value that each column reads; NaN if it is not constant.

    A value may be the same for all these inputs and still depend on the input: a ReLU may be off for all of them. So
    the model also runs with NaN in place of all floats in the input. Only a value that is still the same is constant.
    """
    not_constant = dict.fromkeys(columns, float("nan"))
    if not columns:
        return not_constant
    with _record_columns(model, columns) as extremes:
        for example in inputs:
            run_model(model, example)
        with _stop_nan_at_zero_weights(model, channels, nonzero):
            try:
                run_model(model, replace_floats_with_nan(inputs[0]))
            except Exception:  # of any kind: a forward may refuse NaN
                return not_constant
    return not_constant | {column: _common_value(values) for column, values in extremes.items()}


@contextmanager
def _record_columns(model: nn.Module, columns: list[Column]) -> Iterator[dict[Column, list[float]]]:
    """Record the smallest and the largest value that each column reads in each forward."""
    columns_of: dict[str, list[int]] = defaultdict(list)
    for name, i in columns:
        columns_of[name].append(i)
    extremes: dict[Column, list[float]] = defaultdict(list)

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        dim, indices = _channel_dim(module), columns_of[name]
        values = x.index_select(dim, index_tensor(indices, x)).movedim(dim, 0).reshape(len(indices), -1)
        for i, low, high in zip(indices, values.amin(1).tolist(), values.amax(1).tolist(), strict=True):
            extremes[name, i] += [low, high]

    modules = {name: model.get_submodule(name) for name in columns_of}
    handles = [m.register_forward_pre_hook(partial(record, name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield extremes
    finally:
        for handle in handles:
            handle.remove()


def _common_value(values: list[float]) -> float:
    """Return the first value if all others equal it up to rounding, else NaN."""
    first, *others = values
    same = all(abs(value - first) <= 1e-5 * abs(first) for value in others)  # False if one is NaN
    return first if same else float("nan")


@contextmanager
def _stop_nan_at_zero_weights(model: nn.Module, channels: list[Channel], nonzero: NonzeroWeights) -> Iterator[None]:
    """Make rows without nonzero weights return their bias, although 0 * NaN is NaN; make embeddings return NaN.

    So NaN reaches exactly what the input can change.
    """

    def stop(name: str, module: nn.Module, _: Any, y: Tensor) -> Tensor:
        dim = _channel_dim(module)
        alive = torch.tensor([nonzero.any_in_row(name, i) for i in range(y.shape[dim])], device=y.device)
        bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros_like(alive)
        return torch.where(alive, y.movedim(dim, -1), bias).movedim(-1, dim)

    names = {name for channel in channels for name in (*channel.made_by, *channel.passes)}
    modules = {name: model.get_submodule(name) for name in names}
    handles = [
        module.register_forward_hook(partial(stop, name), prepend=True)
        for name, module in modules.items()
        if not isinstance(module, nn.PReLU)
    ]
    handles += [
        module.register_forward_hook(lambda module, inputs, output: output * torch.nan)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_dim(module: nn.Module) -> int:
    """Return the dimension of a layer's inputs and outputs along which the channels lie."""
    if isinstance(module, _ConvNd):
        return -1 - len(module.kernel_size)
    return 1 if isinstance(module, _BatchNorm) else -1


# Folding constants


def _can_fold(layer: nn.Module, value: float) -> bool:
    """Return whether a constant in a column of a layer adds the same constant everywhere in an output channel."""
    if value == 0:
        return True
    if isinstance(layer, _ConvTransposeNd):
        return False
    pads_zeros = isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and layer.padding != "valid"
    padded = pads_zeros and any(size != 0 for size in layer.padding)  # type: ignore[union-attr]
    return not math.isnan(value) and not padded


def _fold_column(layer: nn.Module, column: int, value: float) -> None:
    """Add to the bias what a constant column adds to the outputs, and zero the column."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if value:
        added = value * weight[:, column].flatten(1).sum(1) if weight.dim() > 2 else value * weight[:, column]
        if isinstance(layer.bias, Tensor):
            added += layer.bias
        layer.bias = nn.Parameter(added, requires_grad=weight.requires_grad)
    zero_slices(layer, [column], 1)
