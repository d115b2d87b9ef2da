"""The exported program gives the model's outputs for any batch size, without the model's code."""

from __future__ import annotations

import subprocess
import sys
from collections import UserDict

import pytest
import torch
from architectures import EXACT, Masked, prune_randomly
from torch import nn

from lightning_autoprune import AutoPruneError, export_program


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    model[0].weight.data[8:] = 0
    return model


def test_a_program_is_shrunk_and_runs_without_the_package(tmp_path):
    model, path = pruned(), tmp_path / "net.pt2"
    export_program(model, path, torch.zeros(1, 6))
    x = torch.randn(7, 6)
    torch.save((x, model(x)), tmp_path / "run.pt")
    code = f"""
import sys, torch
sys.modules["lightning_autoprune"] = None
x, expected = torch.load({str(tmp_path / "run.pt")!r})
program = torch.export.load({str(path)!r}).module()
assert torch.allclose(program(x), expected, atol=1e-5)
print(sum(p.numel() for p in program.parameters()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == (6 * 8 + 8) + (8 * 3 + 3)


@pytest.mark.parametrize("name", ["resnet", "encoder"])
def test_the_program_gives_the_outputs_of_the_masked_model_for_any_batch_size(name, tmp_path):
    make, shape = EXACT[name]
    network = prune_randomly(make(), 0.05).eval()
    export_program(network, tmp_path / "net.pt2", torch.zeros(1, *shape))
    program = torch.export.load(tmp_path / "net.pt2").module()
    for batch_size in (1, 7):
        x = torch.randn(batch_size, *shape)
        with torch.no_grad():
            expected = network(x)
            torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_without_shrinking_all_channels_stay_and_the_model_is_left_as_it_was(tmp_path):
    model = pruned().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_program(model, tmp_path / "net.pt2", torch.zeros(2, 6), shrunk=False)
    assert sum(p.numel() for p in torch.export.load(tmp_path / "net.pt2").module().parameters()) == 20 * 7 + 3 * 21
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_can_not_be_exported_is_refused_and_no_file_is_left(tmp_path):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else self.layer(-x)

    with pytest.raises(AutoPruneError, match=r"Branches can't be exported by torch.export: "):
        export_program(Branches(), tmp_path / "net.pt2", torch.ones(2, 6), shrunk=False)
    assert list(tmp_path.iterdir()) == []


def test_keyword_arguments_may_be_in_any_mapping(tmp_path):
    network = Masked()
    export_program(network, tmp_path / "a.pt2", UserDict(x=torch.randn(1, 4), mask=torch.rand(1, 6)))
    x, mask = torch.randn(5, 4), torch.rand(5, 6)
    program = torch.export.load(tmp_path / "a.pt2").module()
    torch.testing.assert_close(program(x=x, mask=mask), network(x, mask))
