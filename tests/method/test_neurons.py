"""Pruning whole channels: their costs, masks, gradients and targets."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import DIFFICULT, EXACT
from helpers import train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_autoprune import (
    AutoPruneError,
    Pruner,
    Settings,
    layer_sparsity,
    model_cost,
    prunable_weights,
    shrink,
    sparsity,
)
from lightning_autoprune.demo.networks import lenet5
from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.granularity import NeuronGranularity
from lightning_autoprune.model.prunable_neurons import find_neurons

CHANNELS = {name: EXACT[name] for name in ("lenet5", "resnet", "mobilenet", "dense", "signals", "volumes")}


def build_architecture(name):
    """Return a network, its neurons and an example input."""
    make, shape = {**EXACT, **DIFFICULT}[name]
    network = make()
    return network, find_neurons(network, prunable_weights(network), torch.zeros(2, *shape)), torch.zeros(2, *shape)


def choose_alive(neurons, seed):
    """Return a random choice of the channels to keep, with at least one of each group."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(neurons.count, generator=generator) < torch.rand(1, generator=generator)
    for group in neurons.groups:
        alive[group[torch.randint(len(group), (1,), generator=generator)]] = True
    return alive


def weights_with_neurons(network, neurons):
    weights = prunable_weights(network)
    return {name: weights[name] for name in neurons.rows}


def make_auxiliary(network, neurons, **options):
    weights = weights_with_neurons(network, neurons)
    return AuxiliaryParameters(weights, granularity=NeuronGranularity(neurons), **options)


def test_lenet5_has_the_channels_of_its_hidden_layers():
    _, neurons, _ = build_architecture("lenet5")
    assert [len(group) for group in neurons.groups] == [20, 50, 500]
    assert neurons.rows["9"].tolist() == [570] * 10  # one past the last channel, since outputs belong to none
    assert neurons.columns["0"].tolist() == [570]
    assert neurons.columns["7"].tolist() == [20 + i // 16 for i in range(800)]


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_density_equals_that_of_the_shrunk_model(name, seed):
    network, neurons, inputs = build_architecture(name)
    dense = model_cost(network, inputs)
    size = sum(w.numel() for w in prunable_weights(network).values())
    aux = make_auxiliary(network, neurons)
    aux.M[0] = torch.where(choose_alive(neurons, seed), 1.0, -1.0)
    aux.update_masks()
    aux.finalize_masks()
    small = shrink(network, inputs)
    left = sum(w.numel() for w in prunable_weights(small).values())
    assert left <= size * (1 - aux.sparsity) * (1 + 1e-6)  # less if a pruned channel makes others dead
    flops = neurons.remaining(aux.granularity.alive, {name: float(layer.flops) for name, layer in dense.layers.items()})
    assert model_cost(small, inputs).flops <= dense.flops * flops * (1 + 1e-6)
    if name != "dense":
        assert left == pytest.approx(size * (1 - aux.sparsity), rel=1e-6)
        assert model_cost(small, inputs).flops == pytest.approx(dense.flops * flops, rel=1e-6)


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("final", [False, True])
def test_the_reported_sparsity_is_that_of_the_weights(name, final):
    network, neurons, _ = build_architecture(name)
    aux = make_auxiliary(network, neurons)
    for seed in range(3, 6):
        aux.M[0] = torch.where(choose_alive(neurons, seed), 1.0, -1.0)
        aux.update_masks()
        if final:
            aux.finalize_masks()
        assert aux.sparsity == pytest.approx(sparsity(network), abs=1e-12)
        assert aux.layer_sparsity() == pytest.approx(layer_sparsity(network), abs=1e-12)
        if final:
            break


@pytest.mark.parametrize("name", CHANNELS)
def test_preparing_the_forward_pass_changes_no_output_and_is_undone(name):
    network, neurons, inputs = build_architecture(name)
    inputs = torch.randn_like(inputs)
    aux = make_auxiliary(network, neurons)
    latent = [W.clone() for W in aux.W]
    aux.M[0] = torch.where(choose_alive(neurons, 3), 1.0, -1.0)
    aux.update_masks()
    masked = [weight.detach().clone() for weight in aux.weights.values()]
    before = network.eval()(inputs)
    aux.before_forward()
    assert any(not torch.equal(weight, T) for weight, T in zip(aux.weights.values(), masked, strict=True))
    torch.testing.assert_close(network(inputs), before, rtol=1e-5, atol=1e-6)
    aux.after_weight_step()
    assert all(torch.equal(weight, T) for weight, T in zip(aux.weights.values(), masked, strict=True))
    aux.before_forward()
    aux.M[0].fill_(1.0)
    aux.update_masks()
    assert all(torch.equal(weight, W) for weight, W in zip(aux.weights.values(), latent, strict=True))


def test_the_weights_of_a_pruned_channel_keep_their_values_whatever_the_optimizer_does():
    network, x, y = make_problem()
    aux = make_auxiliary(network, find_neurons(network, prunable_weights(network), x))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        if step == 2:  # with momentum by now
            latent = [W.clone() for W in aux.W]
            aux.M[0][:20] = -1.0
            aux.update_masks()
        optimizer.zero_grad()
        aux.before_forward()
        nn.functional.cross_entropy(network(x), y).backward()
        aux.mask_gradients()
        optimizer.step()
        aux.after_weight_step()
    assert torch.equal(aux.W[0][:20], latent[0][:20])
    assert torch.equal(aux.W[1][:, :20], latent[1][:, :20])
    assert not torch.equal(aux.W[0][20:], latent[0][20:])


def test_gradients_without_the_activations_of_pruned_channels_are_refused():
    network, x, y = make_problem()
    aux = make_auxiliary(network, find_neurons(network, prunable_weights(network), x))

    def step(prepare):
        network.zero_grad()
        if prepare:
            aux.before_forward()
        nn.functional.cross_entropy(network(x), y).backward()
        return aux.step([weight.grad for weight in aux.weights.values()], lr=0.1, mu=0.0)

    assert step(prepare=False)  # no channel is pruned yet
    aux.M[0][:20] = -1.0
    aux.update_masks()
    with pytest.raises(AutoPruneError, match=r"Pruned channels got no gradient, .* call `before_forward` before it"):
        step(prepare=False)
    assert step(prepare=True)


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_marginal_costs_are_proportional_to_the_cost_of_one_more_channel(seed):
    _, neurons, _ = build_architecture("lenet5")
    alive = choose_alive(neurons, seed)
    channels = torch.randperm(neurons.count, generator=torch.Generator().manual_seed(seed))[:6].tolist()
    marginal_costs, differences = neurons.marginal_costs(alive)[channels], []
    for i in channels:
        with_it, without = alive.clone(), alive.clone()
        with_it[i], without[i] = True, False
        differences.append(neurons.density(with_it) - neurons.density(without))
    ratio = torch.tensor(differences) / marginal_costs
    assert torch.allclose(ratio, ratio.mean().expand(6), rtol=1e-3)


def masked_forward(network, h, x):
    """Run the network with the activations of each channel multiplied by its entry of the mask."""
    x = torch.relu(network[0](x)) * h[:6]
    x = torch.relu(network[2](x)) * h[6:11]
    return network[4](x)


def test_the_gradient_equals_that_of_masks_on_the_activations():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    plain, x = copy.deepcopy(network), torch.randn(16, 4)
    aux = make_auxiliary(network, find_neurons(network, prunable_weights(network), x), update_rule="vanilla")
    aux.M[0] = torch.tensor([1.0, -1, 1, 1, -1, 1, 1, 1, -1, 1, 1])
    aux.update_masks()
    aux.before_forward()
    h = (aux.M[0] > 0).float().requires_grad_()
    masked_forward(plain, h, x).square().sum().backward()
    network(x).square().sum().backward()
    gradients = [weight.grad for weight in aux.weights.values()]
    [(g, *_)] = aux.granularity.sensitivities(aux, gradients, aux.rule)
    torch.testing.assert_close(g * aux.granularity._root_sizes, h.grad)  # also of pruned channels: they can come back
    assert h.grad[[1, 4]].abs().min() > 0


@pytest.mark.parametrize("rule", ["autoprune", "vanilla", "adaptive"])
def test_the_step_of_a_channel_does_not_grow_with_its_number_of_weights(rule):
    """Sensitivity consistency: channels of 8 and of 512 weights step alike if gradients are of equal size."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 8), nn.ReLU(), nn.Linear(8, 512))
    aux = make_auxiliary(network, find_neurons(network, prunable_weights(network), torch.zeros(1, 4)), update_rule=rule)
    for weight in aux.weights.values():
        weight.data.normal_()
    before = aux.M[0].clone()
    for _ in range(20):
        assert aux.step([torch.randn_like(w) for w in aux.weights.values()], lr=1.0, mu=0.0)
    moved = (aux.M[0] - before).square()
    narrow, wide = moved[:50].mean().sqrt(), moved[50:].mean().sqrt()
    assert 0.4 < narrow / wide < 2.5


def make_problem():
    torch.manual_seed(0)
    layers = nn.Linear(8, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)
    network = nn.Sequential(*layers)
    x = torch.randn(256, 8)
    return network, x, x[:, :4].argmax(1)


@pytest.mark.parametrize("target", [{"target_sparsity": 0.8}, {"target_flops": 0.2}])
def test_a_target_is_met_as_closely_as_whole_neurons_allow(target):
    network, x, y = make_problem()
    neurons = find_neurons(network, prunable_weights(network), x)
    pruner = Pruner(
        weights_with_neurons(network, neurons), Settings(granularity="neuron", **target), 300, neurons=neurons
    )
    pruner.start()
    list(train(pruner, network, x, y, 300))
    assert pruner.masks_final
    assert 0.8 <= pruner.sparsity < 0.85
    accuracy = (network.eval()(x).argmax(1) == y).float().mean()
    assert accuracy > 0.9


@pytest.mark.parametrize("kept", range(1, 11))
@pytest.mark.parametrize("as_target", [lambda d: {"target_sparsity": 1 - d}, lambda d: {"target_flops": d}])
def test_a_target_that_whole_neurons_can_meet_is_met_exactly(kept, as_target):
    network = nn.Sequential(nn.Linear(8, 10, bias=False), nn.ReLU(), nn.Linear(10, 2, bias=False))
    neurons, weights = find_neurons(network, prunable_weights(network), torch.zeros(2, 8)), prunable_weights(network)
    options = as_target(kept / 10)  # includes the floor, which is one neuron
    pruner = Pruner(weights, Settings(granularity="neuron", warmup=0, **options), 1, neurons=neurons)
    pruner.start()
    pruner.end_step()
    assert pruner.masks_final
    assert pruner.sparsity == pytest.approx(1 - kept / 10, abs=1e-12)


def test_neurons_come_back_during_pruning():
    network, x, y = make_problem()
    neurons = find_neurons(network, prunable_weights(network), x)
    settings_ = Settings(granularity="neuron", target_sparsity=0.8, warmup=0.1, finetune=0.1)
    pruner = Pruner(weights_with_neurons(network, neurons), settings_, 400, neurons=neurons)
    pruner.start()
    came_back, before = 0, None
    for _ in train(pruner, network, x, y, 350):
        now = pruner.auxiliary.granularity.alive if pruner.auxiliary else None
        if before is not None:
            came_back += int((now & ~before).sum())
        before = now
    assert came_back > 3


def test_every_layer_keeps_one_neuron_if_every_m_is_negative():
    network, x, _ = make_problem()
    aux = make_auxiliary(network, find_neurons(network, prunable_weights(network), x))
    aux.M[0].fill_(-1.0)
    aux.update_masks()
    assert [int(aux.granularity.alive[group].sum()) for group in aux.granularity.neurons.groups] == [1, 1]


def test_a_target_below_the_floors_is_refused_with_the_lowest_possible_density():
    network, x, _ = make_problem()
    neurons = find_neurons(network, prunable_weights(network), x)
    settings_ = Settings(granularity="neuron", target_flops=0.001)
    with pytest.raises(AutoPruneError) as error:
        Pruner(weights_with_neurons(network, neurons), settings_, 10, neurons=neurons)
    assert str(error.value) == (
        "Keeping 0.001 of the model is not possible by pruning neurons: with `layer_floor=0.001`, 2 of 70 neurons must"
        " stay. With the weights that belong to no neuron, they make up 0.007927 of it. Keep more, or lower"
        " `layer_floor`."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_flops": 0.5}, '`target_flops` is 0.5, and `granularity="weight"` makes no layer smaller: use `gran'),
        ({"cost": "flops"}, "`cost` is 'flops', and `granularity=\"weight\"` makes no layer smaller"),
        ({"granularity": "filter"}, "`granularity` is 'filter'; allowed are 'weight', 'neuron'"),
        ({"granularity": "neuron", "cost": "time"}, "`cost` is 'time'; allowed are 'parameters', 'flops'"),
        ({"granularity": "neuron", "target_flops": 0.0}, r"`target_flops` is 0.0; it must be a number in \(0, 1\]"),
        ({"granularity": "neuron", "target_flops": 0.5, "cost": "parameters"}, '`cost` must be "flops" or None'),
        ({"granularity": "neuron", "target_flops": 0.5, "target_sparsity": 0.5}, "are both given: only one target"),
    ],
)
def test_invalid_or_contradictory_settings_are_refused(options, message):
    with pytest.raises(AutoPruneError, match=message):
        Settings(**options)


def test_the_error_for_a_model_without_prunable_channels_gives_the_reasons():
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.raises(AutoPruneError) as error:
        find_neurons(network, prunable_weights(network), torch.zeros(2, 4))
    assert str(error.value) == (
        "`granularity=\"neuron\"` finds no channel to prune in Sequential: it goes through '1', a LayerNorm; it is an"
        ' output of the model. Use `granularity="weight"`.'
    )


def test_channels_of_excluded_layers_are_not_pruned():
    network = lenet5()
    neurons = find_neurons(network, prunable_weights(network, exclude=["3"]), torch.zeros(1, 1, 28, 28))
    assert [len(group) for group in neurons.groups] == [500]  # "3" produces or reads all others


def test_density_includes_the_cost_of_the_rest_of_the_model():
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 200))
    neurons = find_neurons(network, prunable_weights(network, exclude=["4"]), torch.zeros(2, 8))
    neurons.costs = {"0": 128.0, "2": 128.0}
    neurons.rest = 3200.0
    alive = torch.zeros(8, dtype=torch.bool)
    alive[0] = True
    assert neurons.density(alive) == pytest.approx((16 + 16 + 3200) / 3456)


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_channels_without_a_usable_norm_start_at_a_constant_with_a_warning(value):
    network, neurons, _ = build_architecture("lenet5")
    torch.nn.init.constant_(network[7].weight, value)  # reads the second group of channels
    with pytest.warns(UserWarning, match="The weights of '7' are all 0, or some are not finite"):
        aux = make_auxiliary(network, neurons)
    first, second, third = (aux.M[0][group] for group in neurons.groups)
    assert (second == torch.tensor(0.1)).all()
    assert first.std() > 0
    assert third.std() > 0
