"""Error and sparsity on MNIST, of the dense network and of each way to hold data out.

Appends one row a run to a CSV file and skips the runs that are there already, so it can be stopped at any time:

    python benchmarks/accuracy.py --data-dir DIR --methods 0.5 train --target 0.9875 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_autoprune import AutoPruneCallback, __version__
from lightning_autoprune.demo.data import Images, load_mnist, loader
from lightning_autoprune.demo.networks import Classifier, lenet5, lenet_300_100

NETWORKS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet5}
RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
COLUMNS = ["network", "method", "target", "epochs", "batch", "seed", "options"]  # what makes a run
FIGURES = ["error", "sparsity", "compression", "layers", "seconds", "date", "versions"]


def callback(method: str, target: str, images: Images, seed: int, options: dict[str, Any]) -> AutoPruneCallback | None:
    """The callback for a method: a fraction, ``fixed-FRACTION``, ``loader``, ``train``; None for ``dense``."""
    if method == "dense":
        return None
    held_out: Any = method
    if method.startswith("fixed-"):
        held_out, options = float(method.removeprefix("fixed-")), {**options, "redraw_held_out": False}
    elif method == "loader":  # the training set itself
        held_out = loader(images.train, 128, shuffle=True)
    elif method != "train":
        held_out = float(method)
    return AutoPruneCallback(
        target_sparsity=None if target == "none" else float(target), held_out=held_out, seed=seed, **options
    )


def run(args: argparse.Namespace, images: Images, method: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Trains and tests one network; the figures of a row."""
    seed_everything(seed, verbose=False)
    model = Classifier(NETWORKS[args.network]())
    prune = callback(method, args.target, images, seed, options)
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[prune] if prune else None,
    )
    began = time.perf_counter()
    trainer.fit(model, loader(images.train, args.batch, shuffle=True))
    seconds = time.perf_counter() - began
    error = trainer.test(model, loader(images.test, 1000), verbose=False)[0]["test_error"]
    sparsity = prune.sparsity if prune else 0.0
    layers = prune.layer_sparsity() if prune else {}
    return {
        "error": round(error, 2),
        "sparsity": round(sparsity, 6),
        "compression": round(1 / (1 - sparsity), 1),
        "layers": " ".join(f"{name}:{100 * (1 - value):.2f}%" for name, value in layers.items()),
        "seconds": round(seconds),
        "date": datetime.date.today().isoformat(),
        "versions": f"lightning-autoprune {__version__}, torch {torch.__version__}, lightning {lightning.__version__}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"), help="directory of MNIST's IDX files")
    parser.add_argument("--network", choices=NETWORKS, default="lenet-300-100")
    parser.add_argument("--methods", nargs="+", default=["dense", "0.5", "train"], help=callback.__doc__)
    parser.add_argument("--target", default="0.9875", help="target sparsity, or none")
    parser.add_argument("--epochs", type=int, default=38)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--options", default="{}", help="more arguments of the callback, as JSON")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    images = load_mnist(args.data_dir)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = []
    if args.results.exists():
        with args.results.open() as file:
            done = [[row[column] for column in COLUMNS] for row in csv.DictReader(file)]
    for seed in args.seeds:
        for method in args.methods:
            target = "none" if method == "dense" else args.target
            key = [args.network, method, target, str(args.epochs), str(args.batch), str(seed), args.options]
            if key in done:
                print("already there:", *key)
                continue
            figures = run(args, images, method, seed, json.loads(args.options))
            with args.results.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS + FIGURES, lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow({**dict(zip(COLUMNS, key, strict=True)), **figures})
            result = f"error {figures['error']}%, {figures['compression']}×, {figures['seconds']} s"
            print(*key, result, flush=True)


if __name__ == "__main__":
    main()
