"""The fast path, which works in place, equals the slow reference, which goes through autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import optimizer
from reference import Reference
from torch import nn

from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.model.prunable_layers import prunable_weights


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 4 * 4, 8), nn.ReLU(), nn.Linear(8, 4)
    ).double()


def make_batches(n: int):
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        x = torch.randn(20, 1, 6, 6, generator=generator, dtype=torch.float64)
        yield x, x.flatten(1)[:, :4].argmax(1)


@pytest.mark.parametrize("estimator", ["linear", "leaky_relu", "softplus"])
@pytest.mark.parametrize("rule", ["adaptive", "autoprune", "vanilla"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_fast_path_equals_the_autograd_reference(name, rule, estimator):
    model = make_network()
    slow = Reference(copy.deepcopy(model), rule, estimator)
    slow_optimizer = optimizer(name, slow.W.values())
    aux = AuxiliaryParameters(prunable_weights(model), update_rule=rule, estimator=estimator, layer_floor=0)
    fast_optimizer = optimizer(name, model.parameters())
    sparsities = set()
    for i, (x, y) in enumerate(make_batches(30)):
        lr, mu = 0.01, 0.6 if i < 15 else 0.0  # first prune, then let weights come back
        slow.weight_step(slow_optimizer, x, y)
        fast_optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        aux.mask_gradients()
        fast_optimizer.step()
        aux.after_weight_step()

        slow.auxiliary_step(x, y, lr, mu)
        loss = nn.functional.cross_entropy(model(x), y)
        aux.step(torch.autograd.grad(loss, list(aux.weights.values())), lr, mu)
        aux.update_masks()
        sparsities.add(aux.sparsity)

        for layer, weight in aux.weights.items():
            j = list(aux.weights).index(layer)
            kept = slow.M[f"{layer}.weight"] > 0
            torch.testing.assert_close(aux.M[j], slow.M[f"{layer}.weight"].detach())
            torch.testing.assert_close(aux.W[j], slow.W[f"{layer}.weight"].detach())
            torch.testing.assert_close(weight.detach(), slow.W[f"{layer}.weight"].detach() * kept)
    assert max(sparsities) > 0.1, "nothing was pruned, so nothing was compared"
    assert len(sparsities) > 5
