"""Averaged copies of the model that other callbacks keep: pruned where the model is, once the masks are final."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

__all__ = ["prune_averages", "zero"]


@torch.no_grad()
def prune_averages(trainer: Trainer, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zeroes what is pruned in the averages of ``WeightAveraging`` (EMA) and ``StochasticWeightAveraging``.

    An average is then over values of 0 from there on, and stays 0.

    Args:
        trainer: whose callbacks are looked at.
        weights: parameters of its module.
        masks: for each, True where it is kept.
    """
    places = {id(parameter): i for i, parameter in enumerate(trainer.lightning_module.parameters())}
    for average in _averages(trainer):
        parameters = list(average.parameters())
        for weight, mask in zip(weights, masks, strict=True):
            zero(parameters[places[id(weight)]], mask)


@torch.no_grad()
def zero(weight: Tensor, mask: Tensor) -> None:
    """Sets a weight to 0 where its mask, which may be on another device, is False."""
    weight.masked_fill_(~mask.to(weight.device), 0)


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)) and callback._average_model is not None:
            yield callback._average_model
