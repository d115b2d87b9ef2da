"""A CSV file of runs: one row per run, appended when it ends, so that a stopped benchmark can continue."""

from __future__ import annotations

import csv
import datetime
import fcntl
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import lightning
import torch

import lightning_autoprune

from .training import Outcome


@dataclass(frozen=True)
class RunParameters:
    """The base of classes whose fields say what a run is; of equal runs only one is executed."""

    def cells(self) -> dict[str, str]:
        """Return the parameters as they are written in the file."""
        return {k: "" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for k, v in asdict(self).items()}


_Run = TypeVar("_Run", bound=RunParameters)


@dataclass(frozen=True)
class Run(RunParameters):
    """The parameters of a run that starts with an untrained network.

    Attributes:
        task: name of the task.
        method: name of the method.
        target: compression to reach; None for the dense network and for runs without a target.
        epochs: length of the run.
        seed: of the initial weights, the order of the samples and the method.
        options: of the method, as JSON.
    """

    task: str
    method: str
    target: float | None
    epochs: int
    seed: int
    options: str = "{}"


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file, or none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def missing_runs(path: Path, runs: Iterable[_Run]) -> list[_Run]:
    """Return those runs that have no row in the file."""
    rows = read_rows(path)
    return [run for run in runs if not any(run.cells().items() <= row.items() for row in rows)]


def append_outcome(path: Path, run: RunParameters, outcome: Outcome) -> None:
    """Append the row of a run."""
    append_row(path, {**run.cells(), **asdict(outcome)})


def append_row(path: Path, figures: Mapping[str, object]) -> None:
    """Append a row of figures, with the date, the versions and the command.

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
            raise ValueError(
                f"{path} has the columns {header}, but the new row has {list(row)}: move the file elsewhere."
            )
        writer.writerow(row)


@dataclass(frozen=True)
class Mean:
    """Mean and spread of a figure over the seeds.

    Attributes:
        mean: arithmetic mean.
        spread: sample standard deviation; 0 for one seed.
        values: the figure of each seed.
    """

    mean: float
    spread: float
    values: tuple[float, ...]


def group_means(rows: Iterable[dict[str, str]], figure: str, by: Iterable[str]) -> dict[tuple[str, ...], Mean]:
    """Group the rows by the columns `by`, and return the mean of a figure per group.

    Rows in which the figure is empty are left out.
    """
    by = tuple(by)
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row[figure]:
            groups[tuple(row[column] for column in by)].append(float(row[figure]))
    return {
        key: Mean(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, tuple(values))
        for key, values in groups.items()
    }
