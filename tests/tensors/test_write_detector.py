"""Which tensors have been written to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_autoprune.tensors.write_detector import WriteDetector


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool]
)
def test_what_is_written_through_data_is_seen_where_values_are_looked_at_and_remembered(dtype):
    x, y = torch.ones(3).to(dtype), torch.ones(3).to(dtype)
    detector = WriteDetector([x, y], check_values=True)
    assert detector.modified(check_values=True) == []
    x.data.zero_()
    assert detector.modified() == []
    (found,) = detector.modified(check_values=True)
    assert found is x
    x.data.fill_(1)
    (found,) = detector.modified()
    assert found is x


def test_another_tensor_behind_a_parameter_is_seen():
    weight = nn.Parameter(torch.ones(2, 2))
    detector = WriteDetector([weight], check_values=True)
    weight.data = torch.full((2, 2), 2.0)
    assert detector.modified(check_values=True) == [weight]


def test_tensors_whose_bits_can_not_be_read_are_watched_by_the_count_alone():
    sparse, wide = torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex128)
    with torch.inference_mode():
        inferred = torch.ones(3)
    detector = WriteDetector([sparse, wide, inferred], check_values=True)
    assert detector.modified(check_values=True) == []
    wide += 1
    (found,) = detector.modified()
    assert found is wide
