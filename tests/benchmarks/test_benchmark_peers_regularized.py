"""The benchmarks' L0, variational dropout, spred and NNCF do what their papers or their documentation say."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from harness.data import Data
from harness.methods import l0, vardrop
from harness.methods.l0 import L0
from harness.methods.regularized import linear_map
from harness.methods.spred import Spred
from harness.methods.vardrop import VariationalDropout
from harness.tasks import Task
from lightning.pytorch import Callback
from peers import STEPS, make_task, mlp, run_watched
from torch import nn

from lightning_autoprune.model.prunable_layers import prunable_weights

CUT = 27  # the cut is after this step, the first at or after 40 · 0.66
RUNS = {
    "l0": lambda compression=10, strength=10.0, **kw: L0(compression, strength, gate_lr=0.2, end=0.66, **kw),
    "vardrop": lambda compression=10, strength=1.0, **kw: VariationalDropout(
        compression, strength, noise_lr=0.2, end=0.66, **kw
    ),
    "spred": lambda compression=10, strength=1e-2, **kw: Spred(compression, strength, end=0.66, **kw),
}


def convolutions():
    layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))  # 510 weights


class Embedded(nn.Module):
    """An embedding of codes and a linear layer, of which only the linear layer is pruned."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(8, 16), nn.Linear(16, 3)

    def forward(self, codes):
        return self.linear(self.embedding(codes).mean(1))


def make_code_task():
    codes = torch.randint(8, (320, 4), generator=torch.Generator().manual_seed(0))
    data = Data((codes[:256], codes[:256, 0] % 3), (codes[256:], codes[256:, 0] % 3))
    return Task("codes", lambda directory: data, Embedded, 5, 32, 1e-2, "error", (10,))


TASKS = {"mlp": make_task(mlp, (12,)), "convolutions": make_task(convolutions, (1, 8, 8))}


class Watch(Callback):
    """Records the weights after each step, and how many steps Adam's state of each weight has seen."""

    def __init__(self):
        self.weights, self.ages = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = list(prunable_weights(pl_module).values())
        self.weights.append([w.detach().clone() for w in weights])
        self.ages.append([float(trainer.optimizers[0].state.get(w, {}).get("step", 0)) for w in weights])


def run(method, task):
    """Train, and return the outcome, the watch and the network."""
    watch = Watch()
    outcome, network = run_watched(method, task, watch)
    return outcome, watch, network


def check_run(method, task):
    """Check what holds for each of these methods."""
    dense = task.network()
    total = sum(w.numel() for w in prunable_weights(dense).values())
    _, watch, network = run(method, task)
    after = list(prunable_weights(network).values())
    assert sum(int(w.count_nonzero()) for w in after) == round(total / 10)
    # Plain: names and shapes of the dense network, no replaced forward, and no noise even in training mode.
    shapes = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == shapes
    assert all(p.requires_grad for p in network.parameters())
    assert not any("forward" in vars(module) for module in network.modules())
    inputs = task.data(Path()).train[0][:32]
    network.train()
    torch.testing.assert_close(network(inputs), network(inputs), rtol=0, atol=0)
    # From the cut on, the same weights are 0, and the others learn with a fresh state of Adam.
    assert sum(int(w.count_nonzero()) for w in watch.weights[CUT - 2]) > total / 2
    for first, *rest in zip(*watch.weights[CUT - 1 :], strict=True):
        assert all(torch.equal(first == 0, weight == 0) for weight in rest)
    assert all((a != b)[a != 0].any() for a, b in zip(watch.weights[CUT - 1], watch.weights[-1], strict=True))
    assert set(watch.ages[CUT - 2]) == {CUT - 1}
    assert set(watch.ages[-1]) == {STEPS - CUT}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", RUNS)
def test_the_cut_is_exact_the_network_is_plain_and_the_masks_are_final(name, task):
    check_run(RUNS[name](), TASKS[task])


@pytest.mark.parametrize("name", RUNS)
def test_partners_do_not_change_after_the_cut(name):
    method, at_cut = RUNS[name](), []
    cut = method.cut
    method.cut = lambda: (cut(), at_cut.extend(p.detach().clone() for p in method.partners))
    run(method, TASKS["mlp"])
    assert all(torch.equal(a, b) for a, b in zip(at_cut, method.partners, strict=True))
    assert method.penalty(None) == 0.0


def gate(log_alpha):
    return (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(1e-3, 1)


# From a weight and its partner: the score, and the value after the cut.
SCORES = {
    "l0": (lambda w, p: torch.sigmoid(p), lambda w, p: w * gate(p)),
    "vardrop": (lambda w, p: w.square() / p.exp(), lambda w, p: w),
    "spred": (lambda w, p: (w * p).square(), lambda w, p: w * p),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_cut_keeps_the_largest_scores(name):
    method, seen = RUNS[name](), []
    cut, flat = method.cut, lambda tensors: torch.cat([tensor.detach().flatten() for tensor in tensors])

    def look():
        pairs = list(zip(method.weights, method.partners, strict=True))
        expected = [flat([of(w, p) for w, p in pairs]) for of in SCORES[name]]
        cut()
        seen.append((*expected, flat(method.weights), flat(method.masks)))

    method.cut = look
    run(method, TASKS["mlp"])
    [(scores, settled, weights, kept)] = seen
    assert scores[kept].min() >= scores[~kept].max()
    assert scores[kept].min() > scores.min()
    torch.testing.assert_close(weights[kept], settled[kept])


# Weights that the regularizer has pruned before the cut: closed gates, noise over weight (log α > 3), small magnitudes.
PRUNED = {
    "l0": (lambda w, p: l0.noise_free_gates(p) == 0, (0.1, 30.0)),
    "vardrop": (lambda w, p: vardrop.log_alpha(w, p) > 3, (0.01, 3.0)),
    "spred": (lambda w, p: (w * p).abs() < 1e-2, (1e-5, 1e-1)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_larger_strength_prunes_more_weights(name):
    is_pruned, strengths = PRUNED[name]
    fractions = []
    for strength in strengths:
        method = RUNS[name](strength=strength)
        cut = method.cut

        def look(method=method, cut=cut):
            pairs = zip(method.weights, method.partners, strict=True)
            fractions.append(float(torch.cat([is_pruned(w, p).flatten() for w, p in pairs]).float().mean()))
            cut()

        method.cut = look
        run(method, TASKS["mlp"])
    assert fractions[1] > fractions[0] + 0.2


def prepared(method, network, shape=(4, 12)):
    """Prepare a method for a network, in the middle of a run of 100 steps, and return its inputs."""
    inputs = torch.randn(shape)
    method.prepare(network, inputs)
    method.step, method.steps, method.labels = 50, 100, len(inputs)
    return inputs


@pytest.mark.parametrize("name", RUNS)
def test_the_penalty_rises_to_its_strength_over_the_ramp(name):
    method = RUNS[name](ramp=0.5)
    prepared(method, mlp())
    full = float(method.penalty(None).detach())
    penalties = []
    for method.step in (0, 25, 50, 60):
        penalties.append(float(method.penalty(None).detach()))
    assert penalties == pytest.approx([0, full / 2, full, full], rel=1e-5)
    assert full == pytest.approx(method.strength * float(method.regularizer().detach()))


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 2.0])
def test_gates_open_with_the_computed_probability(log_alpha):
    gates = l0.sample_gates(torch.full((200_000,), log_alpha))
    assert (gates != 0).float().mean() == pytest.approx(float(l0.probability_open(torch.tensor(log_alpha))), abs=5e-3)
    assert gates.min() >= 0
    assert gates.max() == 1  # stretching puts probability mass on both ends
    assert (gates == 0).any()


def test_gates_get_gradients_through_the_noise():
    log_alpha = torch.zeros(100_000, requires_grad=True)
    l0.sample_gates(log_alpha).mean().backward()
    eps = 0.05  # for a numerical derivative of the mean gate by log α
    means = [float(l0.sample_gates(torch.full((1_000_000,), sign * eps)).mean()) for sign in (-1, 1)]
    assert float(log_alpha.grad.sum()) == pytest.approx((means[1] - means[0]) / (2 * eps), rel=0.05)


def test_l0_starts_open_and_divides_the_number_of_gates_by_the_labels():
    method = L0(10, open=0.8)
    prepared(method, mlp(), (16, 12))
    assert float(method.regularizer().detach()) == pytest.approx(0.8 * 1020 / 16, rel=1e-4)


def test_gates_are_drawn_once_per_batch():
    method, network = L0(10, open=0.5), mlp()
    prepared(method, network)
    outputs = network(torch.ones(4, 12))
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs, network(torch.ones(4, 12)))


LAYERS = {
    "linear": (lambda: nn.Linear(5, 2), (3, 5)),
    "linear, 3 dimensions": (lambda: nn.Linear(5, 2), (1, 3, 5)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (1, 2, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_local_reparameterization_has_the_moments_of_sampled_weights(kind):
    make, shape = LAYERS[kind]
    layer = make().to(memory_format=torch.channels_last)
    method = VariationalDropout(10, log_variance=-1.0)
    inputs = prepared(method, nn.Sequential(layer), shape)
    method.partners[0].data += torch.randn_like(layer.weight)
    weight, deviation = layer.weight.detach(), (method.partners[0] / 2).exp().detach()
    draws = 20_000
    with torch.no_grad():
        outputs = layer(inputs.repeat(draws, *[1] * (inputs.dim() - 1))).unflatten(0, (draws, -1))
        weights = weight + deviation * torch.randn(draws, *weight.shape)
        sampled = torch.vmap(lambda w: linear_map(layer, inputs, w, layer.bias))(weights)
    spread = float(sampled.std(0).max())
    torch.testing.assert_close(outputs.mean(0), sampled.mean(0), rtol=0, atol=0.05 * spread)
    torch.testing.assert_close(outputs.std(0), sampled.std(0), rtol=0.04, atol=1e-3)


def test_the_divergence_falls_with_the_noise_and_matches_the_exact_expectation():
    log_alpha = torch.linspace(-8, 8, 100)
    values = vardrop.divergence(log_alpha)
    assert (values.diff() < 0).all()  # more noise is closer to the prior
    assert values[-1] == pytest.approx(0, abs=1e-3)
    # The exact expectation is E log|1 + √α·ε| - ½ log α plus a constant; the paper's fit is good to about 0.01.
    noise = torch.randn(2_000_000, dtype=torch.float64)
    points = torch.tensor([-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    exact = torch.stack([(1 + (a / 2).exp() * noise).abs().log().mean() - a / 2 for a in points])
    fitted = vardrop.divergence(points)
    torch.testing.assert_close(fitted - fitted[0], exact - exact[0], rtol=0, atol=0.03)


def test_vardrop_divides_the_divergence_by_the_labels():
    method, network = VariationalDropout(10), mlp()
    prepared(method, network, (16, 12))
    weights = torch.cat([w.flatten() for w in prunable_weights(network).values()])
    expected = vardrop.divergence(-10 - weights.square().log()).sum() / 16
    assert float(method.regularizer().detach()) == pytest.approx(float(expected.detach()), rel=1e-3)


def test_each_label_of_a_sequence_counts():
    inputs = torch.randn(320, 4, 12)
    labels = inputs[..., :3].argmax(-1)
    data = Data((inputs[:256], labels[:256]), (inputs[256:], labels[256:]))
    method = L0(10)
    run_watched(method, Task("tiny", lambda directory: data, mlp, 1, 32, 1e-2, "error", (10,)), Callback())
    assert method.labels == 256 * 4  # the loss is a mean over all of them


@pytest.mark.parametrize("task", TASKS)
def test_spred_starts_as_the_dense_network(task):
    dense, network = TASKS[task].network(), TASKS[task].network()
    network.load_state_dict(dense.state_dict())
    method = Spred(10, strength=0.1)
    method.prepare(network, TASKS[task].data(Path()).train[0])
    for before, u, v in zip(
        prunable_weights(dense).values(), prunable_weights(network).values(), method.partners, strict=True
    ):
        torch.testing.assert_close(u * v, before)
        torch.testing.assert_close(u.abs(), v.abs())
    inputs = TASKS[task].data(Path()).train[0]
    torch.testing.assert_close(network.eval()(inputs), dense.eval()(inputs))
    assert Spred(10).score(torch.tensor([2.0, -3.0]), torch.tensor([3.0, 1.0])).tolist() == [6, 3]
    # If |u| = |v|, the penalty is twice the strength times the L1 norm.
    norm = sum(float(w.detach().abs().sum()) for w in prunable_weights(dense).values())
    assert float(method.penalty(network).detach()) == pytest.approx(2 * 0.1 * norm, rel=1e-5)


def test_the_penalty_of_spred_shrinks_every_weight():
    network, method = mlp(), Spred(10, strength=0.1)
    method.prepare(network, torch.zeros(1, 12))
    factors = [*prunable_weights(network).values(), *method.partners]
    before = [(u * v).detach().abs() for u, v in zip(prunable_weights(network).values(), method.partners, strict=True)]
    method.penalty(network).backward()
    torch.optim.SGD(factors, 1.0).step()
    for old, u, v in zip(before, prunable_weights(network).values(), method.partners, strict=True):
        torch.testing.assert_close((u * v).abs(), old * (1 - 2 * 0.1) ** 2)


@pytest.mark.parametrize("task", ["mlp", "convolutions", "codes"])
def test_nncf_is_cut_exactly_and_plain(task):
    os.environ["NNCF_CI"] = "1"  # no usage statistics
    pytest.importorskip("nncf")
    from harness.methods.nncf_rb import NNCFRegularized

    method = NNCFRegularized(10, mask_lr=0.5)
    check_run(method, make_code_task() if task == "codes" else TASKS[task])


def test_nncf_reaches_its_target_ratio():
    os.environ["NNCF_CI"] = "1"
    pytest.importorskip("nncf")
    from harness.methods.nncf_rb import NNCFRegularized

    method, kept = NNCFRegularized(5, mask_lr=0.1), []
    cut = method.cut
    method.cut = lambda: (kept.append(1 - method.loss.current_ratio), cut())
    run(method, dataclasses.replace(TASKS["mlp"], epochs=25))
    assert kept == [pytest.approx(0.2, abs=0.03)]


def test_weights_that_nncf_pruned_beyond_the_target_are_restored():
    os.environ["NNCF_CI"] = "1"
    pytest.importorskip("nncf")
    from harness.methods.nncf_rb import NNCFRegularized

    method, after = NNCFRegularized(10), []
    cut = method.cut

    def close_all_and_cut():
        for partner in method.partners:
            partner -= 100
        cut()
        after.extend(weight.detach() * mask for weight, mask in zip(method.weights, method.masks, strict=True))

    method.cut = close_all_and_cut
    run(method, TASKS["mlp"])
    assert sum(int(weight.count_nonzero()) for weight in after) == 102
