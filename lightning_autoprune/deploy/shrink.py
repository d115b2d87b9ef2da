"""``shrink``: the same function in a smaller network, without the channels that are dead. Torch, and torch-pruning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_autoprune.deploy.dead_channels import zero_dead_channels
from lightning_autoprune.errors import AutoPruneError, listed
from lightning_autoprune.model.attention_heads import with_heads
from lightning_autoprune.model.channel_removal import remove_channels
from lightning_autoprune.model.channels import Channel, find_channels
from lightning_autoprune.model.example_inputs import all_vary, by_rows, copied, outputs, probes
from lightning_autoprune.model.pruning_mark import is_being_pruned
from lightning_autoprune.model.same_outputs import disagreement

__all__ = ["shrink"]

Model = TypeVar("Model", bound=nn.Module)


def shrink(model: Model, example_input: Any, *, tolerance: float = 1e-4) -> Model:
    """Removes the channels of a pruned model that do nothing, and gives a smaller model with the same outputs.

    A channel is dead if it can't change with the input (no weight leads into it) or nothing reads it. What a constant
    one adds to the layers that read it goes into their biases. This goes on until nothing changes: one dead channel
    often makes others so. The result has smaller layers of the same types and names, and its state loads into a network
    built with the sizes that it prints. It is checked against the original on the example and random inputs like it.

    A constant is only taken for one if no floating input reaches it but through weights, and each other input could be
    varied: give integers that differ between the rows, in each column, and numbers as tensors. What it adds is that for
    inputs of the example's shapes, but for the number of rows. Where the code compares inputs with numbers, that
    is seen for the inputs alone that are tried: of the example's size, and zeros, as padding has them.

    Channels stay where they can't be told apart or removed exactly: those of the model's outputs, of a stream that goes
    through a normalization over channels (LayerNorm), of grouped convolutions that are not depthwise, and constants
    that a zero-padded convolution reads. Attention heads go as a whole, where the module has their number in an
    attribute (``num_heads``, ``n_heads``, ``heads``…) and a ``forward`` that runs with fewer; those of
    ``nn.MultiheadAttention`` stay.

    Args:
        model: a module or LightningModule, in evaluation mode from here on; it is left as it was.
        example_input: what its ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments, with
            a first dimension of rows.
        tolerance: largest difference of an entry of the outputs, relative to it and to the median entry; at least 8
            times the resolution of the dtype.

    Returns:
        A copy, shrunk. Its parameters are new: an optimizer of the original does not train them.

    Raises:
        AutoPruneError: if the model does not run on the example, its graph can't be traced (TorchScript, inference
            mode), or the result is not the same function.

    Warns:
        UserWarning: naming layers whose dead channels had to stay because outputs would have changed; or saying that no
            channel was found, or how the layers hang together can't be told.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model[0].weight.data[2:] = 0  # six of eight neurons are constant
        >>> shrink(model, torch.zeros(1, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    if is_being_pruned(model):
        raise AutoPruneError(
            f"{type(model).__name__} is still being pruned: shrink it when fitting has ended, or once the masks are"
            " frozen, or shrink a copy of it as it is now (`copy.deepcopy`)."
        )
    channels = with_heads(model, find_channels(model, example_input), example_input)
    if not channels:
        warnings.warn(
            f"No channel of {type(model).__name__} was found: it has no linear or convolution layer from which a"
            " gradient reaches an output.",
            stacklevel=2,
        )
    tried = probes(model, example_input)
    inputs = [example for example, _ in tried]
    vary = all_vary(inputs)
    inputs += [example for example, _ in by_rows(model, example_input)]  # a sum over rows is no constant
    layers = list(dict.fromkeys(name for channel in channels if not channel.fixed for name in channel.made))

    def attempt(names: set[str]) -> tuple[Model, str]:
        """The model without the dead channels of some layers, and why it is not the same function, if so."""
        small = copied(model)
        with torch.no_grad():
            allowed = [channel for channel in channels if not channel.fixed and channel.made.keys() <= names]
            remove_channels(small, zero_dead_channels(small, allowed, inputs, vary))
            return small, disagreement(partial(outputs, small), tried, tolerance)

    small, problem = attempt(set(layers))
    if problem:
        spoiled = [name for name in layers if attempt(_tied(channels, name))[1]]
        small, problem = attempt(set(layers) - {tied for name in spoiled for tied in _tied(channels, name)})
        if problem or not spoiled:
            raise AutoPruneError(
                f"{type(model).__name__} can't be shrunk: without the dead channels of {listed(layers)} {problem}."
            )
        warnings.warn(f"The dead channels of {listed(spoiled)} stay: without them the outputs change.", stacklevel=2)
    return small


def _tied(channels: Iterable[Channel], name: str) -> set[str]:
    """The layers that make channels together with one."""
    return {layer for channel in channels if name in channel.made for layer in channel.made}
