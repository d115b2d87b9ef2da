"""A CSV file of runs: one row a run, appended when it ends, so that a benchmark can be stopped and go on."""

from __future__ import annotations

import csv
import datetime
import fcntl
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import lightning
import torch

import lightning_autoprune

from .training import Outcome


@dataclass(frozen=True)
class Run:
    """What makes a run; equal runs are made once.

    Attributes:
        target: compression to reach; None for the dense network and where there is none.
        options: of the method, as JSON.
    """

    task: str
    method: str
    target: float | None
    epochs: int
    seed: int
    options: str = "{}"

    def key(self) -> dict[str, str]:
        """The cells that name it."""
        return {k: "" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for k, v in asdict(self).items()}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def missing(path: Path, runs: Iterable[Run]) -> list[Run]:
    """Those of the runs that the file does not have."""
    names = [field.name for field in fields(Run)]
    done = {tuple(row[name] for name in names) for row in read(path)}
    return [run for run in runs if tuple(run.key().values()) not in done]


def append(path: Path, run: Run, outcome: Outcome) -> None:
    """Adds the row of a run."""
    write_row(path, {**run.key(), **asdict(outcome)})


def write_row(path: Path, figures: Mapping[str, object]) -> None:
    """Adds a row of any figures, with the date, the versions and the command.

    Raises:
        ValueError: if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"lightning-autoprune": lightning_autoprune, "torch": torch, "lightning": lightning}
    row = {
        **figures,
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(f"{name} {module.__version__}" for name, module in versions.items()),
        "command": Path(sys.argv[0]).name,
    }
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two processes may share a file
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        file.seek(0)
        header = next(csv.reader(file), None)
        if header is None:
            writer.writeheader()
        elif header != list(row):
            raise ValueError(f"{path} has the columns {header}, and the row {list(row)}: move the file away.")
        writer.writerow(row)


@dataclass(frozen=True)
class Mean:
    """Mean and spread of a figure over the seeds.

    Attributes:
        spread: sample standard deviation; 0 for one seed.
    """

    mean: float
    spread: float
    values: tuple[float, ...]


def means(rows: Iterable[dict[str, str]], figure: str, by: Iterable[str]) -> dict[tuple[str, ...], Mean]:
    """The mean of a figure over the rows that have it and agree in the columns ``by``."""
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row[figure]:
            groups[tuple(row[column] for column in by)].append(float(row[figure]))
    return {
        key: Mean(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, tuple(values))
        for key, values in groups.items()
    }
