"""The README's quickstart runs as it stands, and its commands and files exist."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import Net, loader
from paths import ROOT
from torch import nn

from lightning_autoprune import AutoPruneCallback, sparsity

README = (ROOT / "README.md").read_text()


CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_quickstart_runs_as_it_stands():
    import wandb

    code, *_ = CODE
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    names = {"model": Net(), "train_loader": loader()}
    exec(code, names)
    wandb.finish()
    plain = Net()
    plain.load_state_dict(torch.load("pruned.ckpt", weights_only=True)["state_dict"])
    assert sparsity(plain) == pytest.approx(0.95, abs=0.01)


def test_what_makes_the_model_smaller_runs_as_it_stands(capsys):
    _, smaller, neurons = CODE
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 2))
    model[0].weight.data[10:] = 0
    names = {"model": model, "example_input": torch.zeros(1, 4)}
    exec(smaller, names)
    assert names["small"][0].out_features == 10
    assert capsys.readouterr().out == "200 120\n"
    exec(neurons, {"AutoPruneCallback": AutoPruneCallback})


def test_files_and_commands_that_it_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for command in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), command
    for script in re.findall(r"python (benchmarks/\w+\.py)", README):
        assert (ROOT / script).exists(), script
