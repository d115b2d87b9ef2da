"""Prune sharded and whole weights with each granularity, on two ranks: ``python sharded_run.py FOLDER``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from granularities import Blocks, TwoOfFour
from helpers import same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_autoprune import AuxiliaryParameters, prunable_weights
from lightning_autoprune.method.granularity import Granularity, NeuronGranularity, WeightGranularity
from lightning_autoprune.model.prunable_neurons import find_neurons
from lightning_autoprune.tensors.sharding import gather_whole, local_shard

SHAPES = {"0": (13, 12), "2": (1, 13), "4": (8, 1), "6": (20, 8), "8": (4, 20)}
"""Shapes that do not divide evenly: a layer of thirteen rows, and one of a single row, which only one rank has."""


def make_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [module for rows, columns in SHAPES.values() for module in (nn.Linear(columns, rows).double(), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def make_neuron_granularity() -> NeuronGranularity:
    model = make_network()
    return NeuronGranularity(find_neurons(model, prunable_weights(model), torch.zeros(2, 12, dtype=torch.float64)))


def train(aux: AuxiliaryParameters, weights: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        gradients = [torch.randn(tuple(weight.shape), dtype=torch.float64) for weight in weights.values()]
        local_gradients = [
            aux.placement.shard(g, weight) for g, weight in zip(gradients, weights.values(), strict=True)
        ]
        aux.before_forward()
        assert aux.step(local_gradients, lr=0.05, mu=0.5)
        aux.update_masks()


def collect_results(aux: AuxiliaryParameters, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return M, weights, masks and counts of a run, for whole layers."""
    masks = zip(aux.masks(), weights.values(), strict=True)
    return {
        "M": aux.granularity.whole(aux, aux.M) if aux.M else [],
        "weights": [gather_whole(local_shard(weight), weight).clone() for weight in weights.values()],
        "masks": [gather_whole(mask, weight) for mask, weight in masks],
        "numbers": (aux.kept, aux.sparsity, aux.density, aux.layer_sparsity()),
    }


def compare(make: Callable[[], Granularity], rule: str, chosen: tuple[str, ...]) -> dict[str, bool]:
    """Return whether sharded weights equal whole ones: in pruning, after resuming, at a target and with final masks."""
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), make_network()
    whole = {name: prunable_weights(model)[name].detach().clone() for name in chosen}
    sharded = {name: distribute_tensor(weight.clone(), mesh, [Shard(0)]) for name, weight in whole.items()}
    equal: dict[str, bool] = {}
    runs = []
    for weights in (whole, sharded):
        aux = AuxiliaryParameters(weights, granularity=make(), update_rule=rule, layer_floor=0.1)
        train(aux, weights, range(6))
        runs.append(aux)

    def record(moment: str) -> None:
        expected, actual = collect_results(runs[0], whole), collect_results(runs[1], sharded)
        pairs = zip(expected["M"], actual["M"], strict=True)
        close = all(torch.allclose(a, b, rtol=TOLERANCE[a.dtype]) for a, b in pairs)
        equal[moment] = close and same({**expected, "M": 0}, {**actual, "M": 0})

    record("pruning")
    state = runs[0].state_dict()  # the sharded weights resume from the state of the whole ones
    runs[1] = AuxiliaryParameters(sharded, granularity=make(), update_rule=rule, layer_floor=0.1, initial_m=None)
    runs[1].load_state_dict(state)
    equal["state"] = same(runs[1].state_dict(), state)
    for aux, weights in zip(runs, (whole, sharded), strict=True):
        train(aux, weights, range(6, 9))
    record("resumed")
    for aux in runs:
        aux.meet(0.4)
    record("target")
    for aux in runs:
        aux.finalize_masks()
    record("final")
    return equal


GRANULARITIES: dict[str, tuple[Callable[[], Granularity], tuple[str, ...]]] = {
    "weight": (WeightGranularity, tuple(SHAPES)),
    "block": (Blocks, tuple(SHAPES)),
    "2:4": (TwoOfFour, ("0", "6", "8")),
    "neuron": (make_neuron_granularity, tuple(SHAPES)),
}
RULES = ("adaptive", "autoprune")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def compare_all() -> dict[str, dict[str, bool]]:
    return {
        f"{name}, {rule}": compare(make, rule, chosen)
        for name, (make, chosen) in GRANULARITIES.items()
        for rule in RULES
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    torch.save(compare_all(), folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
