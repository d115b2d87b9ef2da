"""The initial M: the magnitude of each weight relative to its layer, or a constant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.method.initialization import can_start, initial_m, warn_of_constant

seeds, scales = st.integers(0, 99), st.floats(1e-3, 10)


def make_weights(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, scales, st.floats(1e-6, 1e6))
def test_magnitude_is_measured_in_standard_deviations_of_the_layer(seed, scale, size):
    w = make_weights(seed, 6, 5)
    expected = scale * w.abs() / w.std()
    torch.testing.assert_close(initial_m(size * w, "magnitude", scale), expected, rtol=1e-4, atol=0)


@given(seeds, scales)
def test_a_constant_m_equals_the_scale(seed, scale):
    assert (initial_m(make_weights(seed, 3, 4), "constant", scale) == torch.tensor(scale)).all()


@pytest.mark.parametrize("w", [torch.ones(2, 3), torch.tensor([[-7.0]]), torch.tensor([1.0, 1.0 + 1e-7])])
def test_equal_weights_start_at_the_scale(w):
    torch.testing.assert_close(initial_m(w, "magnitude", 0.1), torch.full_like(w, 0.1))


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_m_has_at_least_single_precision(dtype, wide):
    assert initial_m(make_weights(0, 4).to(dtype), "magnitude", 0.1).dtype == wide


UNUSABLE = {
    "zeros": torch.zeros(2, 3),
    "never written": torch.full((2, 3), torch.nan),
    "one NaN": torch.tensor([[1.0, torch.nan, 2.0]]),
    "infinite": torch.tensor([[1.0, -torch.inf]]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_weights_without_a_usable_magnitude_can_start_with_a_constant_only(name):
    assert not can_start(initial_m(UNUSABLE[name], "magnitude", 0.1))
    assert can_start(initial_m(UNUSABLE[name], "constant", 0.1))


def test_a_layer_with_one_weight_above_0_can_start():
    assert can_start(initial_m(torch.tensor([0.0, 0.0, 1.0]), "magnitude", 0.1))


def test_layers_that_start_at_a_constant_are_named_in_one_warning(recwarn):
    warn_of_constant([])
    assert not recwarn
    warn_of_constant(["a", "b"])
    assert "The weights of 'a', 'b' are all 0, or some are not finite" in str(recwarn.pop(UserWarning).message)
