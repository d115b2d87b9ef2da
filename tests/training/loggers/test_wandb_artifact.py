"""The W&B artifact: which checkpoint it holds, its metadata, and that an error in it never stops the training."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import Net, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from wandb_file import read_models

from lightning_autoprune import AutoPruneCallback, sparsity
from lightning_autoprune.tensors.bitmasks import pack
from lightning_autoprune.training.loggers.pruned_checkpoint import has_final_masks


def artifacts(folder, callbacks, model=None, pruning=None, **options):
    """Fit with a real offline run; return the models among the artifacts that it logged."""
    import wandb

    fit(
        [AutoPruneCallback(**{"target_sparsity": 0.75, "log_artifact": True, **(pruning or {})}), *callbacks],
        model=model,
        val=loader(seed=3),
        logger=WandbLogger(project="test", save_dir=str(folder)),
        enable_checkpointing=bool(callbacks),
        **options,
    )
    wandb.finish()
    return read_models(folder)


def test_the_best_pruned_checkpoint_is_logged_with_its_metadata(tmp_path):
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


def read_masks(path):
    return {name: value != 0 for name, value in torch.load(path, weights_only=True)["state_dict"].items()}


class Worse(Net):
    """By its metric, the first checkpoint would be the best."""

    def validation_step(self, batch):
        self.log("val_age", float(self.current_epoch))


def overshoot(progress, start, target):
    """Return a path on which the density falls below its target."""
    return 0.3 * target if progress < 0.8 else target


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole files", "weights only"])
def test_a_checkpoint_with_more_zeros_than_the_final_ones_does_not_count_as_pruned(tmp_path, weights_only):
    saving = ModelCheckpoint(
        tmp_path / "c", monitor="val_age", save_top_k=-1, filename="{epoch}", save_weights_only=weights_only
    )
    pruning = {"target_sparsity": 0.5, "finetune": 0.1, "schedule": overshoot}
    [artifact] = artifacts(tmp_path, [saving], Worse(), pruning, epochs=8, seed=3)
    names = ["first.weight", "last.weight"]
    *early, last = (read_masks(tmp_path / "c" / f"epoch={epoch}.ckpt") for epoch in range(8))
    assert any(all(not (masks[n] & ~last[n]).any() for n in names) for masks in early)  # the final zeros, and more
    [entry] = artifact.manifest.contents
    assert all(torch.equal(read_masks(entry.local_path)[n], last[n]) for n in names)
    metadata = json.loads(artifact.metadata)
    assert metadata["val_age"] == 7
    assert metadata["sparsity"] == pytest.approx(float((~torch.cat([last[n].flatten() for n in names])).float().mean()))


def test_masks_in_a_checkpoint_tell_if_it_is_pruned_and_without_masks_its_zeros(tmp_path):
    model = Net()
    mask = torch.ones(16, 12, dtype=torch.bool)
    mask[:, :6] = False
    with torch.no_grad():
        model.first.weight[~mask] = 0

    def pruned(kept, **auxiliary):
        with torch.no_grad():
            model.first.weight[:, 7] = kept
        ours = {"pruner": {"auxiliary": {"masks": [pack(mask)], **auxiliary}}, "report": {}, "held_out": {}}
        torch.save({"state_dict": model.state_dict(), "callbacks": {"ours": ours} if auxiliary else {}}, "c.ckpt")
        return has_final_masks("c.ckpt", {"first.weight": ~mask}, [pack(mask)])

    assert pruned(1.0)
    assert not pruned(0.0)
    assert pruned(0.0, frozen=True)  # a kept weight is 0 by chance
    assert not pruned(1.0, frozen=False)
    assert not pruned(1.0, frozen=True, masks=[pack(~mask)])  # the masks of another fit


def test_without_a_pruned_checkpoint_the_current_model_is_logged(tmp_path):
    class Example(Net):
        example_input_array = torch.zeros(2, 12)

    [artifact] = artifacts(tmp_path, [], model=Example())
    metadata = json.loads(artifact.metadata)
    assert metadata["flops"] == pytest.approx(1 - metadata["sparsity"])


def test_no_artifact_is_logged_by_default_or_without_wandb(tmp_path):
    import wandb

    fit(AutoPruneCallback(), logger=WandbLogger(project="test", save_dir=str(tmp_path)))
    wandb.finish()
    assert read_models(tmp_path) == []
    fit(AutoPruneCallback(log_artifact=True), logger=CSVLogger(str(tmp_path)))


def test_an_error_becomes_a_warning_and_training_ends_well(tmp_path):
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
