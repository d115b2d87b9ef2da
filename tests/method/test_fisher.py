"""The mean square of gradients in the dense phase, and the saliency made of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.method.fisher import FisherInformation, saliency

seeds = st.integers(0, 99)


def make_gradients(seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, generator=generator) for _ in range(count)]


@given(seeds)
def test_it_is_the_mean_square_of_all_gradients(seed):
    fisher, gradients = FisherInformation(), make_gradients(seed)
    for gradient in gradients:
        fisher.add({"a": gradient})
    expected = torch.stack(gradients).square().mean(0)
    torch.testing.assert_close(fisher.of("a", torch.zeros(3, 2)), expected)


def test_each_layer_has_its_own_number_of_gradients():
    fisher = FisherInformation()
    fisher.add({"a": torch.tensor([2.0]), "b": torch.tensor([2.0])})
    fisher.add({"a": torch.tensor([4.0])})
    assert fisher.of("a", torch.zeros(1)) == torch.tensor([10.0])
    assert fisher.of("b", torch.zeros(1)) == torch.tensor([4.0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_entries_that_are_not_finite_count_as_0(value):
    fisher = FisherInformation()
    fisher.add({"a": torch.tensor([1.0, 3.0])})
    fisher.add({"a": torch.tensor([1.0, value])})
    assert fisher.of("a", torch.zeros(2)).tolist() == [1.0, 4.5]


def test_gradients_are_not_changed():
    gradient = torch.tensor([2.0])
    fisher = FisherInformation()
    fisher.add({"a": gradient})
    fisher.add({"a": gradient})
    assert gradient == 2


def test_there_is_none_for_a_layer_of_another_shape_or_without_gradients():
    fisher = FisherInformation()
    fisher.add({"a": torch.ones(2)})
    assert fisher.of("a", torch.zeros(3)) is None
    assert fisher.of("b", torch.zeros(2)) is None


def test_half_precision_gradients_are_squared_in_single_precision():
    fisher = FisherInformation()
    fisher.add({"a": torch.full((2,), 1e-4, dtype=torch.float16)})
    assert fisher.of("a", torch.zeros(2, dtype=torch.float16)).dtype == torch.float32
    assert fisher.of("a", torch.zeros(2)).mean() == pytest.approx(1e-8, rel=1e-2)


def test_a_restored_state_goes_on_as_if_it_had_not_been_saved():
    gradients, weights = make_gradients(0), {"a": torch.zeros(3, 2)}
    fisher, restored = FisherInformation(), FisherInformation()
    for gradient in gradients[:2]:
        fisher.add({"a": gradient})
    restored.load_state_dict(fisher.state_dict(weights), weights)
    for both in (fisher, restored):
        both.add({"a": gradients[2]})
    assert torch.equal(fisher.of("a", weights["a"]), restored.of("a", weights["a"]))


def test_the_state_is_a_copy():
    fisher, weights = FisherInformation(), {"a": torch.zeros(2)}
    fisher.add({"a": torch.ones(2)})
    state = fisher.state_dict(weights)
    fisher.add({"a": torch.ones(2)})
    assert state["sums"]["a"].tolist() == [1.0, 1.0]


@given(seeds, st.floats(0.1, 10))
def test_saliency_is_the_geometric_mean_of_magnitude_and_magnitude_times_root_fisher(seed, mean):
    w, F = make_gradients(seed, 2)
    F = F.square()
    expected = (w.abs() * w.abs() * (F + mean / 1000).sqrt()).sqrt()
    torch.testing.assert_close(saliency(w, F, mean), expected)


def test_weights_without_a_gradient_are_ordered_by_magnitude():
    S = saliency(torch.tensor([3.0, -1.0, 2.0]), torch.zeros(3), mean_F=1.0)
    assert S.argsort().tolist() == [1, 2, 0]
    assert (S > 0).all()
