from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.deploy.gap_coding import decode_mask, encode_mask


@given(st.integers(0, 2000), st.floats(0, 1), st.integers(0, 2**16))
def test_every_mask_is_decoded_to_its_positions(n, density, seed):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density
    b, code = encode_mask(mask)
    assert torch.equal(decode_mask(code, n, int(mask.sum()), b), mask.nonzero().flatten())


@pytest.mark.parametrize("one_in", [2, 7, 30, 310, 5000])
def test_the_code_is_within_6_percent_of_the_entropy(one_in):
    n = 1_000_000
    mask = torch.rand(n, generator=torch.Generator().manual_seed(0)) < 1 / one_in
    p = int(mask.sum()) / n
    entropy = -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    assert entropy <= len(encode_mask(mask)[1]) < 1.06 * entropy


def test_a_dense_mask_is_coded_as_its_bitmask():
    mask = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.6
    b, code = encode_mask(mask)
    assert b == 0
    assert [byte >> i & 1 for byte in code.tolist() for i in range(8)][: len(mask)] == mask.int().tolist()


def test_a_code_that_does_not_fit_the_counts_is_refused():
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.02
    kept, (b, code) = int(mask.sum()), encode_mask(mask)
    assert _decodes(code, 1000, kept, b)
    for other in (kept - 1, kept + 1):
        assert not _decodes(code, 1000, other, b)
    assert not _decodes(code[:-1], 1000, kept, b)
    assert not _decodes(torch.cat([code, code[:1] * 0]), 1000, kept, b)
    assert not _decodes(code, 500, kept, b)
    assert not _decodes(code, 1000, kept, 40)


def test_random_bytes_decode_to_ascending_positions_or_raise_an_error():
    generator = random.Random(0)
    decoded = 0
    for _ in range(5000):
        code = torch.tensor([generator.randrange(256) for _ in range(generator.randrange(12))], dtype=torch.uint8)
        n, k, b = generator.randrange(2 ** generator.randrange(1, 48)), generator.randrange(20), generator.randrange(50)
        try:
            kept = decode_mask(code, n, k, b)
        except ValueError:
            continue
        decoded += 1
        assert len(kept) == k
        assert k == 0 or ((kept.diff() > 0).all() and kept[0] >= 0 and kept[-1] < n)
    assert decoded > 20


def _decodes(code, n, k, b):
    try:
        decode_mask(code, n, k, b)
    except ValueError:
        return False
    return True
