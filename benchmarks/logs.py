"""What logging costs: the time spent on metrics, curves and figures, as a share of the training, measured in one run.

    python benchmarks/logs.py

MLPs of 50 layers, pruned at the default interval (50 steps) with a ``WandbLogger`` in offline mode. ``metrics`` is what
each step takes (callback metrics, progress bar), ``curves`` what each log does (every layer, weights pruned and come
back), ``figures`` what comes when fitting ends, in seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from cost import Clock, mlp
from harness.training import quiet
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.demo.data import Split, make_loader
from lightning_autoprune.demo.networks import Classifier
from lightning_autoprune.training.metrics import MetricsReporter

LOGGERS: dict[str, Callable[[str], Any]] = {
    "W&B, offline": lambda folder: WandbLogger(project="cost", save_dir=folder),
    "CSV": lambda folder: CSVLogger(folder),
}


class Timed:
    """Counts the seconds of some functions while it is open."""

    def __init__(self, **functions: tuple[Any, str]) -> None:
        self.functions, self.seconds = functions, dict.fromkeys(functions, 0.0)

    def __enter__(self) -> Timed:
        self._own = {name: getattr(owner, attribute) for name, (owner, attribute) in self.functions.items()}
        for name, (owner, attribute) in self.functions.items():
            setattr(owner, attribute, self._timed(name))
        return self

    def _timed(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return self._own[name](*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return call

    def __exit__(self, *_: object) -> None:
        for name, (owner, attribute) in self.functions.items():
            setattr(owner, attribute, self._own[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of an epoch; the second of two is what is told of")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 512])
    args = parser.parse_args()
    quiet(1)
    os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
    print(f"{'50 layers of':<16}{'logger':<16}{'step':>10}{'metrics':>10}{'curves':>10}{'figures':>10}")
    for width in args.widths:
        for name, make in LOGGERS.items():
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(0)
                rows = 128 * args.steps
                images = Split(torch.randn(rows, 1, 28, 28), torch.randint(10, (rows,)))
                clock, prune = Clock(), AutoPruneCallback(target_sparsity=0.9)
                trainer = Trainer(
                    max_epochs=2,
                    accelerator="cpu",
                    callbacks=[clock, prune],
                    logger=make(folder),
                    enable_checkpointing=False,
                    enable_model_summary=False,
                    enable_progress_bar=False,
                )
                parts = {"metrics": (MetricsReporter, "publish"), "curves": (MetricsReporter, "log")}
                with Timed(**parts, figures=(AutoPruneCallback, "on_fit_end")) as timed:
                    trainer.fit(Classifier(mlp(width, 48)), make_loader(images, 128))
            shares = [timed.seconds[part] / (2 * clock.seconds) for part in parts]
            line = f"{f'{width} neurons':<16}{name:<16}{1000 * clock.seconds / args.steps:>7.2f} ms"
            print(
                line + "".join(f"{share:>10.2%}" for share in shares) + f"{timed.seconds['figures']:>8.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
