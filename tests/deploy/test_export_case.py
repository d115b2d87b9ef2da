"""What both exports refuse, and what they take for rows."""

from __future__ import annotations

import pytest
import torch
from architectures import Loop, Masked, Mean
from torch import nn

from lightning_autoprune import AutoPruneError, export_onnx, export_program

EXPORTS = pytest.mark.parametrize("export", [export_onnx, export_program])


class Numbered(nn.Module):
    """The number of rows is an output of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 2)

    def forward(self, x):
        return self.first(x), torch.zeros(x.shape[0], dtype=torch.long) + int(x.shape[0])


@EXPORTS
@pytest.mark.parametrize("network", [Loop(), Mean(), Numbered()])
def test_a_number_of_rows_in_the_code_is_refused(network, export, tmp_path):
    with pytest.raises(AutoPruneError, match=f"{type(network).__name__} "):
        export(network, tmp_path / "a", torch.randn(4, 4))
    assert list(tmp_path.iterdir()) == []


@EXPORTS
def test_a_tensor_that_has_no_rows_is_given_as_it_is(export, tmp_path):
    export(Masked(), tmp_path / "a", (torch.randn(4, 4), torch.rand(1, 6)))
    export(Masked(), tmp_path / "b", (torch.randn(1, 4), torch.rand(6)))
