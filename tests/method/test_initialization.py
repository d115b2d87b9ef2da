"""The initial M: the magnitude of each weight relative to its layer, or a constant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune import AutoPruneError
from lightning_autoprune.method.initialization import check_weights, initial_m

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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    with pytest.raises(AutoPruneError, match="Layer 'a' has weights that are not finite: the training has diverged"):
        check_weights("a", torch.tensor([1.0, value]), "constant")


def test_a_layer_of_zeros_is_refused_unless_m_is_constant():
    with pytest.raises(AutoPruneError, match=r"All weights of layer 'a' are 0.*or use `initial_m=\"constant\"`"):
        check_weights("a", torch.zeros(3), "magnitude")
    check_weights("a", torch.zeros(3), "constant")
