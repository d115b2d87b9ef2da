"""Tensors and buffers that a block may write to are restored after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_autoprune.tensors.preserve import preserve_buffers, preserve_values


def test_buffers_are_restored_after_an_error_as_the_same_tensors_with_the_same_values():
    module = nn.BatchNorm1d(2)
    mean = module.running_mean

    @preserve_buffers(module)
    def fail():
        module.running_mean = torch.ones(3)
        module.running_var.data.add_(5)
        mean.add_(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert module.running_mean is mean
    assert torch.equal(mean, torch.zeros(2))
    assert torch.equal(module.running_var, torch.ones(2))


def test_tensors_that_can_not_be_written_to_are_left_out():
    with torch.inference_mode():
        inferred = torch.ones(3)
    expanded = torch.ones(1).expand(4)
    with preserve_values([inferred, expanded, torch.ones(2).to_sparse()]):
        pass
    assert expanded.stride() == (0,)
