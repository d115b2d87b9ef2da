"""Trains LeNet-300-100 dense and pruned, and shows what came of it: ``python -m lightning_autoprune.demo``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lightning_autoprune import AutoPruneCallback, AutoPruneError, layer_sparsity, prunable_weights
from lightning_autoprune.demo.data import DataError, Images, load_digits, load_mnist, loader
from lightning_autoprune.demo.networks import Classifier, lenet_300_100
from lightning_autoprune.plots import read_curves, sparsity_curves


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    args = _parser().parse_args(arguments)
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
    try:
        images = load_mnist(args.data_dir) if args.data == "mnist" else load_digits()
        _run(images, args, folder)
    except (DataError, AutoPruneError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lightning_autoprune.demo", description=__doc__)
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits", help="digits: shipped by scikit-learn")
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"), help="where MNIST's IDX files are or go")
    parser.add_argument("--target", type=float, default=None, help="target sparsity; none: the pressure decides")
    parser.add_argument("--epochs", type=int, default=None, help="default: 100 for digits, 12 for mnist")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all that is written")
    parser.add_argument("--seed", type=int, default=0)
    return parser


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
    _print_layers(plain)
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


def _print_layers(model: Classifier) -> None:
    weights, zeros = prunable_weights(model, trained_only=False), layer_sparsity(model)
    rows = [(name, round((1 - zeros[name]) * weight.numel()), weight.numel()) for name, weight in weights.items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    print(f"\n{'layer':<14}{'kept':>9}{'total':>10}{'sparsity':>11}")
    for name, kept, total in rows:
        print(f"{name:<14}{kept:>9,}{total:>10,}{1 - kept / total:>11.2%}")


def _next_version(folder: Path) -> int:
    taken = [int(path.name.removeprefix("version_")) for path in folder.glob("version_*")]
    return max(taken, default=-1) + 1


if __name__ == "__main__":
    raise SystemExit(main())
