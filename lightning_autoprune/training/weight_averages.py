"""Averaged copies of the model that other callbacks keep: pruned like the model once the masks are final."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.tensors.sharding import local_shard
from lightning_autoprune.training.lightning_internals import average_model
from lightning_autoprune.training.lightning_package import StochasticWeightAveraging, Trainer, WeightAveraging, both

__all__ = ["prune_again", "prune_averages", "zero_pruned_weights"]


def prune_averages(trainer: Trainer, pruner: Pruner) -> None:
    """Zero the pruned weights in the averages of ``WeightAveraging`` (EMA) and ``StochasticWeightAveraging``.

    From then on these entries are averages of zeros, and stay 0.

    Args:
        trainer: the trainer, whose callbacks may keep averages.
        pruner: the pruner of its module.
    """
    places = {id(parameter): i for i, parameter in enumerate(trainer.lightning_module.parameters())}
    for average in _averages(trainer):
        parameters = list(average.parameters())
        _zero_all([parameters[places[id(weight)]] for weight in pruner.weights.values()], pruner)


def prune_again(pruner: Pruner) -> None:
    """Zero the pruned weights of the model once more, since an average may have replaced its values."""
    _zero_all(pruner.weights.values(), pruner)


def _zero_all(weights: Iterable[Tensor], pruner: Pruner) -> None:
    if pruner.auxiliary:
        for weight, mask in zip(weights, pruner.auxiliary.masks(), strict=True):
            zero_pruned_weights(weight, mask)


@torch.no_grad()
def zero_pruned_weights(weight: Tensor, mask: Tensor) -> None:
    """Set this rank's shard of a weight to 0 where its mask is False; the mask may be on another device."""
    local_shard(weight).masked_fill_(~mask.to(weight.device), 0)


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (both(WeightAveraging), both(StochasticWeightAveraging))):
            average = average_model(callback)
            if average is not None:
                yield average
