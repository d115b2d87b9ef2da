"""Detecting writes to tensors, by torch's version counter and by values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_autoprune.tensors.write_detector import WriteDetector


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool]
)
def test_a_write_through_data_is_found_by_its_values_and_remembered(dtype):
    x, y = torch.ones(3).to(dtype), torch.ones(3).to(dtype)
    detector = WriteDetector([x, y], check_values=True)
    assert detector.modified(check_values=True) == []
    x.data.zero_()
    assert detector.modified() == []
    (modified,) = detector.modified(check_values=True)
    assert modified is x
    x.data.fill_(1)
    (modified,) = detector.modified()
    assert modified is x


def test_a_parameter_with_a_new_data_tensor_is_found():
    weight = nn.Parameter(torch.ones(2, 2))
    detector = WriteDetector([weight], check_values=True)
    weight.data = torch.full((2, 2), 2.0)
    assert detector.modified(check_values=True) == [weight]


def test_tensors_whose_bits_can_not_be_read_are_watched_by_their_version_alone():
    sparse, wide = torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex128)
    with torch.inference_mode():
        inferred = torch.ones(3)
    detector = WriteDetector([sparse, wide, inferred], check_values=True)
    assert detector.modified(check_values=True) == []
    wide += 1
    (modified,) = detector.modified()
    assert modified is wide
