"""Figures beside the curves, read back from real loggers' files; an error in a logger never stops the training."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import Net, csv_logger, fit, loader
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core.rank_zero import WarningCache
from torch import nn
from wandb_file import read_history, read_records

from lightning_autoprune import AutoPruneCallback, sparsity
from lightning_autoprune.training.loggers import figure_writer
from lightning_autoprune.training.loggers.figures import WRITERS

COLUMNS = ["layer", "shape", "weights", "kept", "sparsity", "flops", "flops_kept", "revived"]


class Example(Net):
    example_input_array = torch.zeros(1, 12)


def wandb_run(folder, callbacks=(), prefix="", **options):
    """Fit with a real offline run; return the callback, the rows with figures, the summary and the files' folder."""
    import wandb

    callback = AutoPruneCallback(target_sparsity=0.8, **options)
    logger = WandbLogger(project="test", save_dir=str(folder), prefix=prefix)
    fit(
        [callback, *callbacks], model=Example(), val=loader(seed=3), logger=logger, enable_checkpointing=bool(callbacks)
    )
    wandb.finish()
    rows = [row for row in read_history(folder) if any("layers" in key for key in row)]
    summary = {}
    for record in read_records(folder):
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    (files,) = folder.rglob("files")
    return callback, rows, summary, files


def read_table(files: Path, path: str) -> dict:
    return json.loads((files / path).read_text())


def test_wandb_gets_all_figures_when_fitting_ends(tmp_path):
    callback, [row], _, files = wandb_run(tmp_path)
    assert row["trainer/global_step"] == 32
    assert (files / row["autoprune/sparsity_map/path"]).read_bytes()[1:4] == b"PNG"
    layers = read_table(files, row["autoprune/layers/path"])
    assert layers["columns"] == COLUMNS
    assert layers["data"] == [
        [r.name, "×".join(map(str, r.shape)), r.weights, r.kept, r.sparsity, r.flops, r.flops_kept, r.revived]
        for r in callback.layers()
    ]
    assert layers["data"][0][5] == 2 * 192
    assert row["autoprune/m/first/_type"] == "histogram"
    assert sum(row["autoprune/m/first/values"]) == 192
    (path,) = (value for key, value in row.items() if key.startswith("autoprune/path") and key.endswith("/path"))
    points = read_table(files, path)
    assert points["columns"] == ["sparsity", "val_loss"]
    assert len(points["data"]) == 4
    assert points["data"][-1][0] == callback.sparsity


def test_the_wandb_summary_holds_sparsity_compression_and_the_best_values(tmp_path):
    saving = ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    callback, _, summary, _ = wandb_run(tmp_path, [saving])
    assert summary["autoprune/final_sparsity"] == pytest.approx(callback.sparsity)
    assert summary["autoprune/final_compression"] == pytest.approx(1 / (1 - callback.sparsity))
    assert summary["autoprune/best_val_loss"] == pytest.approx(float(saving.best_model_score))
    pruned = [value for _, zeros, value in callback._run.report.history.points if zeros == callback.sparsity]
    assert len(pruned) == 2
    assert summary["autoprune/best_pruned_val_loss"] == min(pruned)


def test_a_metric_that_early_stopping_monitors_is_followed_too(tmp_path):
    _, _, summary, _ = wandb_run(tmp_path, [EarlyStopping("val_loss", mode="max", patience=9)])
    assert summary["autoprune/best_val_loss"] >= summary["autoprune/best_pruned_val_loss"]


def test_figures_are_logged_at_the_given_interval_and_never_if_it_is_none(tmp_path):
    _, rows, _, files = wandb_run(tmp_path / "a", figures_every_n_epochs=2)
    assert [row["trainer/global_step"] for row in rows] == [16, 32]
    kept = [sum(layer[3] for layer in read_table(files, row["autoprune/layers/path"])["data"]) for row in rows]
    assert 256 > kept[0] > kept[1] == 51
    assert rows[0]["autoprune/m/first/values"] != rows[1]["autoprune/m/first/values"]
    _, rows, summary, _ = wandb_run(tmp_path / "b", figures_every_n_epochs=None)
    assert (rows, "autoprune/final_sparsity" in summary) == ([], False)


def tensorboard_events(folder, callback, **options):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(callback, val=loader(seed=3), logger=TensorBoardLogger(str(folder), name="", version="", **options))
    return EventAccumulator(str(folder), {"tensors": 0, "images": 0, "histograms": 0}).Reload()


def test_tensorboard_gets_all_figures(tmp_path):
    callback = AutoPruneCallback(target_sparsity=0.8)
    events = tensorboard_events(tmp_path, callback)
    tags = events.Tags()
    assert set(tags["images"]) == {"autoprune/sparsity_map", "autoprune/path"}
    assert set(tags["histograms"]) == {"autoprune/m/first", "autoprune/m/last"}
    assert events.Histograms("autoprune/m/first")[0].histogram_value.num == 192
    text = events.Tensors("autoprune/layers/text_summary")[0].tensor_proto.string_val[0].decode()
    first = callback.layers()[0]
    assert f"| first | 16×12 | 192 | {first.kept} | {first.sparsity:.2%} | {first.revived} |" in text
    assert "| all |  | 256 | 51 | 80.08% |" in text


def test_no_name_in_tensorboard_is_a_folder_of_another(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Heads(Example):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({name: nn.Linear(12, 4) for name in ("a", "a/b")})

        def forward(self, x):
            return super().forward(x) + sum(head(x) for head in self.heads.values())

    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    fit(AutoPruneCallback(target_sparsity=0.8), model=Heads(), val=loader(seed=3), logger=logger)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    names = [name for kind in ("images", "histograms", "tensors", "scalars") for name in tags[kind]]
    assert {"autoprune/m/heads.a", "autoprune/m/heads.a_b", "autoprune/layer_sparsity/heads.a_b"} <= {*names}
    assert not [(a, b) for a in names for b in names if b.startswith(f"{a}/")]


def test_the_names_of_figures_begin_with_the_loggers_prefix(tmp_path):
    saving = ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    _, [row], summary, _ = wandb_run(tmp_path / "w", [saving], prefix="exp")
    names = {"layers", "sparsity_map", "m", "path"}
    assert {key.split("/")[1].split("_table")[0] for key in row if key.startswith("exp-autoprune/")} >= names
    ends = {"final_sparsity", "final_compression", "best_val_loss", "best_pruned_val_loss"}
    assert {f"exp-autoprune/{name}" for name in ends} <= summary.keys()
    tags = tensorboard_events(tmp_path / "t", AutoPruneCallback(target_sparsity=0.8), prefix="exp").Tags()
    pictures = [name for kind in ("images", "histograms", "tensors") for name in tags[kind]]
    names = {"path", "sparsity_map", "m/first", "layers/text_summary"}
    assert {f"exp-autoprune/{name}" for name in names} <= {*pictures}
    assert not [name for name in [*row, *summary, *pictures] if name.startswith("autoprune")]


def test_a_remote_csv_logger_gets_the_table_beside_its_metrics(tmp_path):
    import fsspec

    fit(AutoPruneCallback(target_sparsity=0.8), logger=CSVLogger(f"memory://{tmp_path.name}"))
    files = fsspec.filesystem("memory").find(tmp_path.name)
    assert {Path(path).name for path in files} >= {"metrics.csv", "autoprune_layers.csv"}
    assert len({Path(path).parent for path in files}) == 1
    assert not list(tmp_path.rglob("autoprune_layers.csv"))


def test_a_csv_logger_gets_the_table_as_a_separate_file():
    callback = AutoPruneCallback(target_sparsity=0.8)
    fit(callback, logger=csv_logger(Path("logs")))
    with Path("logs/autoprune_layers.csv").open() as file:
        first, last = csv.DictReader(file)
    assert (first["name"], first["shape"], last["name"], last["shape"]) == ("first", "16x12", "last", "4x16")
    assert int(first["kept"]) == callback.layers()[0].kept


def test_without_matplotlib_the_other_figures_are_logged_and_one_warning_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setattr(figure_writer, "_warnings", WarningCache())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, rows, _, _ = wandb_run(tmp_path, figures_every_n_epochs=1)
    assert len(rows) == 4
    assert "autoprune/sparsity_map/path" not in rows[-1]
    assert "autoprune/layers/path" in rows[-1]
    [text] = [str(w.message) for w in caught if "matplotlib" in str(w.message)]
    assert text.endswith("which need matplotlib: pip install 'lightning-autoprune[plots]'.")


def test_an_error_in_a_logger_becomes_a_warning_and_training_ends_well(tmp_path):
    import wandb

    class Broken(WandbLogger):
        broken = False

        @property
        def experiment(self):
            if self.broken:
                raise OSError("no space left on device")
            return super().experiment

    class Break(Callback):
        def on_fit_end(self, trainer, *_):
            Broken.broken = True

    logger = Broken(project="test", save_dir=str(tmp_path))
    with pytest.warns(UserWarning, match=r"were not logged by Broken: OSError: no space left on device"):
        model, _ = fit([Break(), AutoPruneCallback(target_sparsity=0.8)], logger=logger)
    wandb.finish()
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_a_new_kind_of_logger_gets_figures_once_it_has_a_writer(monkeypatch):
    class Mine(DummyLogger):
        """A logger that the package does not know."""

    class Writer(figure_writer.FigureWriter[Mine]):
        def log(self, logger, figures):
            logged.append((type(logger), figures.step, [layer.name for layer in figures.layers]))

    class Derived(Mine):
        """A subclass has the writer of its base class."""

    logged = []
    fit(AutoPruneCallback(target_sparsity=0.8), logger=Mine())
    assert logged == []
    monkeypatch.setitem(WRITERS, Mine, Writer())
    fit(AutoPruneCallback(target_sparsity=0.8), logger=[Mine(), DummyLogger(), Derived()])
    assert logged == [(kind, 32, ["first", "last"]) for kind in (Mine, Derived)]
