"""The positions of a mask's kept entries in nearly as few bits as they hold. Torch only.

A mask of n entries, k of them kept, is stored as the k gaps between kept entries (how many pruned ones lie before
each), by the code of Golomb and Rice: a gap's lowest b bits as they are, and the rest of it in unary, as so many zeros
and a one. With b = 0 that is the bitmask itself, so to choose the best b is to choose between bitmask and gaps too.

Source: Rice, Plaunt, "Adaptive variable-length coding for efficient compression of spacecraft television data", 1971.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_autoprune.tensors.bitmasks import pack, unpack

__all__ = ["decode_mask", "encode_mask"]


def encode_mask(mask: Tensor) -> tuple[int, Tensor]:
    """Codes the positions of a mask's kept entries.

    Args:
        mask: bool, any shape.

    Returns:
        The number b of bits of each gap that are stored as they are, and the code: bytes (uint8, one dimension, on the
        CPU), those bits first, then the unary parts.

    Example:
        >>> encode_mask(torch.tensor([False, True, False, False, True]))  # the bitmask, first entry in the lowest bit
        (0, tensor([18], dtype=torch.uint8))
    """
    kept = mask.flatten().nonzero().flatten().cpu()
    gaps = kept.diff(prepend=kept.new_tensor([-1])) - 1
    largest = int(gaps.max()) if len(gaps) else 0
    b = min(range(largest.bit_length() + 1), key=lambda b: len(gaps) * b + int((gaps >> b).sum()))
    ones = ((gaps >> b) + 1).cumsum(0) - 1
    unary = torch.zeros(int(ones[-1]) + 1 if len(ones) else 0, dtype=torch.bool)
    unary[ones] = True
    low = (gaps.unsqueeze(1) >> torch.arange(b)) & 1
    return b, torch.cat([pack(low), pack(unary)])


def decode_mask(code: Tensor, n: int, k: int, b: int) -> Tensor:
    """The positions that :func:`encode_mask` coded, as int64 in rising order.

    Args:
        code: bytes (uint8).
        n: number of entries of the mask.
        k: number of kept ones.
        b: number of bits of each gap that are stored as they are.

    Raises:
        ValueError: if the code is not one of k positions below n. Nothing larger than a few times the code is allocated
            before that is known.

    Example:
        >>> decode_mask(torch.tensor([18], dtype=torch.uint8), n=5, k=2, b=0)
        tensor([1, 4])
    """
    lowest = -(-k * b // 8)
    if not (0 <= k <= n and 0 <= b <= n.bit_length() and lowest <= len(code) and k <= 8 * len(code)):
        raise ValueError(f"{len(code)} bytes with {b} bits as they are can't be {k} positions of {n}")
    low, unary = code[:lowest], code[lowest:]
    ones = unpack(unary, (8 * len(unary),)).nonzero().flatten()
    if len(ones) != k or (k and int(ones[-1]) // 8 + 1 != len(unary)):
        raise ValueError(f"{len(ones)} positions are coded, not {k}")
    high = ones.diff(prepend=ones.new_tensor([-1])) - 1
    if k and n < int(high.max()) << b:
        raise ValueError(f"a position beyond {n}")
    gaps = (high << b) + (unpack(low, (k, b)).long() << torch.arange(b)).sum(1)
    kept = (gaps + 1).cumsum(0) - 1
    if k and not (int(kept.min()) >= 0 and int(kept[-1]) < n):
        raise ValueError(f"a position beyond {n}")
    return kept
