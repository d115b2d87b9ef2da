"""The benchmark of fine-tuning: its data and networks, the methods that only it has, its tables and its files."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import finetuning
import pytest
import torch
from harness.finetuning import (
    FINETUNING_METHODS,
    FinetuningRun,
    PathRecorder,
    best_settings,
    dense_path,
    finetune_and_test,
    load_or_train_dense,
)
from harness.finetuning_tasks import FINETUNING_TASKS, MASK, clutter, mask_characters
from harness.methods.lightning_pruning import LightningPruningInCuts
from harness.report import finetuning_picture, finetuning_table
from harness.results import read_rows
from harness.tasks import TASKS
from harness.training import UNLABELED, Learner, Method, evaluate, make_trainer
from paths import ROOT

from lightning_autoprune import AutoPruneCallback, prunable_weights

TABULAR = TASKS["tabular"]
TOTAL = 20480


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return TABULAR.network().state_dict()


def tune(dense, name, sparsity=0.9, steps=40, seed=0, **options):
    method = FINETUNING_METHODS[name](1 / (1 - sparsity), seed, steps, **options)
    return finetune_and_test(TABULAR, dense, method, steps, seed, TABULAR.data(Path()))


# Data and networks


def clutter_with(seed=0, samples=200, noise=0.5):
    images = torch.full((samples, 1, 28, 28), -1.0)
    images[:, :, 14, 14] = 5.0
    return clutter(images, torch.Generator().manual_seed(seed), noise=noise)


def test_cluttered_images_have_the_shape_of_images_and_depend_on_the_generator_alone():
    assert clutter_with().shape == (200, 1, 28, 28)
    assert torch.equal(clutter_with(), clutter_with())
    assert not torch.equal(clutter_with(), clutter_with(seed=1))


def test_an_image_moves_by_up_to_four_pixels_and_a_patch_covers_a_part_of_it():
    dots = (clutter_with(noise=0.0)[:, 0] == 5).nonzero()
    assert dots[:, 1:].amin(0).tolist() == [10, 10]
    assert dots[:, 1:].amax(0).tolist() == [18, 18]
    assert dots[:, 0].unique().numel() == len(dots)
    assert 0.85 < len(dots) / 200 < 1  # the patch covers 36 of the 784 pixels, most often none of the borders
    plain = clutter(torch.arange(784.0).view(1, 1, 28, 28), torch.Generator().manual_seed(0), shift=0, noise=0.0)
    assert int((plain != torch.arange(784.0).view(1, 1, 28, 28)).sum()) in (35, 36)  # one pixel is at the minimum


def test_the_noise_of_cluttered_images_has_its_standard_deviation():
    difference = clutter_with(noise=0.5) - clutter_with(noise=0.0)
    assert float(difference.std()) == pytest.approx(0.5, abs=0.01)


def test_only_masked_characters_have_labels():
    windows = torch.randint(96, (300, 64))
    inputs, labels = mask_characters(windows, torch.Generator().manual_seed(0))
    masked = inputs == MASK
    assert float(masked.float().mean()) == pytest.approx(0.15, abs=0.01)
    assert torch.equal(labels[masked], windows[masked])
    assert torch.equal(inputs[~masked], windows[~masked])
    assert bool((labels[~masked] == UNLABELED).all())


def test_places_without_a_label_are_not_counted():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]]])
    right = torch.log1p(torch.exp(torch.tensor(-2.0))).item()
    error, loss = evaluate(torch.nn.Identity(), [(logits, torch.tensor([[0, UNLABELED, 0]]))])
    assert error == 50
    assert loss == pytest.approx(right + 1)


def test_the_bert_has_logits_of_all_characters_and_sees_later_ones():
    pytest.importorskip("transformers")
    task = FINETUNING_TASKS["bert"]
    network = task.network().eval()
    assert sum(weight.numel() for weight in prunable_weights(network).values()) == 108608
    inputs, labels = (part[:2].clone() for part in task.data(Path()).train)
    logits = network(inputs)
    assert logits.flatten(0, -2).shape == (labels.numel(), 97)
    inputs[:, 40:] = 0
    assert not torch.allclose(network(inputs)[:, :40], logits[:, :40])


def test_a_missing_transformers_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        FINETUNING_TASKS["bert"].network()


# The dense networks


def test_a_dense_network_is_trained_once_and_then_read(tmp_path):
    first = load_or_train_dense(TABULAR, 3, Path(), tmp_path)
    [file] = tmp_path.iterdir()
    assert file == dense_path(TABULAR, 3, tmp_path)
    marked = {name: torch.full_like(value, 7.0) for name, value in first.items()}
    torch.save(marked, file)
    again = load_or_train_dense(TABULAR, 3, Path(), tmp_path)
    assert all(torch.equal(again[name], marked[name]) for name in first)


def test_a_dense_network_for_choosing_settings_has_a_file_of_its_own(tmp_path):
    paths = {dense_path(TABULAR, seed, tmp_path, validate) for seed in (0, 1) for validate in (False, True)}
    assert len(paths) == 4


def test_no_steps_test_the_dense_network_as_it_is(dense):
    network = TABULAR.network()
    network.load_state_dict(dense)
    error, loss = evaluate(network, TABULAR.data(Path()).test_batches())
    outcome = finetune_and_test(TABULAR, dense, Method(), 0, 0, TABULAR.data(Path()))
    assert (outcome.error, outcome.loss, outcome.sparsity) == (round(error, 3), round(loss, 5), 0)


# The methods


@pytest.mark.parametrize("name", sorted(FINETUNING_METHODS.keys() - {"dense"}))
@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_every_method_meets_the_target_and_leaves_the_dense_weights_alone(dense, name, sparsity):
    before = {key: value.clone() for key, value in dense.items()}
    outcome = tune(dense, name, sparsity)
    assert outcome.sparsity == pytest.approx(sparsity, abs=1 / TOTAL)
    assert all(torch.equal(dense[key], before[key]) for key in dense)


@pytest.mark.parametrize("steps", [5, 60])
def test_the_cuts_of_modelpruning_are_equal_and_at_equal_distances(dense, steps):
    kept = []

    class Recorded(LightningPruningInCuts):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            layers = [pl_module.network[i] for i in (0, 2, 4)]
            kept.append(sum(int(layer.weight.count_nonzero()) for layer in layers))

    outcome = finetune_and_test(TABULAR, dense, Recorded(5, 0.2, 0.6, 8), steps, 0, TABULAR.data(Path()))
    assert outcome.sparsity == pytest.approx(0.8)
    if steps == 60:
        changes = [i + 1 for i, (a, b) in enumerate(zip([TOTAL, *kept], kept, strict=False)) if a != b]
        assert changes == [15, 18, 21, 24, 27, 30, 33, 36]
        assert [TOTAL - kept[i - 1] for i in changes] == [TOTAL * i // 10 for i in range(1, 9)]


def test_one_shot_pruning_keeps_the_largest_dense_weights_throughout(dense):
    method, data = FINETUNING_METHODS["one-shot"](10, 0, 30), TABULAR.data(Path())
    network = TABULAR.network()
    network.load_state_dict(dense)
    values = torch.cat([weight.detach().abs().flatten() for weight in prunable_weights(network).values()])
    largest = values >= values.sort(descending=True).values[TOTAL // 10 - 1]
    learner = Learner(network, method, 1e-3)
    samples = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data.train), batch_size=32)
    make_trainer(None, method.callbacks(), steps=30).fit(learner, samples)
    after = torch.cat([weight.detach().flatten() for weight in prunable_weights(network).values()])
    assert torch.equal(after != 0, largest)
    assert not torch.equal(after[largest].abs(), values[largest])  # they were trained


def test_the_sparsity_is_compared_with_the_path_after_each_pruning_step(dense):
    callback = AutoPruneCallback(0.9, warmup=0.25, log_every_n_steps=1)
    recorder, data = PathRecorder(callback), TABULAR.data(Path())
    network = TABULAR.network()
    network.load_state_dict(dense)
    samples = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data.train), batch_size=32)
    make_trainer(None, [callback, recorder], steps=40).fit(Learner(network, Method(), 1e-3), samples)
    curve = dict(callback.curves["all"])
    reached = [sparsity for sparsity, _ in recorder.points]
    assert reached == pytest.approx([curve[step] for step in range(10, 25)])  # they count from 0
    wanted = [path for _, path in recorder.points]
    assert wanted == sorted(wanted)
    assert 0 < wanted[0] < 0.5
    assert wanted[-1] == pytest.approx(0.9)


def test_the_outcome_has_the_first_and_last_sparsity_and_the_largest_difference_from_the_path(dense, monkeypatch):
    points = [(0.3, 0.1), (0.2, 0.5), (0.6, 0.65)]
    monkeypatch.setattr(PathRecorder, "on_train_end", lambda self, *_: setattr(self, "points", points))
    outcome = tune(dense, "autoprune")
    assert (outcome.first_sparsity, outcome.last_sparsity, outcome.path_error) == (0.3, 0.6, -30.0)
    assert tune(dense, "gmp").path_error is None


def test_equal_seeds_give_equal_outcomes_and_different_seeds_do_not(dense):
    losses = [tune(dense, "autoprune", seed=seed).loss for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_settings_are_the_best_of_the_trials_at_the_nearest_number_of_steps(monkeypatch):
    rows = [
        {"method": "gmp", "steps": steps, "options": f'{{"end": {end}}}', "error": error}
        for steps, end, error in (("60", 0.4, "2"), ("60", 0.5, "1"), ("600", 0.4, "1"), ("600", 0.5, "2"))
    ]
    monkeypatch.setattr("harness.finetuning._read_trials", lambda: rows)
    assert [best_settings("gmp", steps)["end"] for steps in (20, 60, 180, 200, 2000)] == [0.5, 0.5, 0.5, 0.4, 0.4]
    assert best_settings("autoprune", 60) == best_settings("dense", 0) == {}


def test_each_other_method_with_phases_has_trials_and_autoprune_has_none():
    rows = read_rows(finetuning.TRIALS_RESULTS)
    for method, options in finetuning.TRIALS.items():
        for steps in ("60", "200", "600"):
            tried = [row for row in rows if (row["method"], row["steps"]) == (method, steps)]
            assert len({row["options"] for row in tried}) == len(options)
    assert {row["method"] for row in rows} == finetuning.TRIALS.keys()


# Tables and files


def row(method: str, steps: int, target: str, loss: float) -> dict[str, str]:
    return {"task": "bert", "method": method, "steps": str(steps), "target": target, "loss": str(loss)}


ROWS = [
    row("dense", 0, "", 0.5),
    row("dense", 0, "", 0.7),
    row("dense", 60, "", 0.4),
    row("dense", 60, "", 0.6),
    row("a", 60, "0.9", 2.0),
    row("a", 60, "0.9", 2.2),
    row("b", 60, "0.9", 1.0),
    row("b", 60, "0.9", 3.0),
    row("c", 60, "0.9", 0.1),
    row("a", 200, "0.5", 2.0),
    row("a", 200, "0.5", 2.0),
]


def test_the_best_cell_of_a_line_is_bold_if_it_has_all_seeds():
    table = finetuning_table(ROWS, FINETUNING_TASKS["bert"], {"a": "A", "b": "B", "c": "C"})
    assert table.splitlines()[0] == (
        "| bert: loss, nats (trained: 0.600 ± 0.141), steps | sparsity | A | B | C | not pruned |"
    )
    assert table.splitlines()[2:] == [
        "| 60 | 90% | 2.100 ± 0.141 | **2.000 ± 1.414** | 0.100 (1) | 0.500 ± 0.141 |",
        "| 200 | 50% | **2.000 ± 0.000** | – | – | – |",
    ]


def test_the_picture_has_a_line_per_method_and_the_dense_network():
    labels = {"autoprune": "A", "b": "B", "c": "C"}
    rows = [{**entry, "method": "autoprune" if entry["method"] == "a" else entry["method"]} for entry in ROWS]
    [axes] = finetuning_picture(rows, [FINETUNING_TASKS["bert"]], labels, "0.9").axes
    drawn = axes.get_legend_handles_labels()[1]
    assert sorted(drawn) == ["A", "B", "C", "before the fine-tuning", "not pruned"]


def test_runs_are_of_all_steps_sparsities_and_seeds_and_dense_ones_once_each():
    args = argparse.Namespace(
        seeds=[0, 1], tasks=["bert"], steps=[60, 200], methods=["dense", "autoprune"], sparsities=[0.5, 0.9]
    )
    runs = finetuning.list_runs(argparse.Namespace(**vars(args), trials=False))
    assert len(runs) == 2 * (3 + 2 * 2)
    assert runs[0] == FinetuningRun("bert", "dense", None, 0, 0)
    assert runs[2] == FinetuningRun("bert", "autoprune", 0.5, 60, 0)
    args.methods = ["dense", "gmp"]
    trials = finetuning.list_runs(argparse.Namespace(**vars(args), trials=True))
    assert len(trials) == 2 * 2 * 2 * 3
    assert {run.method for run in trials} == {"gmp"}


def test_the_benchmark_continues_where_it_was_stopped(tmp_path):
    task = FINETUNING_TASKS["transformer"]
    torch.save(task.network().state_dict(), dense_path(task, 0, tmp_path))  # training it would take minutes

    def run(*methods: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks" / "finetuning.py"), "--tasks", "transformer"]
        command += ["--steps", "4", "--sparsities", "0.9", "--seeds", "0", "--methods", *methods]
        command += ["--cache", ".", "--results", "a.csv", "--picture", "a.png"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert run("dense").count("→") == 2
    printed = run("dense", "autoprune", "one-shot")
    assert printed.count("→") == 2
    rows = read_rows(tmp_path / "a.csv")
    assert [(row["method"], row["target"], row["steps"]) for row in rows] == [
        ("dense", "", "0"),
        ("dense", "", "4"),
        ("autoprune", "0.9", "4"),
        ("one-shot", "0.9", "4"),
    ]
    assert "| 4 | 90% |" in printed
    assert (tmp_path / "a.png").exists()
