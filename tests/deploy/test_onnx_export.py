from __future__ import annotations

import logging
import sys

import onnxruntime
import pytest
import torch
from architectures import EXACT, prune_randomly
from torch import nn

from lightning_autoprune import AutoPruneError, export_onnx


@pytest.mark.parametrize("name", ["lenet5", "resnet", "encoder"])
def test_the_file_gives_the_outputs_of_the_masked_model_for_any_batch_size(name, tmp_path):
    make, shape = EXACT[name]
    network = prune_randomly(make(), 0.05)
    path = tmp_path / "pruned.onnx"
    export_onnx(network, path, torch.zeros(1, *shape))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [entry] = session.get_inputs()
    for batch_size in (1, 7):
        inputs = torch.randn(batch_size, *shape)
        with torch.no_grad():
            expected = network.eval()(inputs)
        [output] = session.run(None, {entry.name: inputs.numpy()})
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=atol)


def test_the_file_is_smaller_without_dead_channels(tmp_path):
    make, shape = EXACT["lenet5"]
    network = prune_randomly(make(), 0.01)
    export_onnx(network, tmp_path / "small.onnx", torch.zeros(1, *shape))
    export_onnx(network, tmp_path / "whole.onnx", torch.zeros(1, *shape), shrunk=False)
    small, whole = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("small", "whole"))
    assert whole > 4 * 431_080
    assert small < 0.3 * whole


def test_exporting_leaves_the_model_and_the_logger_as_they_were(tmp_path):
    network = prune_randomly(EXACT["lenet5"][0](), 0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    level = logging.getLogger("torch.onnx").level
    export_onnx(network, tmp_path / "a.onnx", torch.zeros(2, 1, 28, 28), shrunk=False)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert logging.getLogger("torch.onnx").level == level


def test_the_example_may_have_keyword_arguments_or_several_inputs(tmp_path):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x, scale):
            return self.b(torch.relu(self.a(x))) * scale

    export_onnx(TwoInputs(), tmp_path / "a.onnx", {"x": torch.randn(4, 3), "scale": torch.rand(4, 1)})
    export_onnx(TwoInputs(), tmp_path / "b.onnx", (torch.randn(4, 3), torch.rand(4, 1)))


def test_a_model_that_can_not_be_exported_is_refused(tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            y = self.a(x)
            return y if float(y.sum()) > 0 else 2 * y

    with pytest.raises(AutoPruneError, match="Branches can't be exported to ONNX"):
        export_onnx(Branches(), tmp_path / "a.onnx", torch.randn(4, 3))


def test_other_outputs_in_onnxruntime_are_refused_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *args: [out + 1 for out in run(*args)])
    with pytest.raises(AutoPruneError, match="Sequential gives other outputs in onnxruntime: an output changes by 1"):
        export_onnx(network, path, torch.randn(4, 3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_bytes() == b"old"


def test_a_model_that_onnxruntime_can_not_run_is_refused(tmp_path):
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).bfloat16()
    with pytest.raises(AutoPruneError, match="Sequential can't be run in onnxruntime: "):
        export_onnx(network, tmp_path / "a.onnx", torch.randn(4, 3).bfloat16())


def test_a_missing_onnxruntime_is_named_with_the_command_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(AutoPruneError, match="Export to ONNX needs onnxruntime: pip install 'lightning-autoprune"):
        export_onnx(nn.Linear(2, 2), tmp_path / "a.onnx", torch.zeros(1, 2))
