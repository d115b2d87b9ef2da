"""What pruning costs: time of a training step, and peak memory, against dense training, side by side in one run.

    python benchmarks/cost.py

Each round times the same steps of every mode, one after the other, under a Lightning Trainer; the ratios are medians
over the rounds. ``frozen``: masks are final. ``pruning``: the default, a quarter of each batch held out. ``train``: M
follows the training gradients. Memory (Linux only) is the peak of a process of its own, less what it held before the
model was made.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness.training import quiet, quiet_trainer
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.demo.data import Split, loader
from lightning_autoprune.demo.networks import Classifier, lenet5, lenet_300_100

SKIP = 20  # steps before the clock starts; in ``frozen`` the masks are final by then


def wide() -> nn.Sequential:
    """An MLP of 10 million weights, where the weights are what takes memory."""
    layers = nn.Linear(784, 2800), nn.ReLU(), nn.Linear(2800, 2800), nn.ReLU(), nn.Linear(2800, 10)
    return nn.Sequential(nn.Flatten(), *layers)


NETWORKS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet5, "mlp-10m": wide}
MODES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "frozen": {"finetune": 0.95, "held_out": "train"},
    "pruning": {"finetune": 0.0},
    "train": {"finetune": 0.0, "held_out": "train"},
}


class Clock(Callback):
    """Seconds of all steps after the first few."""

    began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == SKIP:
            self.began = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def fit(network: str, mode: str, steps: int, batch: int) -> float:
    """Trains on random images; milliseconds a step."""
    torch.manual_seed(0)
    images = Split(torch.randn(steps * batch, 1, 28, 28), torch.randint(10, (steps * batch,)))
    options, clock = MODES[mode], Clock()
    prune = [] if options is None else [AutoPruneCallback(target_sparsity=0.95, warmup=0.0, **options)]
    quiet_trainer(1, [clock, *prune]).fit(Classifier(NETWORKS[network]()), loader(images, batch))
    return 1000 * clock.seconds / (steps - SKIP)


def memory(name: str) -> float:
    """A figure of this process in MiB: VmRSS now, VmHWM at its peak."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def peak(network: str, mode: str, batch: int) -> float:
    """Peak memory of a fit in MiB, in a process of its own."""
    command = [sys.executable, __file__, "--peak", mode, "--networks", network, "--batch", str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["lenet-300-100", "lenet-5"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet(args.threads)

    if args.peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
        before = memory("VmRSS")
        fit(args.networks[0], args.peak, SKIP + 5, args.batch)
        print(memory("VmHWM") - before)
        return

    others = [mode for mode in MODES if mode != "dense"]
    header = f"{'dense':>10}" + "".join(f"{mode + ' ÷ dense':>18}" for mode in others)
    print(f"{'time of a step':<16}{header}")
    for network in args.networks:
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(args.rounds):
            for mode in MODES:
                times[mode].append(fit(network, mode, args.steps, args.batch))
        line = f"{network:<16}{statistics.median(times['dense']):>7.2f} ms"
        for mode in others:
            ratio = statistics.median(x / y for x, y in zip(times[mode], times["dense"], strict=True))
            line += f"{ratio:>18.2f}"
        print(line, flush=True)

    print(f"\n{'peak memory':<16}{header}")
    for network in [*args.networks, "mlp-10m"]:
        dense = peak(network, "dense", args.batch)
        ratios = [peak(network, mode, args.batch) / dense for mode in others]
        print(f"{network:<16}{dense:>6.0f} MiB" + "".join(f"{ratio:>18.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
