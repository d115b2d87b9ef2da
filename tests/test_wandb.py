"""The artifact: which checkpoint becomes one, what it says, and that no failure of it reaches the training."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import Net, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from wandb_file import read_records

from lightning_autoprune import AutoPruneCallback, sparsity
from lightning_autoprune._wandb import _is_pruned


def artifacts(folder, callbacks, model=None, **options):
    """Fits with a real offline run; returns the models among the artifacts that it wrote (tables are some too)."""
    import wandb

    fit(
        [AutoPruneCallback(target_sparsity=0.75, log_artifact=True), *callbacks],
        model=model,
        val=loader(seed=3),
        logger=WandbLogger(project="test", save_dir=str(folder)),
        enable_checkpointing=bool(callbacks),
        **options,
    )
    wandb.finish()
    return models_in(folder)


def models_in(folder):
    found = read_records(folder)
    logged = [record.request.log_artifact.artifact for record in found if record.request.HasField("log_artifact")]
    logged += [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    return [artifact for artifact in logged if artifact.type == "model"]


def test_the_best_of_the_pruned_checkpoints_is_logged_with_its_figures(tmp_path):
    saving = ModelCheckpoint(tmp_path / "c", monitor="val_loss", save_top_k=-1, filename="{step}")
    [artifact] = artifacts(tmp_path, [saving], epochs=6)
    assert set(artifact.aliases) == {"latest", "pruned"}
    metadata = json.loads(artifact.metadata)
    assert metadata["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert metadata["layer_sparsity"].keys() == {"first", "last"}
    pruned = {}
    for path, value in saving.best_k_models.items():
        plain = Net()
        plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        if sparsity(plain) > 0.74:
            pruned[path] = float(value)
    assert 0 < len(pruned) < len(saving.best_k_models)
    assert metadata["val_loss"] == pytest.approx(min(pruned.values()))
    [entry] = artifact.manifest.contents
    assert entry.path == "model.ckpt"


def test_a_checkpoint_of_the_pruning_phase_with_as_many_zeros_elsewhere_is_not_pruned(tmp_path):
    model = Net()
    with torch.no_grad():
        model.first.weight[:, :6] = 0
    torch.save({"state_dict": model.state_dict()}, tmp_path / "same.ckpt")
    zeros = {"first.weight": model.first.weight == 0}
    with torch.no_grad():
        model.first.weight.copy_(model.first.weight.flip(1))
        model.first.weight[:, 7] = 0
    torch.save({"state_dict": model.state_dict()}, tmp_path / "other.ckpt")
    assert _is_pruned(str(tmp_path / "same.ckpt"), zeros)
    assert not _is_pruned(str(tmp_path / "other.ckpt"), zeros)


def test_without_a_pruned_checkpoint_the_model_as_it_is_gets_logged(tmp_path):
    class Example(Net):
        example_input_array = torch.zeros(2, 12)

    [artifact] = artifacts(tmp_path, [], model=Example())
    metadata = json.loads(artifact.metadata)
    assert metadata["flops"] == pytest.approx(1 - metadata["sparsity"])


def test_nothing_is_logged_unless_asked_for_or_without_wandb(tmp_path):
    import wandb

    fit(AutoPruneCallback(), logger=WandbLogger(project="test", save_dir=str(tmp_path)))
    wandb.finish()
    assert models_in(tmp_path) == []
    fit(AutoPruneCallback(log_artifact=True), logger=CSVLogger(str(tmp_path)))


def test_a_failure_is_a_warning_and_training_ends_well(tmp_path):
    import wandb

    class Broken(Net):
        def on_save_checkpoint(self, checkpoint):
            raise OSError("no space left on device")

    callback = AutoPruneCallback(target_sparsity=0.75, log_artifact=True)
    logger = WandbLogger(project="test", save_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="The pruned checkpoint was not logged to W&B: OSError: no space left"):
        model, _ = fit(callback, model=Broken(), logger=logger)
    wandb.finish()
    assert sparsity(model) == pytest.approx(0.75, abs=0.01)
