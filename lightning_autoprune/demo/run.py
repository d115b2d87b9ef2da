"""Trains LeNet-300-100 dense and pruned, and shows what came of it: ``lightning-autoprune demo``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lightning_autoprune.demo.data import Images, load_digits, load_mnist, loader
from lightning_autoprune.demo.networks import Classifier, lenet_300_100
from lightning_autoprune.model.prunable_layers import prunable_weights
from lightning_autoprune.plots import read_curves, sparsity_curves
from lightning_autoprune.reporting.layer_table import align_columns, summarize_layers, table_cells, total_row
from lightning_autoprune.training.callback import AutoPruneCallback

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be asked of the demo."""
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits", help="digits: shipped by scikit-learn")
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"), help="where MNIST's IDX files are or go")
    parser.add_argument("--target", type=float, default=None, help="sparsity, in [0, 1); none: the pressure decides")
    parser.add_argument("--epochs", type=at_least_one, default=None, help="default: 100 for digits, 12 for mnist")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all that is written")
    parser.add_argument("--seed", type=_seed, default=0, help="of the initial weights and the order of the data")


def at_least_one(text: str) -> int:
    """An argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is not from 0 to {2**32 - 1}")
    return number


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns the exit code."""
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        os.environ.setdefault(name, str(folder))
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # the network is small: more threads would only wait for each other
    _run(load_mnist(args.data_dir) if args.data == "mnist" else load_digits(), args, folder)
    return 0


def _run(images: Images, args: argparse.Namespace, folder: Path) -> None:
    mnist = images.name == "mnist"
    epochs = args.epochs or (12 if mnist else 100)
    batch = 128 if mnist else 32
    print(f"LeNet-300-100 on {images.name}, {epochs} epochs, batches of {batch}. First dense, then pruned.", flush=True)

    csv = CSVLogger(str(folder), name="csv", version=_next_version(folder / "csv"))
    wandb = WandbLogger(project="lightning-autoprune-demo", save_dir=str(folder))
    prune = AutoPruneCallback(target_sparsity=args.target)
    checkpoint = ModelCheckpoint(dirpath=folder, filename="pruned", enable_version_counter=False)
    _, dense_error = _fit(images, args.seed, epochs, batch)
    _, error = _fit(images, args.seed, epochs, batch, [csv, wandb], [prune, checkpoint])

    plain = Classifier(lenet_300_100(images.train.images[0].numel()))
    plain.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"])
    rows = summarize_layers(prunable_weights(plain), revived={row.name: row.revived or 0 for row in prune.layers()})
    print("\n" + align_columns(*table_cells([*rows, total_row(rows)])))
    kept = 1 - prune.sparsity
    print(f"\nerror on the test images   dense {dense_error:.2f}%   pruned {error:.2f}%")
    print(f"compression                {1 / kept:.1f}× ({prune.sparsity:.2%} of all weights are 0)")
    picture = folder / "sparsity.png"
    sparsity_curves(read_curves(Path(csv.log_dir) / "metrics.csv")).savefig(picture, dpi=150)
    run_dir = Path(wandb.experiment.dir).parent
    wandb.experiment.finish()
    print(f"\npruned checkpoint          {checkpoint.best_model_path}")
    print(f"sparsity curves            {picture}")
    print(f"the same in W&B            wandb sync {run_dir}")
    print(f"    or in the terminal     wandb leet {run_dir}")
    print(f"more of the checkpoint     lightning-autoprune report {checkpoint.best_model_path} --html report.html")


def _fit(
    images: Images,
    seed: int,
    epochs: int,
    batch: int,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
) -> tuple[Classifier, float]:
    """Trains one network; returns it with its error on the test images in percent."""
    seed_everything(seed, verbose=False)
    model = Classifier(lenet_300_100(images.train.images[0].numel()))
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=loggers or False,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        log_every_n_steps=20,
    )
    trainer.fit(model, loader(images.train, batch, shuffle=True))
    (result,) = trainer.test(model, loader(images.test, 1000), verbose=False)
    return model, result["test_error"]


def _next_version(folder: Path) -> int:
    taken = [int(path.name.removeprefix("version_")) for path in folder.glob("version_*")]
    return max(taken, default=-1) + 1
