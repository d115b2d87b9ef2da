"""Both exports work for any batch size, and refuse models with a fixed one."""

from __future__ import annotations

import pytest
import torch
from architectures import DividedByBatchSize, LoopOverSamples, Masked
from torch import nn

from lightning_autoprune import AutoPruneError, export_onnx, export_program

EXPORTS = pytest.mark.parametrize("export", [export_onnx, export_program])


class ReturnsBatchSize(nn.Module):
    """Returns the batch size of the example as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 2)

    def forward(self, x):
        return self.first(x), torch.zeros(x.shape[0], dtype=torch.long) + int(x.shape[0])


@EXPORTS
@pytest.mark.parametrize("network", [LoopOverSamples(), DividedByBatchSize(), ReturnsBatchSize()])
def test_a_fixed_batch_size_is_refused(network, export, tmp_path):
    with pytest.raises(AutoPruneError, match=f"{type(network).__name__} "):
        export(network, tmp_path / "a", torch.randn(4, 4))
    assert list(tmp_path.iterdir()) == []


@EXPORTS
def test_a_tensor_without_a_dimension_of_samples_is_passed_unchanged(export, tmp_path):
    export(Masked(), tmp_path / "a", (torch.randn(4, 4), torch.rand(1, 6)))
    export(Masked(), tmp_path / "b", (torch.randn(1, 4), torch.rand(6)))
