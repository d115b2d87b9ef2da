"""The paper's three consistencies (section 3), each with a rule that violates it, and the adaptive rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_autoprune.method.estimators import ESTIMATORS, straight_through
from lightning_autoprune.method.update_rules import AdaptiveRule, GradientScale, make_rule


def without_sign(dL_dT: Tensor, W: Tensor) -> Tensor:
    """Return dL/dT, a wrong sensitivity: M follows the weight itself, not its magnitude."""
    return dL_dT


def normalize(g0: Tensor, v: Tensor, updates: int, decay: float = 0.999) -> Tensor:
    return AdaptiveRule().direction(g0, {"v": v}, updates, decay)


def make_direction(name: str):
    """Return a function that gives g without pressure; it keeps the running averages between its calls."""
    rule, state, updates = make_rule(name), {}, [0]

    def direction(dL_dT: Tensor, W: Tensor) -> Tensor:
        G = rule.sensitivity(dL_dT, W)
        updates[0] += 1
        for key in rule.state_names:
            state.setdefault(key, torch.zeros_like(G))
        return rule.direction(G, state, updates[0], decay=0.999)

    return direction


CONSISTENT = ("adaptive", "autoprune")


# Sensitivity consistency: the step does not scale with |w|.


def step_ratio(direction) -> float:
    """Return the largest over the smallest step of m for the same dL/dT, with weights from 0.01 to 100."""
    W = torch.logspace(-2, 2, 9) * torch.tensor([1.0, -1.0]).repeat(5)[:9]
    steps = direction(torch.full((9,), 0.7), W).abs()
    return (steps.max() / steps.min()).item()


@pytest.mark.parametrize("name", CONSISTENT)
def test_sensitivity_does_not_scale_with_the_weight(name):
    assert step_ratio(make_direction(name)) == pytest.approx(1)


def test_sensitivity_scales_with_the_weight_under_the_vanilla_rule():
    assert step_ratio(make_direction("vanilla")) == pytest.approx(1e4)


# Correlation consistency: m moves in the direction that the loss wants |w| to move in.


def sign_agreement(direction, seed: int) -> float:
    """Return the fraction of entries in which dL/dm and dL/d|w| have the same sign.

    dL/d|w| is computed by autograd, with w = sgn(w) · |w|.
    """
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(50, generator=generator)
    x, y = torch.randn(30, 50, generator=generator), torch.randn(30, generator=generator)
    magnitude = W.abs().requires_grad_()
    loss = (torch.tanh(x @ (W.sign() * magnitude)) - y).square().mean()
    (dL_dmagnitude,) = torch.autograd.grad(loss, magnitude)
    T = W.clone().requires_grad_()
    (dL_dT,) = torch.autograd.grad((torch.tanh(x @ T) - y).square().mean(), T)
    return (direction(dL_dT, W).sign() == dL_dmagnitude.sign()).float().mean().item()


@given(st.integers(0, 1000), st.sampled_from(CONSISTENT))
def test_m_moves_in_the_direction_of_the_magnitude(seed, name):
    assert sign_agreement(make_direction(name), seed) == 1


def test_without_the_sign_m_moves_against_the_magnitude_of_negative_weights():
    assert sign_agreement(without_sign, 0) < 0.7


# Direction consistency: the coarse gradient is a descent direction of the true objective.


def cosine_to_true_gradient(direction, estimator: str, seed: int, samples: int = 400) -> float:
    """Return the cosine between the expected coarse gradient and the true gradient of a linear model.

    The inputs are x ~ N(0, I) and the targets x·t. Gaussian noise ε is added to m, so that the objective has a gradient
    in m: L(m) = E ½|T − t|² with T = W ⊙ h(m + ε). Hence dL/dm_i = φ(m_i) · ½((w_i − t_i)² − t_i²). The expected coarse
    gradient is a Monte Carlo mean over ε and over batches of x.
    """
    generator = torch.Generator().manual_seed(seed)
    n = 20
    W, t = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    m = 0.3 * torch.randn(n, generator=generator)
    density = torch.exp(-m.square() / 2)
    true = density * ((W - t).square() - t.square()) / 2
    coarse = torch.zeros(n)
    for _ in range(samples):
        noisy = m + torch.randn(n, generator=generator)
        T = torch.where(noisy > 0, W, 0.0)
        x = torch.randn(64, n, generator=generator)
        dL_dT = x.T @ (x @ (T - t)) / 64
        slope = straight_through(estimator, noisy)
        coarse += direction(dL_dT, W) * (1 if slope is None else slope) / samples
    return (coarse @ true / (coarse.norm() * true.norm())).item()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONSISTENT)
def test_the_coarse_gradient_is_a_descent_direction(estimator, seed, name):
    assert cosine_to_true_gradient(make_direction(name), estimator, seed) > 0.3


def test_without_the_sign_the_coarse_gradient_is_not_always_a_descent_direction():
    assert min(cosine_to_true_gradient(without_sign, "linear", seed, 100) for seed in range(6)) < 0


# The adaptive rule: pressure has little effect on weights that the loss is sensitive to.


def test_gradient_noise_and_magnitude_protect_a_weight_under_the_adaptive_rule():
    generator = torch.Generator().manual_seed(0)
    noise, W = torch.tensor([0.1, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 10.0, 10.0])
    v, mean_decrease = torch.zeros(4), torch.zeros(4)
    for updates in range(1, 2001):
        G = AdaptiveRule().sensitivity(noise * torch.randn(4, generator=generator), W)
        mean_decrease += normalize(G + 0.5, v, updates) / 2000  # 0.5 is the pressure
    assert mean_decrease.tolist() == pytest.approx([0.98, 0.45, 0.05, 1.0], abs=0.05)  # 0.5 / √(0.5² + (noise · w)²)


def test_v_starts_as_the_mean_square_and_forgets_the_past():
    v = torch.zeros(1)
    assert normalize(torch.tensor([2.0]), v, 1, decay=0.9).item() == pytest.approx(1)
    for updates in range(2, 202):
        last = normalize(torch.tensor([6.0]), v, updates, decay=0.9)
    assert last.item() == pytest.approx(1)
    assert normalize(torch.tensor([0.0]), v, 202, decay=0.9).item() == 0


def test_an_entry_that_never_had_a_gradient_stays_0():
    assert normalize(torch.zeros(3), torch.zeros(3), 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("steps", "remembered"), [(1, 10), (400, 10), (4000, 100), (40_000, 1000), (10**7, 1000)])
def test_the_decay_remembers_a_fortieth_of_the_pruning_phase_within_limits(steps, remembered):
    assert AdaptiveRule().decay(steps) == pytest.approx(1 - 1 / remembered)


# The running scale of the gradients


@given(st.floats(1e-6, 1e6), st.integers(1, 50))
def test_the_scale_of_constant_gradients_is_exact_from_the_first_update(mean_square, updates):
    scale = GradientScale()
    for _ in range(updates):
        value = scale.update(mean_square)
    assert value == pytest.approx(mean_square**0.5)


def test_the_scale_follows_a_change_slowly():
    scale = GradientScale(decay=0.9)
    for _ in range(100):
        scale.update(1.0)
    assert 1 < scale.update(4.0) < 1.2
