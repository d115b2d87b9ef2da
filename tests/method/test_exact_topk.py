"""The exact global top-k by bisection, compared with sorting."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.exact_topk import (
    check_count,
    keep_largest,
    lift_largest,
    minimum_counts,
    threshold_near,
)

# Few distinct values, so that ties are common, and values that comparisons are likely to get wrong.
values = st.sampled_from([-torch.inf, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-8, 0.5, 1.0, 3e38])


def keep_by_sorting(M: list[Tensor], floors: list[int], count: int) -> list[list[bool]]:
    """Return which entries sorting keeps: each layer's floor, then the largest of the rest; of equal ones the first."""
    entries = sorted((-value, i, j) for i, m in enumerate(M) for j, value in enumerate(m.flatten().tolist()))
    chosen = {entry for i, floor in enumerate(floors) for entry in [e for e in entries if e[1] == i][:floor]}
    chosen |= set([e for e in entries if e not in chosen][: count - len(chosen)])
    return [[(-value, i, j) in chosen for j, value in enumerate(m.flatten().tolist())] for i, m in enumerate(M)]


@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_kept_entries_are_those_that_sorting_gives(data, dtype):
    layers = data.draw(st.lists(st.lists(values, min_size=1, max_size=8), min_size=1, max_size=4))
    floors = [data.draw(st.integers(0, len(layer))) for layer in layers]
    count = data.draw(st.integers(sum(floors), sum(map(len, layers))))
    M = [torch.tensor(layer, dtype=dtype) for layer in layers]
    before = [m.clone() for m in M]
    keep_largest(M, floors, count)
    assert [(m > 0).tolist() for m in M] == keep_by_sorting(before, floors, count)
    for m, old in zip(M, before, strict=True):  # an entry whose sign was right must not move
        right = (m > 0) == (old > 0)
        assert torch.equal(m[right & (old > 1e-8)], old[right & (old > 1e-8)])
        assert torch.equal(m[right & (old <= 0)], old[right & (old <= 0)])


def test_lift_largest_raises_only_the_largest():
    m = torch.tensor([[-3.0, 2.0], [-1.0, -2.0]]).T
    lift_largest(m, 2)
    assert m.tolist() == [[-3.0, pytest.approx(1e-8)], [2.0, -2.0]]


def test_lift_largest_works_on_depthwise_filters_in_channels_last_memory():
    m = torch.empty_strided((3, 1, 2, 2), (4, 1, 2, 1)).fill_(-1.0)  # contiguous too, since the second size is 1
    m[2, 0, 1, 0] = -0.5
    lift_largest(m, 1)
    assert (m > 0).nonzero().tolist() == [[2, 0, 1, 0]]


def test_nan_is_the_last_to_be_kept():
    nan = torch.nan
    M = [torch.tensor([nan, nan, nan]), torch.tensor([nan, -2.0, torch.inf, -torch.inf])]
    keep_largest(M, [2, 0], 4)
    assert [(m > 0).tolist() for m in M] == [[True, True, False], [False, True, True, False]]
    m = torch.tensor([nan, -1.0, nan, torch.inf])
    lift_largest(m, 3)
    assert (m > 0).sum() == 3
    assert (m > 0)[[1, 3]].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_of_many_entries_are_kept(dtype):
    torch.manual_seed(0)
    M = [torch.randn(300, 100, dtype=dtype), torch.randn(40, 5, 3, dtype=dtype) - 3]
    expected = torch.cat([m.flatten() for m in M]).topk(5000).indices
    keep_largest(M, [0, 0], 5000)
    assert sorted(torch.cat([m.flatten() for m in M]).gt(0).nonzero().flatten().tolist()) == sorted(expected.tolist())


@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(1, 40))
def test_keep_largest_meets_the_exact_count_and_empties_no_tensor(seed, count, size):
    torch.manual_seed(seed)
    M = [torch.randn(size), torch.randn(4, 5) - 3]
    total = size + 20
    count = min(count, total)
    keep_largest(M, [1, 1], count)
    assert sum(int((m > 0).sum()) for m in M) == count
    assert all((m > 0).any() for m in M)


def test_keep_largest_leaves_entries_with_the_right_sign_unchanged():
    M = [torch.tensor([3.0, 2.0, -1.0, 1.0])]
    keep_largest(M, [1], 2)
    assert M[0].tolist() == [3.0, 2.0, -1.0, 0.0]


def test_keep_largest_breaks_ties_to_meet_the_exact_count():
    M = [torch.full((10,), 0.1)]
    keep_largest(M, [1], 4)
    assert int((M[0] > 0).sum()) == 4


def test_keep_largest_can_leave_all_other_entries_unchanged():
    M = [torch.tensor([-3.0, -2.0, -1.0])]
    keep_largest(M, [1], 1, prune=False)
    assert M[0][:2].tolist() == [-3.0, -2.0]
    assert M[0][2] > 0


def test_keep_largest_works_in_any_memory_format():
    M = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    expected = M[0].flatten().topk(5).indices
    keep_largest(M, [1], 5)
    assert set((M[0] > 0).flatten().nonzero().flatten().tolist()) == set(expected.tolist())


# Floors


def test_every_layer_keeps_at_least_one_weight():
    assert minimum_counts([10, 5000, 1001], 0.001) == [1, 5, 2]


def test_a_floor_is_exact_where_floating_point_rounds_the_product_up():
    assert 0.07 * 100 > 7
    assert minimum_counts([100, 101], 0.07) == [7, 8]


def test_the_error_for_a_count_below_the_floors_says_what_to_change():
    message = (
        r"Keeping 3 of 20000 weights is not possible: with `layer_floor=0.001` the 2 layers keep at least 20. Ask for a"
        r" `target_sparsity` of at most 0.999, or lower `layer_floor`."
    )
    with pytest.raises(AutoPruneError, match=message):
        check_count(3, [10000, 10000], 0.001)


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=50), st.sampled_from([0.0, 0.001, 0.03, 0.5]))
@example([2304 * 768, 768 * 768, 3072 * 768, 3072 * 768] * 12, 0.001)  # GPT-2 small
def test_the_sparsity_that_the_error_suggests_is_possible(totals, layer_floor):
    with pytest.raises(AutoPruneError) as error:
        check_count(0, totals, layer_floor)
    advised = float(re.search("at most (.*), or lower", str(error.value))[1])
    assert 1 - sum(minimum_counts(totals, layer_floor)) / sum(totals) - advised < 1.1e-6
    check_count(round((1 - advised) * sum(totals)), totals, layer_floor)


@given(st.integers(0, 99), st.floats(0.01, 1), st.sampled_from([0.0, 0.01]))
def test_a_threshold_near_a_count_has_about_as_many_entries_above_it(seed, fraction, tolerance):
    M = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    count = round(1000 * fraction)
    threshold = threshold_near([M[:300], M[300:]], count, tolerance)
    assert abs(int((threshold < M).sum()) - count) <= tolerance * count


@pytest.mark.parametrize(("count", "above"), [(90, 100), (40, 30), (5, 0), (50, 30), (0, 0), (100, 100)])
def test_equal_entries_are_all_above_the_threshold_or_none_is_whichever_is_nearer(count, above):
    M = [torch.cat([torch.full((30,), 2.0), torch.full((70,), 0.1)])]
    assert int((M[0] > threshold_near(M, count)).sum()) == above


def test_entries_that_are_not_finite_do_not_disturb_the_threshold():
    M = [torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 2.0, 3.0])]
    assert int((M[0] > threshold_near(M, 3)).sum()) == 3


def test_without_enough_finite_entries_the_threshold_is_0():
    assert threshold_near([torch.tensor([torch.nan, 0.1, 0.2, 0.3])], 4) == 0
