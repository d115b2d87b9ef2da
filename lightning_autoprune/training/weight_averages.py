"""Averaged copies of the model, which other code keeps: pruned like the model once the masks are final."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.tensors.sharding import local_shard
from lightning_autoprune.training.lightning_internals import average_model, callbacks_of
from lightning_autoprune.training.lightning_package import StochasticWeightAveraging, Trainer, both

__all__ = ["prune_again", "prune_averages", "without_averages", "zero_pruned_weights"]

Weight = TypeVar("Weight", bound=Tensor)


def prune_averages(trainer: Trainer, pruner: Pruner) -> None:
    """Zero the pruned weights in the averages of Lightning's callbacks, and in each ``AveragedModel`` that is in use.

    An ``AveragedModel`` (torch's) may be an attribute of the module, of one of its submodules or of a callback, also in
    a list or a dict. From then on these entries are averages of zeros, and stay 0. Warns of one that may be the average
    of several parts of the module.

    Args:
        trainer: the trainer, whose callbacks may keep averages.
        pruner: the pruner of its module.
    """
    if pruner.auxiliary is None:
        return
    masks = {id(w): mask for w, mask in zip(pruner.weights.values(), pruner.auxiliary.masks(), strict=True)}
    for average, source in _averages(trainer, masks):
        averaged = dict(average.named_parameters())
        for name, weight in source.named_parameters():
            if name in averaged and id(weight) in masks:
                zero_pruned_weights(averaged[name], masks[id(weight)])


def without_averages(module: nn.Module, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return the weights that are not those of an ``AveragedModel`` within a module.

    An average is pruned with the weights that it averages, even if an optimizer has its parameters.
    """
    averages = [part for part in module.modules() if isinstance(part, AveragedModel)]
    averaged = {id(weight) for average in averages for weight in average.parameters()}
    return {name: weight for name, weight in weights.items() if id(weight) not in averaged}


def prune_again(pruner: Pruner) -> None:
    """Zero the pruned weights of the model once more, since an average may have replaced its values."""
    if pruner.auxiliary:
        for weight, mask in zip(pruner.weights.values(), pruner.auxiliary.masks(), strict=True):
            zero_pruned_weights(weight, mask)


@torch.no_grad()
def zero_pruned_weights(weight: Tensor, mask: Tensor) -> None:
    """Set this rank's shard of a weight to 0 where its mask is False; the mask may be on another device."""
    local_shard(weight).masked_fill_(~mask.to(weight.device), 0)


def _averages(trainer: Trainer, pruned: Container[int]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each average of weights that are pruned, and the module that it averages.

    Args:
        trainer: the trainer.
        pruned: the ``id`` of each weight that is pruned.
    """
    module, callbacks = trainer.lightning_module, callbacks_of(trainer)
    for callback in callbacks:
        if isinstance(callback, both(StochasticWeightAveraging)) and (average := average_model(callback)) is not None:
            yield average, module
    holders = (*callbacks, *module.modules())
    found = {id(x): x for holder in holders for x in tree_leaves(vars(holder)) if isinstance(x, AveragedModel)}
    parts_of_averages = {id(part) for averaged in found.values() for part in averaged.modules()}
    prunable = [m for m in module.modules() if id(m) not in parts_of_averages]
    prunable = [m for m in prunable if any(id(weight) in pruned for weight in m.parameters())]
    for averaged in found.values():
        sources = [m for m in prunable if _is_average_of(averaged.module, m)]
        if len(sources) == 1:
            yield averaged.module, sources[0]
        elif sources:
            rank_zero_warn(
                f"An AveragedModel of {type(averaged.module).__name__} may be the average of {len(sources)} parts of"
                f" {type(module).__name__}, so it is not pruned: give each of them a class of its own."
            )


def _is_average_of(average: nn.Module, module: nn.Module) -> bool:
    """Return True if an average has the class of a module, and no parameters that the module lacks."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return type(average) is type(module) and all(
        shapes.get(name) == parameter.shape for name, parameter in average.named_parameters()
    )
