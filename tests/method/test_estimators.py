"""The derivative h'(m) of each straight-through estimator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.estimators import ESTIMATORS, straight_through

M = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])


def test_linear_needs_no_factor():
    assert straight_through("linear", M) is None


def test_hard_sigmoid_is_one_half_between_minus_one_and_one():
    assert straight_through("hard_sigmoid", M).tolist() == [0, 0, 0.5, 0.5, 0.5, 0, 0]


def test_leaky_relu_is_its_slope_for_pruned_weights():
    expected = torch.tensor([0.2, 0.2, 0.2, 0.2, 1, 1, 1])
    assert torch.equal(straight_through("leaky_relu", M, leaky_slope=0.2), expected)


def test_softplus_is_the_derivative_of_softplus():
    m = M.double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.softplus(m).sum(), m)
    torch.testing.assert_close(straight_through("softplus", m.detach()), expected)


@given(st.sampled_from(list(ESTIMATORS)), st.floats(-50, 50))
def test_every_estimator_is_between_zero_and_one(name, m):
    value = straight_through(name, torch.tensor([m]))
    assert value is None or 0 <= value.item() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(ESTIMATORS)[1:])
def test_the_dtype_is_preserved(name, dtype):
    assert straight_through(name, M.to(dtype)).dtype == dtype


def test_an_unknown_estimator_raises_an_error_that_lists_the_known_ones():
    message = (
        "`estimator` is 'relu'; allowed are 'linear', 'hard_sigmoid', 'leaky_relu', 'softplus', or a function of M."
    )
    with pytest.raises(AutoPruneError, match=message):
        straight_through("relu", M)
