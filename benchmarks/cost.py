"""What pruning costs: time of a training step, and peak memory, against dense training, side by side in one run.

    python benchmarks/cost.py

Each round times the same steps of every mode, one after the other, under a Lightning Trainer; the ratios are medians
over the rounds. ``frozen``: masks are final. ``pruning``: the default, a quarter of each batch held out. ``train``: M
follows the training gradients. ``ModelPruning``: Lightning's own, once it has pruned. Memory (Linux only) is the peak
of a process of its own, less what it held before the model was made. A row a network is added to
``results/cost.csv``; the last one counts. As the model grows:

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
from harness.report import markdown
from harness.results import read, write_row
from harness.training import quiet, quiet_trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.demo.data import Split, make_loader
from lightning_autoprune.demo.networks import Classifier, lenet5, lenet_300_100
from lightning_autoprune.model.prunable_layers import prunable_weights

RESULTS = Path(__file__).parent / "results" / "cost.csv"
PEAK_STEPS = 12  # of an epoch, where memory is measured; in ``frozen`` the masks are final after one


def mlp(width: int, depth: int = 1) -> nn.Sequential:
    """An MLP, where the weights are what takes memory."""
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
    """Seconds of the second epoch, after which training ends; the masks are not frozen within it."""

    began = seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seconds = time.perf_counter() - self.began
        trainer.should_stop = trainer.current_epoch == 1


def fit(network: str, mode: str, steps: int, batch: int, epochs: int = 3) -> float:
    """Trains on random images for two epochs (of ``epochs``, for the phases); milliseconds a step."""
    torch.manual_seed(0)
    images = Split(torch.randn(steps * batch, 1, 28, 28), torch.randint(10, (steps * batch,)))
    options, clock = MODES[mode], Clock()
    prune: list[Callback] = []
    if options is not None:
        prune = [AutoPruneCallback(target_sparsity=0.95, warmup=0.0, **options)]
    elif mode == "ModelPruning":  # at the end of each epoch
        prune = [ModelPruning("l1_unstructured", amount=0.95, use_global_unstructured=True)]
    quiet_trainer(epochs, [clock, *prune]).fit(Classifier(NETWORKS[network]()), make_loader(images, batch))
    return 1000 * clock.seconds / steps


def memory(name: str) -> float:
    """A figure of this process in MiB: VmRSS now, VmHWM at its peak."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def peak(network: str, mode: str, batch: int) -> float:
    """Peak memory of a fit in MiB, in a process of its own."""
    command = [sys.executable, __file__, "--peak", mode, "--networks", network, "--batch", str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(network: str, rounds: int, steps: int, batch: int) -> dict[str, object]:
    """A row: the dense network's time and memory, and those of the other modes / these."""
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            times[mode].append(fit(network, mode, steps, batch))
    peaks = {mode: peak(network, mode, batch) for mode in MODES}
    weights = sum(weight.numel() for weight in prunable_weights(NETWORKS[network]()).values())
    row: dict[str, object] = {"network": network, "weights": weights, "batch": batch}
    row |= {"step_ms": round(statistics.median(times["dense"]), 3), "peak_mib": round(peaks["dense"])}
    for mode in OTHERS:
        ratio = statistics.median(x / y for x, y in zip(times[mode], times["dense"], strict=True))
        row |= {f"{mode}_time": round(ratio, 3), f"{mode}_memory": round(peaks[mode] / peaks["dense"], 3)}
    return row


def tables(rows: list[dict[str, str]]) -> str:
    """The README's table: times, then memory."""
    lines = [
        [f"step and epoch, {LABELS[row['network']]}", f"{float(row['step_ms']):.2f} ms", *ratios(row, "time")]
        for row in rows
    ]
    lines += [
        [f"peak memory, {LABELS[row['network']]}", f"{row['peak_mib']} MiB", *ratios(row, "memory")] for row in rows
    ]
    return markdown(["", "dense", "frozen masks", "pruning, default", 'pruning, `"train"`', "ModelPruning"], lines)


def ratios(row: dict[str, str], figure: str) -> list[str]:
    return [f"×{float(row[f'{mode}_{figure}']):.2f}" for mode in OTHERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["lenet-300-100", "lenet-5", "mlp-10m"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="of an epoch; the second of two is timed")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where a row for each network is added")
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet(args.threads)

    if args.peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
        before = memory("VmRSS")
        fit(args.networks[0], args.peak, PEAK_STEPS, args.batch, epochs=2)  # to the end of pruning
        print(memory("VmHWM") - before)
        return

    for network in args.networks:
        write_row(args.results, measure(network, args.rounds, args.steps, args.batch))
        print(tables([read(args.results)[-1]]), flush=True)
    last = {row["network"]: row for row in read(args.results)}
    print("\n" + tables(list(last.values())))


if __name__ == "__main__":
    main()
