"""The callback under LightningCLI, from a YAML file."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from helpers import Net, loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from paths import ROOT

from lightning_autoprune import AutoPruneCallback, layer_sparsity, sparsity


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()


CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 4
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_autoprune.AutoPruneCallback
      init_args:
        target_sparsity: 0.8
        held_out: {held_out}
        exclude: ["last"]
        loss_fn: {loss_fn}
"""


def cli(held_out: str = "0.5", loss_fn: str = "null") -> LightningCLI:
    """Return the CLI of a config file, with its trainer and model but without a fit."""
    Path("config.yaml").write_text(CONFIG.format(held_out=held_out, loss_fn=loss_fn))
    return LightningCLI(Net, Data, run=False, args=["--config", "config.yaml"], save_config_callback=None)


@pytest.mark.parametrize("held_out", ["0.25", "train"])
def test_a_config_file_gives_a_callback_that_prunes(held_out):
    command = cli(held_out)
    command.trainer.fit(command.model, command.datamodule)
    assert sparsity(command.model.first.weight) == pytest.approx(0.8, abs=0.01)
    assert sparsity(command.model.last.weight) == 0


def test_the_config_file_of_the_docs_runs_as_it_is(capsys):
    config = ROOT / "docs" / "config.yaml"
    quick = ["--trainer.max_epochs=4", "--trainer.enable_progress_bar=false"]
    command = LightningCLI(args=["fit", "--config", str(config), *quick])
    zeros = layer_sparsity(command.model)
    assert zeros.pop("network.5") == 0
    assert 1 - sum(300 * 64 * (1 - z) if n == "network.1" else 30000 * (1 - z) for n, z in zeros.items()) / 49200 == (
        pytest.approx(0.95, abs=1e-4)
    )
    saved = list(Path("cli-output").rglob("*.ckpt"))
    assert len(saved) == 2
    assert list(Path("cli-output").rglob("autoprune_layers.csv"))


def test_a_loss_function_is_given_by_its_import_path():
    (callback,) = (c for c in cli(loss_fn="helpers.held_out_loss").trainer.callbacks if "Prune" in str(type(c)))
    assert isinstance(callback, AutoPruneCallback)
    assert callback.settings.loss_fn.__name__ == "held_out_loss"


def test_a_wrong_value_is_refused_with_the_callbacks_message():
    with pytest.raises(ValueError, match=r"- `held_out` is 2.0; it must be a number in \(0, 1\)"):
        cli("2.0")


def test_a_wrong_type_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        cli("test")
    assert "Literal['val', 'train']" in capsys.readouterr().err


def test_every_argument_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Net, args=["fit", "--trainer.callbacks.help=lightning_autoprune.AutoPruneCallback"])
    text = " ".join(capsys.readouterr().out.split())
    assert "fraction of all prunable weights to prune, in [0, 1). It is met exactly when the masks become" in text
    for name in inspect.signature(AutoPruneCallback).parameters:
        assert f"--trainer.callbacks.{name}" in text or f".{name} " in text, name
