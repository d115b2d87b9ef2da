"""Outputs are compared with the expected ones, up to rounding."""

from __future__ import annotations

import torch

from lightning_autoprune.model.same_outputs import describe_mismatch, measure_spread


def test_outputs_whose_shape_depends_on_the_batch_size_are_compared():
    spread = measure_spread([[torch.ones(n, n)] for n in (2, 3)])
    assert not describe_mismatch([torch.ones(3, 3)], [torch.ones(3, 3)], spread, 1e-4)
    assert describe_mismatch([torch.ones(3, 3) + 0.1], [torch.ones(3, 3)], spread, 1e-4)
