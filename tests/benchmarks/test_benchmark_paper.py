"""The benchmark of the paper's setting: its rate is per auxiliary step, and its split is fixed and 1:1."""

from __future__ import annotations

import csv
import subprocess
import sys

import paper
import pytest
import torch
from harness.methods import METHODS
from harness.methods.paper import STATED
from lightning.pytorch import Callback
from paths import ROOT
from peers import STEPS, make_task, mlp, run_watched

from lightning_autoprune import UpdateRule


class UnitSteps(UpdateRule):
    """Moves every m by η in every step."""

    def sensitivity(self, dL_dT, W):
        return dL_dT

    def direction(self, g0, state, updates, decay):
        return torch.ones_like(g0)


class Watch(Callback):
    """Records the first m after each step while there is one, and the number of steps."""

    def __init__(self, method):
        self.method, self.values, self.steps = method, [], 0

    def on_train_batch_end(self, *_):
        self.steps += 1
        auxiliary = self.method.callback._run.pruner.auxiliary
        if auxiliary is not None and auxiliary.M:
            self.values.append(float(auxiliary.M[0].flatten()[0]))


def test_each_auxiliary_step_has_the_papers_rate_and_half_of_the_samples_train_the_weights():
    method = METHODS["paper"](None, update_rule=UnitSteps(), initial_scale=2.0)
    watch = Watch(method)
    run_watched(method, make_task(mlp, (12,)), watch)
    assert watch.steps == STEPS // 2
    assert watch.values == pytest.approx([2.0 - 1.5e-2 * k for k in range(1, len(watch.values) + 1)], abs=1e-5)
    assert len(watch.values) == STEPS // 2 - round(0.35 * STEPS // 2) - 1  # the last step also makes the masks final


@pytest.mark.parametrize("estimator", paper.ESTIMATORS)
def test_the_method_has_what_the_paper_states(estimator):
    settings = METHODS["paper"](None, estimator=estimator).callback.settings
    assert settings.estimator == estimator
    assert settings.target_sparsity is None
    assert {name: getattr(settings, name) for name in STATED} == {
        "update_rule": "autoprune",
        "pressure": 0.05,
        "held_out": 0.5,
        "redraw_held_out": False,
        "train_gradients": False,
    }


def test_the_benchmark_runs_each_setting_and_prints_the_rows_that_exist(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "paper.py"), "--tasks", "tabular", "--seeds", "0"]
    command += ["--epochs", "3", "--results", "a.csv"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["options"]) for row in rows] == list(paper.SETTINGS.values())
    table = paper.result_table(rows, "tabular")
    assert f"\n\n{table}\n" in process.stdout
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {name}" for name in paper.SETTINGS]
    assert len(paper.result_table(rows[:2], "tabular").splitlines()) == 4
    assert paper.result_table(rows, "lenet-5") == ""
