"""Measure the cost of logging: the time for metrics, curves and figures as a fraction of the training time.

    python benchmarks/logs.py

MLPs of 50 layers are pruned with a ``WandbLogger`` in offline mode and with a ``CSVLogger``, at the default interval of
50 steps. The columns are:

* ``step``: milliseconds per training step.
* ``metrics``: fraction of the training time for what each step publishes (callback metrics, progress bar).
* ``curves``: fraction of the training time for what each log writes (each layer's sparsity, weights pruned and
  revived).
* ``figures``: seconds for what is logged when fitting ends.
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
from harness.training import silence
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


class FunctionTimer:
    """A context that counts the seconds spent in given functions.

    Args:
        functions: by name, the object or class that has the function, and its attribute.
    """

    def __init__(self, **functions: tuple[Any, str]) -> None:
        self.functions, self.seconds = functions, dict.fromkeys(functions, 0.0)

    def __enter__(self) -> FunctionTimer:
        self._originals = {name: getattr(owner, attribute) for name, (owner, attribute) in self.functions.items()}
        for name, (owner, attribute) in self.functions.items():
            setattr(owner, attribute, self._timed(name))
        return self

    def _timed(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return self._originals[name](*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return call

    def __exit__(self, *_: object) -> None:
        for name, (owner, attribute) in self.functions.items():
            setattr(owner, attribute, self._originals[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="per epoch; the second of two epochs is reported")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 512])
    args = parser.parse_args()
    silence(1)
    os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
    print(f"{'50 layers of':<16}{'logger':<16}{'step':>10}{'metrics':>10}{'curves':>10}{'figures':>10}")
    for width in args.widths:
        for name, make in LOGGERS.items():
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(0)
                samples = 128 * args.steps
                images = Split(torch.randn(samples, 1, 28, 28), torch.randint(10, (samples,)))
                clock, pruning = Clock(), AutoPruneCallback(target_sparsity=0.9)
                trainer = Trainer(
                    max_epochs=2,
                    accelerator="cpu",
                    callbacks=[clock, pruning],
                    logger=make(folder),
                    enable_checkpointing=False,
                    enable_model_summary=False,
                    enable_progress_bar=False,
                )
                per_step = {"metrics": (MetricsReporter, "publish"), "curves": (MetricsReporter, "log")}
                with FunctionTimer(**per_step, figures=(AutoPruneCallback, "on_fit_end")) as timer:
                    trainer.fit(Classifier(mlp(width, 48)), make_loader(images, 128))
            fractions = [timer.seconds[part] / (2 * clock.seconds) for part in per_step]  # of both epochs
            line = f"{f'{width} neurons':<16}{name:<16}{1000 * clock.seconds / args.steps:>7.2f} ms"
            print(
                line + "".join(f"{fraction:>10.2%}" for fraction in fractions) + f"{timer.seconds['figures']:>8.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
