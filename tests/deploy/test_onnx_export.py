from __future__ import annotations

import logging
import sys

import onnxruntime
import pytest
import torch
from architectures import EXACT, prune
from torch import nn

from lightning_autoprune import AutoPruneError, export_onnx


@pytest.mark.parametrize("name", ["lenet5", "resnet", "encoder"])
def test_the_file_gives_the_outputs_of_the_masked_model_for_any_number_of_rows(name, tmp_path):
    make, shape = EXACT[name]
    network = prune(make(), 0.05)
    path = tmp_path / "pruned.onnx"
    export_onnx(network, path, torch.zeros(1, *shape))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [entry] = session.get_inputs()
    for rows in (1, 7):
        inputs = torch.randn(rows, *shape)
        with torch.no_grad():
            aim = network.eval()(inputs)
        [found] = session.run(None, {entry.name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), aim, rtol=1e-4, atol=1e-5 * float(aim.abs().max()))


def test_the_file_is_smaller_for_what_is_dead(tmp_path):
    make, shape = EXACT["lenet5"]
    network = prune(make(), 0.01)
    export_onnx(network, tmp_path / "small.onnx", torch.zeros(1, *shape))
    export_onnx(network, tmp_path / "whole.onnx", torch.zeros(1, *shape), shrunk=False)
    small, whole = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("small", "whole"))
    assert whole > 4 * 431_080
    assert small < 0.3 * whole


def test_the_model_and_the_loggers_are_left_as_they_were(tmp_path):
    network = prune(EXACT["lenet5"][0](), 0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    level = logging.getLogger("torch.onnx").level
    export_onnx(network, tmp_path / "a.onnx", torch.zeros(2, 1, 28, 28), shrunk=False)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert logging.getLogger("torch.onnx").level == level


def test_keyword_arguments_and_several_inputs_can_be_given(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x, scale):
            return self.b(torch.relu(self.a(x))) * scale

    export_onnx(Two(), tmp_path / "a.onnx", {"x": torch.randn(4, 3), "scale": torch.rand(4, 1)})
    export_onnx(Two(), tmp_path / "b.onnx", (torch.randn(4, 3), torch.rand(4, 1)))


def test_what_can_not_be_exported_says_so(tmp_path):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            y = self.a(x)
            return y if float(y.sum()) > 0 else 2 * y

    with pytest.raises(AutoPruneError, match="Loop can't be exported to ONNX"):
        export_onnx(Loop(), tmp_path / "a.onnx", torch.randn(4, 3))


def test_other_outputs_in_onnxruntime_are_refused_and_an_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *args: [out + 1 for out in run(*args)])
    with pytest.raises(AutoPruneError, match="Sequential gives other outputs in onnxruntime: an output changes by 1"):
        export_onnx(network, path, torch.randn(4, 3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_bytes() == b"old"


def test_what_onnxruntime_can_not_run_says_so(tmp_path):
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).bfloat16()
    with pytest.raises(AutoPruneError, match="Sequential can't be run in onnxruntime: "):
        export_onnx(network, tmp_path / "a.onnx", torch.randn(4, 3).bfloat16())


def test_without_onnxruntime_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(AutoPruneError, match="Export to ONNX needs onnxruntime: pip install 'lightning-autoprune"):
        export_onnx(nn.Linear(2, 2), tmp_path / "a.onnx", torch.zeros(1, 2))
