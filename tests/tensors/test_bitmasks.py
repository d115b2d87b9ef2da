"""Masks as bits: clearing, packing and unpacking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
