"""What the callback learns of a model from its ``example_input_array``: what it costs, and its neurons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.neurons import Neurons
from lightning_autoprune.method.settings import Granularity, Settings
from lightning_autoprune.model.cost import ModelCost, model_cost
from lightning_autoprune.model.prunable_neurons import find_neurons

__all__ = ["check_example", "plan"]


def check_example(module: LightningModule, granularity: Granularity) -> None:
    """Raises if neurons are to be pruned in a module that gives no example.

    Raises:
        AutoPruneError: saying what to set.
    """
    if granularity == "neuron" and module.example_input_array is None:
        raise AutoPruneError(
            f'`granularity="neuron"` needs to see how {type(module).__name__} runs: set `self.example_input_array` in'
            " it, to a batch of inputs of its `forward`."
        )


def plan(
    module: LightningModule, weights: Mapping[str, nn.Parameter], settings: Settings
) -> tuple[dict[str, nn.Parameter], Neurons | None, ModelCost | None]:
    """The weights to prune, the neurons if they are pruned whole, and what the dense model costs.

    Args:
        module: the module; its ``forward`` is run on the example in evaluation mode, and nothing of it changes.
        weights: those that may be pruned, by layer name.
        settings: how.

    Raises:
        AutoPruneError: if neurons are to be pruned and none can be, or the module does not run on its example.
    """
    if module.example_input_array is None:
        return dict(weights), None, None
    dtype = next(iter(weights.values())).dtype
    inputs: Any = apply_to_collection(
        module.example_input_array,
        torch.Tensor,
        lambda x: x.to(module.device, dtype if x.is_floating_point() else None),  # of "64-true" and the like
    )
    if settings.granularity == "weight":
        try:
            return dict(weights), None, model_cost(module, inputs)
        except Exception as error:  # a figure in a log is no reason to stop
            rank_zero_warn(f"`example_input_array` does not run, so `autoprune/flops` is not logged: {error}")
            return dict(weights), None, None
    neurons = find_neurons(module, weights, inputs)
    cost = model_cost(module, inputs)
    if settings.counts_flops:
        neurons.costs = {name: float(cost.layers[name].flops) for name in neurons.rows}
        neurons.rest = cost.flops - sum(neurons.costs.values())
    return {name: weights[name] for name in neurons.rows}, neurons, cost
