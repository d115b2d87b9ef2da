"""The code in the README runs unchanged, its commands and files exist, and its figures are those of the benchmarks."""

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


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_quickstart_runs_unchanged():
    import wandb

    code, *_ = CODE
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    names = {"model": Net(), "train_loader": loader()}
    exec(code, names)
    wandb.finish()
    plain = Net()
    plain.load_state_dict(torch.load("pruned.ckpt", weights_only=True)["state_dict"])
    assert sparsity(plain) == pytest.approx(0.95, abs=0.01)


def test_the_code_for_smaller_models_runs_unchanged(capsys):
    _, smaller, neurons = CODE
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 2))
    model[0].weight.data[10:] = 0
    names = {"model": model, "example_input": torch.zeros(1, 4)}
    exec(smaller, names)
    assert names["small"][0].out_features == 10
    assert capsys.readouterr().out == "200 120\n"
    exec(neurons, {"AutoPruneCallback": AutoPruneCallback})


def test_files_and_commands_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for command in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), command
    for script in re.findall(r"python (benchmarks/\w+\.py)", README):
        assert (ROOT / script).exists(), script


def test_the_figures_in_the_readme_are_those_of_the_benchmarks_page():
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if "×: " in line]
    assert len(table) == 5
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    tasks = {"LeNet-300-100": "lenet-300-100", "LeNet-5": "lenet-5", "small ResNet": "resnet"}
    tasks |= {"character transformer": "transformer", "tabular": "tabular"}
    for case, dense, ours, magnitude, modelpruning, best in table:
        network, compression = case.split(":")[0].split(", ")
        [lines] = re.findall(rf"^\| {tasks[network]}: \w+, \S+ \(dense .*?\n\n", page, flags=re.MULTILINE | re.DOTALL)
        head, _, *rows = [
            [cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines.splitlines() if line
        ]
        assert f"(dense {dense})" in head[0]
        column = {row[0]: row[head.index(compression)] for row in rows}
        others = {name: figure for name, figure in column.items() if not name.startswith("AutoPruneCallback")}
        assert len(others) == 9
        assert ours.strip("*") == column["AutoPruneCallback (default, held out)"]
        assert magnitude.strip("*") == column["gradual magnitude pruning (own)"]
        assert modelpruning == column["Lightning's ModelPruning"]
        figure, name = best.replace("*", "").split(", ")
        assert any(name in label and figure == value for label, value in others.items())
        assert float(figure.split()[0]) == min(float(value.split()[0]) for value in others.values())
