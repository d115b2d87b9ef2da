"""What the callback learns about a model from its ``example_input_array``: its cost, and its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.granularity import GRANULARITIES, GranularityName
from lightning_autoprune.method.neurons import Neurons
from lightning_autoprune.method.settings import Settings
from lightning_autoprune.model.cost import ModelCost, model_cost
from lightning_autoprune.model.prunable_neurons import find_neurons
from lightning_autoprune.training.lightning_package import LightningModule

__all__ = ["ModelAnalysis", "analyze_model", "check_example", "measure_cost"]


@dataclass
class ModelAnalysis:
    """Which weights of a model are pruned, and what the model costs.

    Attributes:
        weights: the weights to prune, by layer name.
        neurons: their channels, if whole channels are pruned; else None.
        cost: what the dense model costs; None if the module has no example, or does not run on it.
    """

    weights: dict[str, nn.Parameter]
    neurons: Neurons | None = None
    cost: ModelCost | None = None

    def flops_left(self, layer_sparsity: Mapping[str, float]) -> float | None:
        """Return the fraction of the model's operations that is left; None if the cost is not known."""
        return self.cost.flops_left(layer_sparsity) if self.cost else None

    def flops_by_layer(self) -> dict[str, int] | None:
        """Return the operations of each layer, by name; None if the cost is not known."""
        return {name: self.cost.flops_of(name) for name in self.cost.layers} if self.cost else None


def check_example(module: LightningModule, granularity: GranularityName) -> None:
    """Raise if channels are to be pruned in a module that gives no example input.

    Raises:
        AutoPruneError: saying what to set.
    """
    if GRANULARITIES[granularity].prunes_channels and module.example_input_array is None:
        raise AutoPruneError(
            f'`granularity="{granularity}"` needs to see how {type(module).__name__} runs: set'
            " `self.example_input_array` in it to a batch of inputs of its `forward`."
        )


def analyze_model(module: LightningModule, weights: Mapping[str, nn.Parameter], settings: Settings) -> ModelAnalysis:
    """Find out what to prune in a model, and what the dense model costs.

    Args:
        module: the module. Its ``forward`` is run on the example in evaluation mode, and nothing in it changes.
        weights: those that may be pruned, by layer name.
        settings: how to prune.

    Raises:
        AutoPruneError: if channels are to be pruned and none can be, or the module does not run on its example.
    """
    if module.example_input_array is None or not GRANULARITIES[settings.granularity].prunes_channels:
        return ModelAnalysis(dict(weights), cost=measure_cost(module, weights))
    inputs = _example(module, weights)
    neurons = find_neurons(module, weights, inputs)
    cost = model_cost(module, inputs)
    if settings.counts_flops:
        neurons.costs = {name: float(cost.layers[name].flops) for name in neurons.rows}
        neurons.rest = cost.flops - sum(neurons.costs.values())
    return ModelAnalysis({name: weights[name] for name in neurons.rows}, neurons, cost)


def measure_cost(module: LightningModule, weights: Mapping[str, torch.Tensor]) -> ModelCost | None:
    """Return what the dense model costs; None if the module has no example, or, with a warning, does not run on it.

    Args:
        module: the module; it is run as :func:`analyze_model` runs it.
        weights: some of its weights. The example gets their dtype.
    """
    if module.example_input_array is None or not weights:
        return None
    try:
        return model_cost(module, _example(module, weights))
    except Exception as error:  # a figure in a log is no reason to stop
        rank_zero_warn(f"`example_input_array` does not run, so `autoprune/flops` is not logged: {error}")
        return None


def _example(module: LightningModule, weights: Mapping[str, torch.Tensor]) -> Any:
    """Return the module's example on its device, in the dtype of the weights."""
    dtype = next(iter(weights.values())).dtype
    return apply_to_collection(
        module.example_input_array,
        torch.Tensor,
        lambda x: x.to(module.device, dtype if x.is_floating_point() else None),  # for "64-true" and the like
    )
