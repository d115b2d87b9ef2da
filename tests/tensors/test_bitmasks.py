"""Masks as bits: clearing, packing and unpacking, and the least number of weights that a layer keeps."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.exact_topk import check_count, minimum_counts
from lightning_autoprune.tensors.bitmasks import PackedMask, as_bits, pack, pack_if_large, unpack, zero_pruned

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_and_with_a_mask_clears_nan_infinity_and_negative_zero_exactly(dtype):
    x = torch.tensor([1.5, -2.0, math.nan, math.inf, -0.0, -3.0], dtype=dtype)
    kept = torch.tensor([True, True, False, False, False, False])
    bits = as_bits(torch.zeros_like(x)).copy_(kept).neg_()
    as_bits(x).bitwise_and_(bits)
    assert x.tolist() == [1.5, -2.0, 0, 0, 0, 0]
    assert not torch.signbit(x[2:]).any()


@given(st.lists(st.booleans(), min_size=0, max_size=70))
def test_packing_takes_one_bit_per_entry_and_unpacking_restores_the_mask(values):
    mask = torch.tensor(values, dtype=torch.bool)
    packed = pack(mask)
    assert packed.numel() == math.ceil(len(values) / 8)
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_unpacking_restores_the_shape():
    mask = torch.rand(3, 5, 7) > 0.5
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


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


# Masks with one bit per entry


@given(
    st.integers(1, 50).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_packed_mask_clears_the_same_entries_as_an_unpacked_one(kept, dtype):
    x = torch.randn(len(kept)).to(dtype)
    x[::3], x[1::3] = float("nan"), -0.0
    bits = torch.tensor(kept).to(as_bits(x).dtype).neg_()
    packed, unpacked = x.clone(), x.clone()
    PackedMask(bits).zero_pruned_(packed)
    zero_pruned(unpacked, bits)
    assert torch.equal(as_bits(packed), as_bits(unpacked))
    assert PackedMask(bits).bool().tolist() == kept


@pytest.mark.parametrize("shape", [(1, 8 * 2**15), (3, 8 * 2**15 + 5), (700, 37, 3, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_mask_is_packed_and_clears_the_same_entries_in_any_memory_order(shape, transposed):
    x = torch.randn(shape)
    if transposed:
        x = x.transpose(0, 1)
    bits = (torch.rand(x.shape) > 0.7).int().neg_()
    mask = pack_if_large(bits)
    assert isinstance(mask, PackedMask)
    expected = x * bits.bool()
    zero_pruned(x, mask)
    assert torch.equal(x, expected)
    assert torch.equal(mask.bool(), bits.bool())
    assert mask.packed.numel() == -(-x.numel() // 8)


def test_a_small_mask_is_not_packed():
    bits = torch.full((100,), -1, dtype=torch.int32)
    assert pack_if_large(bits) is bits
