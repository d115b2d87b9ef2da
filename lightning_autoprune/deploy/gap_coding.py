"""Codes the positions of a mask's kept entries in nearly as few bits as possible. Torch only.

A mask is stored as the gaps between its kept entries: the number of pruned entries before each. The gaps are coded
after Golomb and Rice: the lowest b bits of a gap are stored as they are, and the rest of it in unary, as that many
zeros and a one. With b = 0 the code is the bitmask itself, so the choice of the best b includes the bitmask.

Source: Rice, Plaunt, "Adaptive variable-length coding for efficient compression of spacecraft television data", 1971.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_autoprune.tensors.bitmasks import pack, unpack

__all__ = ["decode_mask", "encode_mask"]


def encode_mask(mask: Tensor) -> tuple[int, Tensor]:
    """Code the positions of a mask's kept entries.

    Args:
        mask: bool, any shape.

    Returns:
        The number b of low bits per gap, and the code. The code is bytes (uint8, one dimension, on the CPU): the low
        bits of all gaps, and then their unary parts.

    Example:
        >>> encode_mask(torch.tensor([False, True, False, False, True]))  # the bitmask, first entry in the lowest bit
        (0, tensor([18], dtype=torch.uint8))
    """
    positions = mask.flatten().nonzero().flatten().cpu()
    gaps = positions.diff(prepend=positions.new_tensor([-1])) - 1
    largest = int(gaps.max()) if len(gaps) else 0
    b = min(range(largest.bit_length() + 1), key=lambda b: len(gaps) * b + int((gaps >> b).sum()))
    ones = ((gaps >> b) + 1).cumsum(0) - 1
    unary = torch.zeros(int(ones[-1]) + 1 if len(ones) else 0, dtype=torch.bool)
    unary[ones] = True
    low_bits = (gaps.unsqueeze(1) >> torch.arange(b)) & 1
    return b, torch.cat([pack(low_bits), pack(unary)])


def decode_mask(code: Tensor, n: int, k: int, b: int) -> Tensor:
    """Return the positions that :func:`encode_mask` coded, as int64 in rising order.

    Args:
        code: bytes (uint8).
        n: number of entries of the mask.
        k: number of kept entries.
        b: number of low bits per gap.

    Raises:
        ValueError: if the code is not of k positions below n. Until that is known, at most a few times the size of the
            code is allocated.

    Example:
        >>> decode_mask(torch.tensor([18], dtype=torch.uint8), n=5, k=2, b=0)
        tensor([1, 4])
    """
    low_bytes = -(-k * b // 8)
    if not (0 <= k <= n and 0 <= b <= n.bit_length() and low_bytes <= len(code) and k <= 8 * len(code)):
        raise ValueError(f"{len(code)} bytes with {b} low bits per gap can't be {k} positions of {n}")
    low_bits, unary = code[:low_bytes], code[low_bytes:]
    ones = unpack(unary, (8 * len(unary),)).nonzero().flatten()
    if len(ones) != k or (k and int(ones[-1]) // 8 + 1 != len(unary)):
        raise ValueError(f"{len(ones)} positions are coded, not {k}")
    high = ones.diff(prepend=ones.new_tensor([-1])) - 1
    if k and n < int(high.max()) << b:
        raise ValueError(f"a position is beyond {n}")
    gaps = (high << b) + (unpack(low_bits, (k, b)).long() << torch.arange(b)).sum(1)
    positions = (gaps + 1).cumsum(0) - 1
    if k and not (int(positions.min()) >= 0 and int(positions[-1]) < n):
        raise ValueError(f"a position is beyond {n}")
    return positions
