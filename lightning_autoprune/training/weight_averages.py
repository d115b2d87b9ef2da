"""Averaged copies of the model that other callbacks keep: pruned where the model is, once the masks are final."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.tensors.sharding import local_shard

__all__ = ["prune_again", "prune_averages", "zero_pruned_weights"]


def prune_averages(trainer: Trainer, pruner: Pruner) -> None:
    """Zeroes what is pruned in the averages of ``WeightAveraging`` (EMA) and ``StochasticWeightAveraging``.

    An average is then over values of 0 from there on, and stays 0.

    Args:
        trainer: whose callbacks are looked at.
        pruner: of the weights of its module.
    """
    places = {id(parameter): i for i, parameter in enumerate(trainer.lightning_module.parameters())}
    for average in _averages(trainer):
        parameters = list(average.parameters())
        _zero_all([parameters[places[id(weight)]] for weight in pruner.weights.values()], pruner)


def prune_again(pruner: Pruner) -> None:
    """Zeroes what is pruned in the weights, where an average may have taken their place."""
    _zero_all(pruner.weights.values(), pruner)


def _zero_all(weights: Iterable[Tensor], pruner: Pruner) -> None:
    if pruner.auxiliary:
        for weight, mask in zip(weights, pruner.auxiliary.masks(), strict=True):
            zero_pruned_weights(weight, mask)


@torch.no_grad()
def zero_pruned_weights(weight: Tensor, mask: Tensor) -> None:
    """Sets what this rank has of a weight to 0 where its mask, which may be on another device, is False."""
    local_shard(weight).masked_fill_(~mask.to(weight.device), 0)


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)) and callback._average_model is not None:
            yield callback._average_model
