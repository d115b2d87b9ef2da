"""``shrink``: the same function as a smaller network, without dead channels. Needs torch and torch-pruning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import nn

from lightning_autoprune.deploy.dead_channels import zero_dead_channels
from lightning_autoprune.errors import AutoPruneError, quote_names
from lightning_autoprune.model.attention_heads import group_attention_heads
from lightning_autoprune.model.channel_removal import remove_channels
from lightning_autoprune.model.channels import Channel, find_channels
from lightning_autoprune.model.example_inputs import every_value_varies, run_batch_sizes, run_variations
from lightning_autoprune.model.forward import ExampleInput, copy_model, run_model
from lightning_autoprune.model.pruning_mark import is_being_pruned
from lightning_autoprune.model.removal_trial import RemovalTrial
from lightning_autoprune.model.same_outputs import find_mismatch

__all__ = ["shrink"]

Model = TypeVar("Model", bound=nn.Module)


def shrink(model: Model, example_input: ExampleInput, *, tolerance: float = 1e-4) -> Model:
    """Return a smaller copy of a pruned model, without its dead channels, that computes the same outputs.

    A channel is dead if the input can't change it (no nonzero weight leads into it), or if nothing reads it. What a
    constant channel adds to the layers that read it is moved into their biases. This is repeated, as one dead channel
    often makes others dead. The result has layers of the same types and names in smaller sizes, so its state dict loads
    into a network built with the printed sizes. Its outputs are checked against the model's, on the example and on
    random inputs like it.

    Whether a channel is constant is found by running the model. Floats in the input may reach it only through its zero
    weights, and it must stay the same when the other inputs vary. If one of them can't be varied, all channels that add
    a constant stay: so pass integers that differ between samples in each column, and numbers as tensors. A constant
    holds for inputs of the example's shape, with any batch size. If the model's code compares inputs with numbers
    (``x != 0`` for padding), the effect is seen only on inputs that are tried: random values of the example's scale,
    and zeros at random places.

    Some channels stay although they are dead:

    - channels of the model's outputs;
    - channels that go through a normalization over channels (LayerNorm, GroupNorm);
    - channels of grouped convolutions, except depthwise ones;
    - channels that the dependency graph can't follow (shared or computed weights, recurrent layers);
    - constants that a zero-padded convolution reads;
    - parts of attention heads. A head is removed as a whole, if its module has the number of heads in an attribute
      (``num_heads``, ``n_heads``, ``heads``, …) and a ``forward`` that runs with fewer. Heads of
      ``nn.MultiheadAttention`` always stay.

    Args:
        model: a module or LightningModule, used in evaluation mode from here on; it is left as it was.
        example_input: an :data:`~lightning_autoprune.model.forward.ExampleInput` on which the model runs, with samples
            along the first dimension.
        tolerance: largest difference of an output entry, relative to the sum of its size and the median size of the
            entries; at least 8 times the resolution of the dtype.

    Returns:
        A smaller copy. Its parameters are new: an optimizer of the original does not train them.

    Raises:
        AutoPruneError: if the model does not run on the example, is of a kind that can't be traced (TorchScript,
            inference mode), or the result computes other outputs.

    Warns:
        UserWarning: if no channel is found, if the dependency graph can't be traced, or if dead channels stay because
            outputs would change (names their layers).

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
            " final, or shrink a copy of it as it is now (`copy.deepcopy`)."
        )
    channels = find_channels(model, example_input)
    channels = group_attention_heads(model, channels, RemovalTrial(model, example_input))
    if not channels:
        warnings.warn(
            f"No channel of {type(model).__name__} was found: it has no linear or convolution layer from which a"
            " gradient reaches an output.",
            stacklevel=2,
        )
    shrinker = _Shrinker(model, channels, example_input, tolerance)
    layers = list(dict.fromkeys(name for channel in shrinker.removable for name in channel.made_by))
    small, mismatch = shrinker.remove_dead_channels(set(layers))
    if mismatch:
        failing = [name for name in layers if shrinker.remove_dead_channels(_tied_layers(channels, name))[1]]
        excluded = {tied for name in failing for tied in _tied_layers(channels, name)}
        small, mismatch = shrinker.remove_dead_channels(set(layers) - excluded)
        if mismatch or not failing:
            raise AutoPruneError(
                f"{type(model).__name__} can't be shrunk: without the dead channels of {quote_names(layers)}"
                f" {mismatch}."
            )
        warnings.warn(
            f"The dead channels of {quote_names(failing)} stay: without them the outputs change.", stacklevel=2
        )
    return small


def _tied_layers(channels: Iterable[Channel], name: str) -> set[str]:
    """Return the layers that make channels together with a layer, and the layer itself."""
    return {layer for channel in channels if name in channel.made_by for layer in channel.made_by}


class _Shrinker(Generic[Model]):
    """A model, its channels, and the inputs and outputs with which smaller copies of it are made and checked.

    Attributes:
        removable: the channels that are not fixed.
    """

    def __init__(self, model: Model, channels: list[Channel], example_input: ExampleInput, tolerance: float) -> None:
        self.removable = [channel for channel in channels if not channel.fixed_reason]
        self._model = model
        self._tolerance = tolerance
        self._expected_runs = run_variations(model, example_input)
        self._inputs = [run.inputs for run in self._expected_runs]
        self._fold_constants = every_value_varies(self._inputs)
        # a constant that is summed over the samples must not count as one
        self._inputs += [run.inputs for run in run_batch_sizes(model, example_input)]

    @torch.no_grad()
    def remove_dead_channels(self, layers: set[str]) -> tuple[Model, str]:
        """Return a copy without the dead channels that only these layers make, and its mismatch ("" if none)."""
        small = copy_model(self._model)
        channels = [channel for channel in self.removable if channel.made_by.keys() <= layers]
        remove_channels(small, zero_dead_channels(small, channels, self._inputs, self._fold_constants))
        return small, find_mismatch(partial(run_model, small), self._expected_runs, self._tolerance)
