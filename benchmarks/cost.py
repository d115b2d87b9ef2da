"""Measure the cost of pruning: the time of a training step, and peak memory, against dense training in the same run.

    python benchmarks/cost.py

Each round times the same steps of every mode under a Lightning Trainer, one mode after the other. The ratios are
medians over the rounds. The modes are:

* ``frozen``: the masks are final.
* ``pruning``: the default, with a quarter of each batch held out.
* ``train``: M follows the training gradients (``held_out="train"``).
* ``ModelPruning``: Lightning's own callback, once it has pruned.

Peak memory (Linux only) is measured in a separate process, less what that process held before it created the model.
Each network adds a row to ``results/cost.csv``; its last row counts. For networks of growing size:

    python benchmarks/cost.py --networks mlp-100k mlp-1m mlp-10m mlp-100m 100-layers --steps 20 --rounds 5
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.report import markdown_table
from harness.results import append_row, read_rows
from harness.training import make_trainer, silence
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.demo.data import Split, make_loader
from lightning_autoprune.demo.networks import Classifier, lenet5, lenet_300_100
from lightning_autoprune.model.prunable_layers import prunable_weights

RESULTS = Path(__file__).parent / "results" / "cost.csv"
PEAK_STEPS = 12  # per epoch when memory is measured; in the mode ``frozen`` the masks are final after one step


def mlp(width: int, depth: int = 1) -> nn.Sequential:
    """Return an MLP, in which the weights take most of the memory."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet-300-100": lenet_300_100,
    "lenet-5": lenet5,
    "mlp-100k": lambda: mlp(110),
    "mlp-1m": lambda: mlp(680),
    "mlp-10m": lambda: mlp(2800),
    "mlp-100m": lambda: mlp(9600),
    "100-layers": lambda: mlp(64, 98),
}
LABELS = {
    "lenet-300-100": "LeNet-300-100",
    "lenet-5": "LeNet-5",
    "mlp-100k": "MLP of 0.1M weights",
    "mlp-1m": "MLP of 1M weights",
    "mlp-10m": "MLP of 10M weights",
    "mlp-100m": "MLP of 100M weights",
    "100-layers": "100 layers of 64 neurons",
}
MODES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "frozen": {"finetune": 0.95, "held_out": "train"},
    "pruning": {"finetune": 0.0},
    "train": {"finetune": 0.0, "held_out": "train"},
    "ModelPruning": None,
}
OTHERS = [mode for mode in MODES if mode != "dense"]


class Clock(Callback):
    """Times the second epoch, and ends training after it; in that epoch the masks do not become final."""

    start = seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        trainer.should_stop = trainer.current_epoch == 1


def fit(network: str, mode: str, steps: int, batch: int, epochs: int = 3) -> float:
    """Train on random images, and return the milliseconds per step of the second epoch.

    Training stops after two epochs; ``epochs`` is the length of the run by which the phases are laid out.
    """
    torch.manual_seed(0)
    images = Split(torch.randn(steps * batch, 1, 28, 28), torch.randint(10, (steps * batch,)))
    options, clock = MODES[mode], Clock()
    pruning: list[Callback] = []
    if options is not None:
        pruning = [AutoPruneCallback(target_sparsity=0.95, warmup=0.0, **options)]
    elif mode == "ModelPruning":  # prunes at the end of each epoch
        pruning = [ModelPruning("l1_unstructured", amount=0.95, use_global_unstructured=True)]
    make_trainer(epochs, [clock, *pruning]).fit(Classifier(NETWORKS[network]()), make_loader(images, batch))
    return 1000 * clock.seconds / steps


def read_memory(name: str) -> float:
    """Return a figure of this process in MiB: VmRSS is its memory now, VmHWM the peak."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def peak_memory(network: str, mode: str, batch: int) -> float:
    """Return the peak memory of a fit in MiB, measured in a separate process."""
    command = [sys.executable, __file__, "--peak", mode, "--networks", network, "--batch", str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(network: str, rounds: int, steps: int, batch: int) -> dict[str, object]:
    """Return a row: the dense network's time and memory, and ratios to them for the other modes."""
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            times[mode].append(fit(network, mode, steps, batch))
    peaks = {mode: peak_memory(network, mode, batch) for mode in MODES}
    weights = sum(weight.numel() for weight in prunable_weights(NETWORKS[network]()).values())
    row: dict[str, object] = {"network": network, "weights": weights, "batch": batch}
    row |= {"step_ms": round(statistics.median(times["dense"]), 3), "peak_mib": round(peaks["dense"])}
    for mode in OTHERS:
        ratio = statistics.median(x / y for x, y in zip(times[mode], times["dense"], strict=True))
        row |= {f"{mode}_time": round(ratio, 3), f"{mode}_memory": round(peaks[mode] / peaks["dense"], 3)}
    return row


def cost_table(rows: list[dict[str, str]]) -> str:
    """Return a table of times, then of memory."""
    lines = [
        [f"step and epoch, {LABELS[row['network']]}", f"{float(row['step_ms']):.2f} ms", *format_ratios(row, "time")]
        for row in rows
    ]
    lines += [
        [f"peak memory, {LABELS[row['network']]}", f"{row['peak_mib']} MiB", *format_ratios(row, "memory")]
        for row in rows
    ]
    return markdown_table(["", "dense", "final masks", "pruning, default", 'pruning, `"train"`', "ModelPruning"], lines)


def last_rows(results: Path) -> list[dict[str, str]]:
    """Return the last row of each network, in the order of :data:`NETWORKS`."""
    last = {row["network"]: row for row in read_rows(results)}
    return [last[network] for network in NETWORKS if network in last]


def format_ratios(row: dict[str, str], figure: str) -> list[str]:
    return [f"×{float(row[f'{mode}_{figure}']):.2f}" for mode in OTHERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["lenet-300-100", "lenet-5", "mlp-10m"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="per epoch; the second of two epochs is timed")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="that torch uses")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file to which a row per network is appended")
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    silence(args.threads)

    if args.peak:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = read_memory("VmRSS")
        fit(args.networks[0], args.peak, PEAK_STEPS, args.batch, epochs=2)  # up to the end of pruning
        print(read_memory("VmHWM") - before)
        return

    for network in args.networks:
        append_row(args.results, measure(network, args.rounds, args.steps, args.batch))
        print(cost_table([read_rows(args.results)[-1]]), flush=True)
    print("\n" + cost_table(last_rows(args.results)))


if __name__ == "__main__":
    main()
