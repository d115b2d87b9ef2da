"""Train LeNet-300-100 dense and pruned, and show the result: the command ``lightning-autoprune demo``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from lightning_autoprune.argument_types import parse_positive_int, parse_seed
from lightning_autoprune.demo.data import DigitImages, load_digits, load_mnist, make_loader
from lightning_autoprune.demo.networks import Classifier, lenet_300_100
from lightning_autoprune.model.prunable_layers import prunable_weights
from lightning_autoprune.plots import read_curves, sparsity_curves
from lightning_autoprune.reporting.layer_table import align_columns, format_layer_table, sum_layers, summarize_layers
from lightning_autoprune.training.callback import AutoPruneCallback
from lightning_autoprune.training.lightning_package import (
    Callback,
    CSVLogger,
    Logger,
    ModelCheckpoint,
    Trainer,
    WandbLogger,
    seed_everything,
)

__all__ = ["add_arguments", "run_demo"]

_EPOCHS = {"digits": 200, "mnist": 12}
_BATCH_SIZE = {"digits": 32, "mnist": 128}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    epochs = ", ".join(f"{count} for {name}" for name, count in _EPOCHS.items())
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits", help="digits come with scikit-learn")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/mnist"), help="where MNIST's IDX files are, or will be downloaded"
    )
    parser.add_argument(
        "--target", type=float, default=None, help="sparsity to reach, in [0, 1); without it, the pressure decides"
    )
    parser.add_argument("--epochs", type=parse_positive_int, default=None, help=f"default: {epochs}")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for all files that are written"
    )
    parser.add_argument("--seed", type=parse_seed, default=0, help="for the initial weights and the order of the data")


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo and return its exit code."""
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        os.environ.setdefault(name, str(folder))
    os.environ.setdefault("WANDB_SILENT", "true")
    _set_up_wandb()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # in a network this small, threads spend their time waiting for each other
    images = load_mnist(args.data_dir) if args.data == "mnist" else load_digits()
    _train_and_report(images, args, folder)
    return 0


def _set_up_wandb() -> None:
    """Apply WANDB_SILENT now: otherwise W&B warns about the settings that Lightning's logger passes."""
    import wandb

    wandb.setup()


def _train_and_report(images: DigitImages, args: argparse.Namespace, folder: Path) -> None:
    epochs, batch_size = args.epochs or _EPOCHS[images.name], _BATCH_SIZE[images.name]
    print(
        f"LeNet-300-100 on {images.name}: {len(images.train):,} images to train on, {len(images.test):,} to test on.\n"
        f"{epochs} epochs in batches of {batch_size}, first dense, then pruned.",
        flush=True,
    )
    csv_logger = CSVLogger(str(folder), name="csv", version=_next_version(folder / "csv"))
    wandb_logger = WandbLogger(project="lightning-autoprune-demo", save_dir=str(folder))
    prune = AutoPruneCallback(target_sparsity=args.target)
    checkpoint = ModelCheckpoint(dirpath=folder, filename="pruned", enable_version_counter=False)
    dense_error = _train(images, args.seed, epochs, batch_size)
    pruned_error = _train(images, args.seed, epochs, batch_size, [csv_logger, wandb_logger], [prune, checkpoint])

    plain = Classifier(lenet_300_100(images.train.images[0].numel()))
    plain.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"])
    rows = summarize_layers(prunable_weights(plain), revived={row.name: row.revived or 0 for row in prune.layers()})
    print("\n" + align_columns(*format_layer_table([*rows, sum_layers(rows)])))
    tested = len(images.test)
    errors = f"dense {_format_error(dense_error, tested)}   pruned {_format_error(pruned_error, tested)}"
    print()
    _print_row(f"error on {tested:,} test images", errors)
    _print_row("compression", f"{1 / (1 - prune.sparsity):.1f}× ({prune.sparsity:.2%} of all weights are 0)")
    picture = folder / "sparsity.png"
    sparsity_curves(read_curves(Path(csv_logger.log_dir) / "metrics.csv")).savefig(picture, dpi=150)
    run_folder = Path(wandb_logger.experiment.dir).parent
    wandb_logger.experiment.finish()
    print()
    _print_row("pruned checkpoint", checkpoint.best_model_path)
    _print_row("sparsity curves", picture)
    _print_row("the curves in W&B", f"wandb sync {run_folder}")
    _print_row("the curves in the terminal", f"wandb leet {run_folder}")
    _print_row(
        "a report on the checkpoint", f"lightning-autoprune report {checkpoint.best_model_path} --html report.html"
    )


def _train(
    images: DigitImages,
    seed: int,
    epochs: int,
    batch_size: int,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
) -> float:
    """Train a new network and return its error on the test images, in percent."""
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
    trainer.fit(model, make_loader(images.train, batch_size, shuffle=True))
    (result,) = trainer.test(model, make_loader(images.test, 1000), verbose=False)
    return result["test_error"]


def _print_row(label: str, value: object) -> None:
    print(f"{label:<30}{value}")


def _format_error(percent: float, tested: int) -> str:
    return f"{percent:.2f}% ({round(percent / 100 * tested)} wrong)"


def _next_version(folder: Path) -> int:
    taken = [int(path.name.removeprefix("version_")) for path in folder.glob("version_*")]
    return max(taken, default=-1) + 1
