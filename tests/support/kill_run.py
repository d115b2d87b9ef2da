"""Compares runs that are killed at random moments and resume from their last checkpoint with one that never stops.

``python kill_run.py FOLDER KILLS SEED`` makes the kills in as many runs as it takes, and fails if anything differs.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from helpers import BATCH, ROWS, Net, Resumable, fit, same
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from lightning_autoprune import AutoPruneCallback


class Lines(Logger):
    """Appends each row to a file at once, so that it outlives the process."""

    name, version = "lines", 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = path.open("a", buffering=1)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Ignore them."""


def train(folder: Path, held_out: Any) -> None:
    """Train from the newest readable checkpoint, and save the final state as ``end.pt``.

    Checkpoints of the last step of an epoch are not used: if a run resumes from one, and then again from a later one,
    Lightning adds an epoch, with this callback and without.
    """
    steps = [(int(re.search(r"step=(\d+)", path.stem)[1]), path) for path in folder.glob("*.ckpt")]  # maybe "…-v1"
    newest = (path for step, path in sorted(steps, reverse=True) if step % (ROWS // BATCH))
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out, log_every_n_steps=1)
    save = ModelCheckpoint(folder, "{step}", monitor="step", mode="max", save_top_k=3, every_n_train_steps=1)
    model, _ = fit(
        [callback, save],
        Net(),
        Resumable(),
        epochs=4,
        logger=Lines(folder / "log.jsonl"),
        enable_checkpointing=True,
        ckpt_path=next((path for path in newest if is_readable(path)), None),
    )
    torch.save((dict(model.state_dict()), callback.state_dict()), folder / "unfinished.pt")
    (folder / "unfinished.pt").rename(folder / "end.pt")  # complete, or not there at all


def is_readable(path: Path) -> bool:
    """Return True if a checkpoint is complete."""
    try:
        torch.load(path, weights_only=True, mmap=False)
    except Exception:
        return False
    return True


def attempt(folder: Path, held_out: Any, seconds: float | None) -> bool:
    """Train in a child process that is killed after some seconds; return True if it was killed before its end."""
    child = os.fork()
    if child == 0:
        os.close(2)
        torch.manual_seed(0)
        try:
            train(folder, held_out)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if status:
        raise RuntimeError(f"a run in {folder} failed")
    return False


def curves(folder: Path) -> dict[int, dict[str, float]]:
    """Return the last logged metrics of this package by step; Lightning logs the user's after the step's checkpoint."""
    rows: dict[int, dict[str, float]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # killed while it was written
            continue
        rows.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k.startswith("autoprune/")})
    return rows


def main() -> None:
    base, kills, moments = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done = runs = 0
    for held_out in (0.25, "train"):
        whole = base / f"whole-{held_out}"
        whole.mkdir(parents=True)
        began = time.perf_counter()
        attempt(whole, held_out, None)
        length = time.perf_counter() - began
        goal = kills if held_out == "train" else kills // 2
        while done < goal:
            folder = base / f"killed-{runs}"
            folder.mkdir()
            before = done
            while not (folder / "end.pt").exists():
                done += attempt(folder, held_out, moments.uniform(0.1, 0.6) * length)
            runs += 1
            print(f"{done} kills", flush=True)
            end, expected = (torch.load(path / "end.pt", weights_only=False) for path in (folder, whole))
            assert same(end, expected), f"{folder}: other weights, masks or state after {done - before} kills"
            assert curves(folder) == curves(whole), f"{folder}: other curves after {done - before} kills"
    print(f"{done} kills in {runs} runs: the same bits")


if __name__ == "__main__":
    main()
