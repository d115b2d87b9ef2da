"""The benchmarks' harness counts and writes correctly, and a stopped benchmark continues where it was."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tuning
from deploy import as_csr
from harness.data import make_seeded_loader
from harness.latency import relative_latencies
from harness.methods import LABELS, METHODS
from harness.methods.settings import TRIALS, best_settings
from harness.report import compression_table, no_target_table
from harness.results import Run, append_outcome, append_row, group_means, missing_runs, read_rows
from harness.tasks import DEFAULT_TASKS, TASKS
from harness.training import Method, evaluate, train_and_test
from paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
TABULAR = TASKS["tabular"]


@pytest.fixture(scope="module")
def outcome():
    return train_and_test(TABULAR, METHODS["autoprune"](10, 0), seed=0, directory=Path(), epochs=12)


def test_compression_is_met_and_counted_over_prunable_weights_and_over_all_parameters(outcome):
    total, kept, rest = 20480, 2048, 128 + 128 + 2
    assert outcome.compression == 10.0
    assert outcome.sparsity == pytest.approx(1 - kept / total, abs=1e-6)
    assert outcome.compression_all == round((total + rest) / (kept + rest), 1)


@pytest.mark.parametrize(("method", "passes"), [("dense", 1.0), ("autoprune", 1.0), ("autoprune-train", 1.0)])
def test_samples_passed_are_counted(method, passes):
    assert train_and_test(TABULAR, METHODS[method](10, 0), 0, Path(), epochs=3).passes == passes


def test_a_second_pass_over_the_samples_is_counted():
    samples = TABULAR.data(Path()).train
    method = METHODS["autoprune"](10, 0, held_out=make_seeded_loader(samples, 32, 0), warmup=0.0, finetune=0.0)
    assert train_and_test(TABULAR, method, 0, Path(), epochs=3).passes == pytest.approx(2.0, abs=0.05)


def test_equal_seeds_give_equal_outcomes_and_different_seeds_do_not():
    def run(seed: int) -> tuple[float, float]:
        outcome = train_and_test(TABULAR, Method(), seed, Path(), epochs=2)
        return outcome.error, outcome.loss

    assert run(3) == run(3) != run(4)


def test_a_row_with_other_columns_is_refused_and_an_empty_figure_is_left_out_of_the_mean(tmp_path):
    path, run = tmp_path / "a.csv", Run("tabular", "gmp", 10.0, 1, 0)
    for error in (1.0, "", 2.0):
        append_row(path, {**run.cells(), "error": error})
    with pytest.raises(ValueError, match=r"has the columns \['task', .*: move the file elsewhere"):
        append_row(path, {**run.cells(), "error": 1.0, "loss": 1.0})
    assert [mean.values for mean in group_means(read_rows(path), "error", ("task",)).values()] == [(1.0, 2.0)]


def test_choosing_settings_does_not_see_the_test_samples():
    data = TABULAR.data(Path())
    tuning_data = data.without_test_set()
    assert len(tuning_data.train[0]) + len(tuning_data.test[0]) == len(data.train[0])
    assert torch.equal(torch.cat([tuning_data.train[0], tuning_data.test[0]]), data.train[0])


def test_settings_are_the_best_of_the_trials_at_the_nearest_compression(tmp_path, monkeypatch):
    path, losses = tmp_path / "tuning.csv", {30: {0.1: (3.0, 2.0), 0.2: (1.0, 2.0)}, 100: {0.1: (1.0,), 0.2: (9.0,)}}
    for target, by_strength in losses.items():
        for strength, values in by_strength.items():
            for seed, loss in enumerate(values):
                run = Run("tabular", "spred", target, 60, seed, json.dumps({"strength": strength}))
                append_row(path, {**run.cells(), "loss": loss})
    too_short = Run("tabular", "spred", 30, 9, 0, json.dumps({"strength": 0.3}))
    append_row(path, {**too_short.cells(), "loss": 0.0})
    monkeypatch.setattr("harness.methods.settings._trials", lambda: read_rows(path))
    strengths = [best_settings("tabular", "spred", compression)["strength"] for compression in (10, 30, 50, 60, 200)]
    assert strengths == [0.2, 0.2, 0.2, 0.1, 0.1]


def test_longer_trials_use_the_best_settings_of_the_shorter_ones(tmp_path):
    path = tmp_path / "tuning.csv"
    for epochs, strength, error in ((12, 1e-5, 3.0), (12, 1e-4, 1.0), (12, 1e-3, 2.0), (38, 3e-5, 0.0)):
        run = Run("lenet-300-100", "spred", 80.0, epochs, 10, json.dumps({"end": 0.55, "strength": strength}))
        append_row(path, {**run.cells(), "error": error})
    arguments = {"results": path, "target": 80.0, "epochs": 38}
    best = tuning.select_trials("lenet-300-100", "spred", argparse.Namespace(**arguments, best=2))
    assert best == [{"end": 0.55, "strength": 1e-4}, {"end": 0.55, "strength": 1e-3}]
    everything = tuning.select_trials("lenet-300-100", "spred", argparse.Namespace(**arguments, best=None))
    assert everything == tuning.TRIALS["spred"]


def test_each_other_method_has_at_least_six_trials_and_autoprune_has_its_defaults():
    peers, trials = LABELS.keys() - {"autoprune", "autoprune-train"}, read_rows(TRIALS)
    for task in set(DEFAULT_TASKS) - {"lenet-5"}:
        for method in peers:
            tried = {row["options"] for row in trials if (row["task"], row["method"]) == (task, method)}
            assert len(tried) >= 6
            assert json.dumps(best_settings(task, method, 30.0)) in tried
        assert best_settings(task, "autoprune", 30.0) == best_settings(task, "autoprune-train", 30.0) == {}
    for method in peers:
        key = "lenet-300-100", method, "80", "12"
        shared = [row for row in trials if (row["task"], row["method"], row["target"], row["epochs"]) == key]
        errors = {options: mean.mean for (options,), mean in group_means(shared, "error", ("options",)).items()}
        assert errors[json.dumps(best_settings("lenet-5", method, 310.0))] == min(errors.values())


def test_error_and_loss_are_means_over_all_labels():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, 0.0]]])
    error, loss = evaluate(torch.nn.Identity(), [(logits, torch.tensor([[0, 1], [0, 1]]))])
    assert error == 25
    right = torch.log1p(torch.exp(torch.tensor(-2.0))).item()
    assert loss == pytest.approx(right + 0.5)


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_networks_fit_the_data_of_their_tasks(name, monkeypatch):
    task = TASKS[name]
    if name == "resnet":
        inputs, labels = torch.randn(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64)
    else:
        inputs, labels = (part[:4] for part in task.data(Path()).train)
        assert torch.equal(inputs[0, 1:], labels[0, :-1])  # labels are the next characters
        assert int(inputs.max()) < 96
    logits = task.network()(inputs)
    assert logits.flatten(0, -2).shape[0] == labels.numel()


def test_the_transformer_does_not_see_later_characters():
    network = TASKS["transformer"].network()
    codes = torch.randint(96, (1, 64))
    other = codes.clone()
    other[0, 40:] = (other[0, 40:] + 1) % 96
    torch.testing.assert_close(network(codes)[0, :40], network(other)[0, :40])
    assert not torch.allclose(network(codes)[0, 41:], network(other)[0, 41:])


def test_rows_are_appended_and_their_runs_are_no_longer_missing(outcome, tmp_path):
    path = tmp_path / "results" / "a.csv"
    runs = [Run("tabular", "autoprune", target, 12, 0) for target in (10.0, 30.0, None)]
    assert missing_runs(path, runs) == runs
    append_outcome(path, runs[0], outcome)
    append_outcome(path, runs[2], outcome)
    assert missing_runs(path, runs) == runs[1:2]
    first, last = read_rows(path)
    assert (first["target"], last["target"]) == ("10", "")
    assert float(first["loss"]) == outcome.loss
    assert "torch" in first["versions"]


def test_mean_and_spread_are_over_the_seeds():
    rows = [{"m": m, "error": e} for m, e in (("a", "1"), ("a", "3"), ("b", "5"))]
    found = group_means(rows, "error", ("m",))
    assert (found["a",].mean, found["a",].spread, found["a",].values) == (2, pytest.approx(2**0.5), (1, 3))
    assert found["b",].spread == 0


def test_the_best_cell_with_the_most_seeds_is_bold_and_cells_with_fewer_seeds_say_so():
    def row(method: str, target: str, loss: str) -> dict[str, str]:
        return {"task": "tabular", "epochs": "60", "method": method, "target": target, "loss": loss}

    rows = [
        row("dense", "", "0.3"),
        row("a", "10", "0.2"),
        row("b", "10", "0.1"),
        row("b", "10", "0.1"),
        row("a", "30", "0.4"),
        row("c", "10", "0.05"),
    ]
    table = compression_table(rows, "tabular", {"a": "A", "b": "B", "c": "C"})
    assert table.splitlines()[0] == "| tabular: loss, nats (dense 0.300) | 10× | 30× |"
    assert table.splitlines()[2:] == [
        "| A | 0.200 (1) | 0.400 (1) |",
        "| B | **0.100 ± 0.000** | – |",
        "| C | 0.050 (1) | – |",
    ]


def test_a_table_shows_the_compression_reached_without_a_target():
    def row(method: str, target: str, seed: str, loss: str, compression: str, epochs: str = "60") -> dict[str, str]:
        figures = {"seed": seed, "loss": loss, "compression": compression}
        return {"task": "tabular", "epochs": epochs, "method": method, "target": target, **figures}

    rows = [
        row("dense", "", "0", "0.3", "1"),
        row("dense", "", "1", "0.3", "1"),
        row("dense", "", "2", "0.9", "1"),  # no pruned run has this seed
        row("autoprune", "", "0", "0.2", "8"),
        row("autoprune", "", "1", "0.4", "10"),
        row("autoprune", "", "2", "0.9", "99", epochs="20"),
        row("autoprune", "30", "2", "0.9", "30"),
    ]
    assert no_target_table(rows).splitlines()[2:] == [
        "| tabular: loss, nats | 0.300 ± 0.000 | 0.300 ± 0.141 | 9.0× | 2 |"
    ]


def test_the_benchmark_continues_where_it_was_stopped(tmp_path):
    def run(*seeds: str) -> str:
        command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--tasks", "tabular", "--methods", "dense", "gmp"]
        command += ["--compressions", "10", "--epochs", "2", "--results", "a.csv", "--seeds", *seeds]
        command += ["--picture", "a.png", "--readme-picture", "readme.png"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert run("0").count("→") == 2
    assert run("0", "1").count("→") == 2
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("dense", "0"),
        ("gmp", "0"),
        ("dense", "1"),
        ("gmp", "1"),
    ]
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "readme.png").exists()


@pytest.mark.parametrize("script", ["ablations", "robustness", "tuning"])
def test_the_other_benchmarks_execute_every_run(script, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--tasks", "tabular", "--seeds", "0", "--epochs", "1"]
    command += ["--results", "a.csv"]
    if script != "tuning":
        command += ["--picture", "a.png"]
    else:
        command += ["--methods", "gmp", "spred"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 12
    assert len({(row["method"], row["options"]) for row in rows}) == len(rows)
    assert all(json.loads(row["options"]) is not None for row in rows)


def test_latencies_are_relative_to_the_first_model(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("harness.latency.time.perf_counter", lambda: clock[0])

    def model_that_takes(seconds: float):
        return lambda x: clock.__setitem__(0, clock[0] + seconds)

    models = {"one": model_that_takes(0.004), "half": model_that_takes(0.002), "ten": model_that_takes(0.04)}
    ratios = relative_latencies(models, None, rounds=5)
    assert ratios == pytest.approx({"one": 1, "half": 0.5, "ten": 10})


@pytest.mark.parametrize(("script", "options"), [("deploy", []), ("neurons", ["--flops", "0.5"])])
def test_a_pruned_network_is_measured_and_printed(script, options, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--tasks", "tabular", "--seeds", "0", "--epochs", "4"]
    command += ["--results", "a.csv", *options]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    row = read_rows(tmp_path / "a.csv")[-1]
    assert row["task"] == "tabular"
    if script == "deploy":
        assert float(row["bytes_sparse"]) < float(row["bytes_zstd_19"]) < float(row["bytes_dense"])
        assert float(row["flops"]) >= float(row["effective_flops"])
        assert "| tabular, 30× |" in process.stdout
    else:
        assert 0.4 < float(row["flops"]) <= 0.5
        assert "| 50% | 4 | 1 |" in process.stdout


def test_csr_layers_give_the_same_outputs():
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3, bias=False))
    network[0].weight.data[:, :4] = 0
    inputs = torch.randn(2, 7, 6)
    torch.testing.assert_close(as_csr(network)(inputs), network(inputs))


def test_the_cost_of_pruning_is_measured_against_dense_training(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "cost.py"), "--networks", "mlp-100k", "--rounds", "1", "--steps", "4"]
    process = subprocess.run(
        [*command, "--results", "a.csv"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    with (tmp_path / "a.csv").open() as file:
        [row] = csv.DictReader(file)
    assert int(row["weights"]) == 784 * 110 + 110 * 110 + 110 * 10
    assert all(float(row[f"{mode}_{figure}"]) > 0 for mode in ("frozen", "pruning") for figure in ("time", "memory"))
    assert f"| {float(row['step_ms']):.2f} ms | ×{float(row['frozen_time']):.2f} |" in process.stdout
