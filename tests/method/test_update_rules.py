"""The three requirements of the paper (section 3), each with a rule that breaks it; what the adaptive rule adds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_autoprune.method.estimators import ESTIMATORS, straight_through
from lightning_autoprune.method.update_rules import AdaptiveRule, make_rule


def without_sign(dL_dT: Tensor, W: Tensor) -> Tensor:
    """A wrong rule: M follows the weight itself, not its magnitude."""
    return dL_dT


def normalize(g0: Tensor, v: Tensor, updates: int, decay: float = 0.999) -> Tensor:
    return AdaptiveRule().direction(g0, {"v": v}, updates, decay)


def rule(name: str):
    """The loss's part of g; under "adaptive" divided by its root mean square over the calls so far."""
    made, state, updates = make_rule(name), {}, [0]

    def of(dL_dT: Tensor, W: Tensor) -> Tensor:
        G = made.sensitivity(dL_dT, W)
        updates[0] += 1
        for key in made.state_names:
            state.setdefault(key, torch.zeros_like(G))
        return made.direction(G, state, updates[0], decay=0.999)

    return of


CONSISTENT = ("adaptive", "autoprune")


# Sensitivity consistency: the step does not scale with |w|.


def spread(of) -> float:
    """Largest over smallest step of m for the same dL/dT, with weights from 0.01 to 100."""
    W = torch.logspace(-2, 2, 9) * torch.tensor([1.0, -1.0]).repeat(5)[:9]
    steps = of(torch.full((9,), 0.7), W).abs()
    return (steps.max() / steps.min()).item()


@pytest.mark.parametrize("name", CONSISTENT)
def test_sensitivity_does_not_scale_with_the_weight(name):
    assert spread(rule(name)) == pytest.approx(1)


def test_sensitivity_scales_with_the_weight_under_the_vanilla_rule():
    assert spread(rule("vanilla")) == pytest.approx(1e4)


# Correlation consistency: m moves as |w| wants to move.


def agreement(of, seed: int) -> float:
    """Share of entries in which dL/dm and dL/d|w| have the same sign; the latter by autograd, w = sgn(w) · |w|."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(50, generator=generator)
    x, y = torch.randn(30, 50, generator=generator), torch.randn(30, generator=generator)
    magnitude = W.abs().requires_grad_()
    loss = (torch.tanh(x @ (W.sign() * magnitude)) - y).square().mean()
    (dL_dmagnitude,) = torch.autograd.grad(loss, magnitude)
    T = W.clone().requires_grad_()
    (dL_dT,) = torch.autograd.grad((torch.tanh(x @ T) - y).square().mean(), T)
    return (of(dL_dT, W).sign() == dL_dmagnitude.sign()).float().mean().item()


@given(st.integers(0, 1000), st.sampled_from(CONSISTENT))
def test_m_moves_as_the_magnitude_wants_to(seed, name):
    assert agreement(rule(name), seed) == 1


def test_m_moves_against_the_magnitude_of_negative_weights_without_the_sign():
    assert agreement(without_sign, 0) < 0.7


# Direction consistency: the coarse gradient is a descent direction of the true objective.


def inner_product(of, estimator: str, seed: int, samples: int = 400) -> float:
    """<E coarse gradient, true gradient> for a linear model with Gaussian inputs, whose true gradient is known.

    With inputs x ~ N(0, I), targets x·t and m disturbed by Gaussian noise, so that the objective has a gradient in m:
    L(m) = E ½|T − t|² with T = W ⊙ h(m + ε), hence dL/dm_i = φ(m_i) · ½((w_i − t_i)² − t_i²). The coarse gradient is
    taken by Monte Carlo over ε and over batches of x.
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
        coarse += of(dL_dT, W) * (1 if slope is None else slope) / samples
    return (coarse @ true / (coarse.norm() * true.norm())).item()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONSISTENT)
def test_the_coarse_gradient_is_a_descent_direction(estimator, seed, name):
    assert inner_product(rule(name), estimator, seed) > 0.3


def test_without_the_sign_the_coarse_gradient_is_no_descent_direction():
    assert min(inner_product(without_sign, "linear", seed, 100) for seed in range(6)) < 0


# The adaptive rule: the pressure weighs little on weights that the loss is sensitive to.


def test_under_the_adaptive_rule_noise_of_the_gradient_protects_a_weight_and_so_does_its_magnitude():
    generator = torch.Generator().manual_seed(0)
    noise, W = torch.tensor([0.1, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 10.0, 10.0])
    v, fallen = torch.zeros(4), torch.zeros(4)
    for updates in range(1, 2001):
        G = AdaptiveRule().sensitivity(noise * torch.randn(4, generator=generator), W)
        fallen += normalize(G + 0.5, v, updates) / 2000  # 0.5 is the pressure
    assert fallen.tolist() == pytest.approx([0.98, 0.45, 0.05, 1.0], abs=0.05)  # 0.5 / √(0.5² + (noise · w)²)


def test_running_squares_are_the_mean_square_at_first_and_forget_afterwards():
    v = torch.zeros(1)
    assert normalize(torch.tensor([2.0]), v, 1, decay=0.9).item() == pytest.approx(1)
    for updates in range(2, 202):
        last = normalize(torch.tensor([6.0]), v, updates, decay=0.9)
    assert last.item() == pytest.approx(1)
    assert normalize(torch.tensor([0.0]), v, 202, decay=0.9).item() == 0


def test_an_entry_that_never_had_a_gradient_stays_0():
    assert normalize(torch.zeros(3), torch.zeros(3), 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("steps", "remembered"), [(1, 10), (400, 10), (4000, 100), (40_000, 1000), (10**7, 1000)])
def test_a_fortieth_of_the_pruning_phase_is_remembered_within_limits(steps, remembered):
    assert AdaptiveRule().decay(steps) == pytest.approx(1 - 1 / remembered)
