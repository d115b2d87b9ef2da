"""Precision of tensors. Torch only."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_float32"]


def at_least_float32(x: Tensor) -> Tensor:
    """Return the tensor itself if it is float32 or float64, else a float32 copy."""
    return x if x.dtype == torch.float64 else x.float()
