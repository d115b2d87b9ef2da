"""The pull: which layers have it, and how large it is."""

import math

import pytest
import torch
from helpers import train
from torch import nn

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.method.pull import Pull
from lightning_autoprune.method.settings import Settings
from lightning_autoprune.model.prunable_layers import prunable_weights

MEASURED = 20


def make_network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        norm(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )
    for i in (0, 3):
        nn.init.normal_(model[i].weight)  # so large that the eps of the normalization does not matter
    return model


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 1, 8, 8, generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(16) % 4).backward()


def pulled_layers(pull, model, steps=MEASURED):
    """Return the layers whose gradients change in the step after the given number of measured ones."""
    weights = prunable_weights(model)
    for step in range(steps + 1):
        backward(model, step)
        before = {name: weight.grad.clone() for name, weight in weights.items()}
        pull.add_to_gradients(weights)
    return [name for name, weight in weights.items() if not torch.equal(weight.grad, before[name])]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n), lambda n: nn.InstanceNorm2d(n)])
def test_layers_before_a_normalization_are_pulled_and_others_are_not(norm):
    assert pulled_layers(Pull(0.1, 0.5), make_network(norm)) == ["0", "3"]


def test_layers_without_a_normalization_are_not_pulled():
    assert pulled_layers(Pull(0.1, 0.5), make_network(lambda n: nn.Identity())) == []


def test_layers_before_a_frozen_batchnorm_are_not_pulled():
    assert pulled_layers(Pull(0.1, 0.5), make_network().eval()) == []


def test_nothing_changes_while_layers_are_measured_or_without_strength():
    assert pulled_layers(Pull(0.1, 0.5), make_network(), MEASURED - 1) == []
    assert pulled_layers(Pull(0.0, 0.5), make_network()) == []


@pytest.mark.parametrize("gradient_scale", [1.0, 1024.0])
def test_the_pull_is_the_sign_of_each_weight_times_the_root_mean_square_of_all_gradients(gradient_scale):
    model, pull = make_network(), Pull(strength=0.1, density=0.25)
    pulled_layers(pull, model, MEASURED - 1)
    weights = prunable_weights(model)
    with torch.no_grad():
        weights["0"][0] = 0  # a pruned filter
    backward(model, 99)
    before = {name: weight.grad.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad *= gradient_scale
    pull.add_to_gradients(weights, gradient_scale=gradient_scale)
    total = sum(weight.numel() for weight in weights.values())
    rms = math.sqrt(sum(float(gradient.square().sum()) for gradient in before.values()) / total)
    for name in ("0", "3"):
        expected = before[name] + 0.1 / 0.25 * rms * weights[name].detach().sign()
        torch.testing.assert_close(weights[name].grad / gradient_scale, expected)
    assert torch.equal(weights["0"].grad[0] / gradient_scale, before["0"][0])


def test_only_parameters_that_are_stepped_are_pulled():
    model, pull = make_network(), Pull(0.1, 0.5)
    pulled_layers(pull, model, MEASURED - 1)
    weights = prunable_weights(model)
    backward(model, 99)
    before = {name: weight.grad.clone() for name, weight in weights.items()}
    pull.add_to_gradients(weights, stepped={id(weights["3"])})
    assert [name for name in weights if not torch.equal(weights[name].grad, before[name])] == ["3"]


def test_gradients_that_are_not_finite_are_left_alone_and_forgotten():
    model, pull = make_network(), Pull(0.1, 0.5)
    assert pulled_layers(pull, model) == ["0", "3"]
    state = pull.state_dict()
    weights = prunable_weights(model)
    weights["0"].grad[0, 0, 0, 0] = math.inf
    before = {name: weight.grad.clone() for name, weight in weights.items()}
    pull.add_to_gradients(weights)
    assert all(torch.equal(weight.grad, before[name]) for name, weight in weights.items())
    assert pull.state_dict() == state


@pytest.mark.parametrize("stop", [7, 30])
def test_what_was_measured_is_resumed(stop):
    def run(pull, model, first, last):
        for step in range(first, last):
            backward(model, step)
            pull.add_to_gradients(prunable_weights(model))

    whole, stopped, resumed = (Pull(0.1, 0.5) for _ in range(3))
    run(whole, make_network(), 0, 40)
    run(stopped, make_network(), 0, stop)
    resumed.load_state_dict(stopped.state_dict())
    run(resumed, make_network(), stop, 40)
    assert resumed.state_dict() == whole.state_dict()


def sizes_in_training(pull, **settings):
    """Train a network with a pruner for 100 steps; return it, and the sum of abs(w) of its convolutions after each."""
    model = make_network()
    settings = {"target_sparsity": 0.5, "warmup": 0.4, "finetune": 0.3} | settings
    pruner = Pruner(prunable_weights(model), Settings(pull=pull, **settings), 100)
    pruner.start()
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 4
    steps = train(pruner, model, x, y, 100, torch.optim.SGD(model.parameters(), lr=0.2))
    return model, [sum(float(model[i].weight.detach().abs().sum()) for i in (0, 3)) for _ in steps]


def test_weights_are_pulled_from_the_dense_phase_until_the_masks_are_final():
    (_, without), (_, with_pull) = sizes_in_training(0.0), sizes_in_training(2.0)
    assert with_pull[:20] == without[:20]
    assert with_pull[39] < 0.9 * without[39], "the dense phase ends after 40 steps"
    assert with_pull[69] < 0.8 * without[69]
    assert min(with_pull[75:]) > 0.98 * with_pull[70]


def test_with_pruning_switched_off_nothing_is_pulled():
    (a, _), (b, _) = (sizes_in_training(pull, warmup=1.0, finetune=0.0) for pull in (0.0, 0.5))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"target_sparsity": 0.5, "granularity": "neuron"}, {"granularity": "neuron"}])
def test_a_pull_that_could_not_work_is_refused(settings):
    with pytest.raises(AutoPruneError, match=r"`pull` is 0\.1, and it needs a `target_sparsity` and single weights"):
        Settings(pull=0.1, **settings)


def test_a_negative_pull_is_refused():
    with pytest.raises(AutoPruneError, match="`pull`"):
        Settings(pull=-1.0, target_sparsity=0.5)
