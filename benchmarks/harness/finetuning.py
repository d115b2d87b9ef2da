"""Trains dense networks once, and prunes copies of them in few steps, in the same way for all methods."""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_autoprune import AutoPruneCallback, sparsity
from lightning_autoprune.method.schedule import target_path

from .data import Data, make_seeded_loader
from .methods.autoprune import AutoPrune
from .methods.hyperflux import Hyperflux
from .methods.lightning_pruning import LightningPruningInCuts
from .methods.magnitude import GradualMagnitude, OneShotMagnitude
from .results import RunParameters, group_means, read_rows
from .tasks import Task
from .training import Learner, Method, evaluate, make_trainer, train_network

TRIALS_RESULTS = Path(__file__).parents[1] / "results" / "finetuning_trials.csv"
"""The rows of the trials of settings."""

VERSION = 1
"""Of the stored networks; raise it when a task's data, network or training changes."""

LR_FRACTION = 1 / 3
"""The first learning rate of the fine-tuning / that of the dense training."""

ORDER_SEED = 1000
"""Added to a run's seed for the order of its samples, so that it does not repeat the start of the dense training."""


@dataclass(frozen=True)
class FinetuningRun(RunParameters):
    """The parameters of a run that starts with a trained network.

    Attributes:
        task: name of the task.
        method: name of the method.
        target: fraction of the prunable weights to prune; None for the dense network.
        steps: length of the run; 0: the dense network as it was trained.
        seed: of the dense training, the order of the samples and the method.
        options: of the method, as JSON.
    """

    task: str
    method: str
    target: float | None
    steps: int
    seed: int
    options: str = "{}"


@dataclass
class FinetuningOutcome:
    """The results of one run, with a column in the file for each.

    Attributes:
        error: wrong predictions on the test samples, in percent.
        loss: cross-entropy on the test samples, in nats.
        sparsity: fraction of prunable weights that are 0.
        first_sparsity: AutoPrune's sparsity after its first pruning step; None for other methods.
        last_sparsity: its sparsity after the step before the one that makes the masks final.
        path_error: the largest difference between its sparsity and the path to the target, over all pruning steps but
            the last, in percentage points; positive if too much was pruned.
        seconds: duration of the fine-tuning.
    """

    error: float
    loss: float
    sparsity: float
    first_sparsity: float | None
    last_sparsity: float | None
    path_error: float | None
    seconds: float


# The methods: each takes the compression to reach, the seed, the steps of the run and its own options.


def _make_gradual(compression: float, seed: int, steps: int, **options: Any) -> Method:
    return GradualMagnitude(compression, every=max(1, steps // 40), **options)


FINETUNING_METHODS: dict[str, Callable[..., Method]] = {
    "dense": lambda compression, seed, steps: Method(),
    "autoprune": lambda compression, seed, steps, **options: AutoPrune(compression, seed, **options),
    "lightning": lambda compression, seed, steps, **options: LightningPruningInCuts(compression, **options),
    "gmp": _make_gradual,
    "one-shot": lambda compression, seed, steps: OneShotMagnitude(compression),
    "hyperflux": lambda compression, seed, steps, **options: Hyperflux(compression, **options),
}

FINETUNING_LABELS = {
    "autoprune": "AutoPruneCallback (default)",
    "lightning": "ModelPruning, 8 cuts",
    "gmp": "gradual magnitude pruning (own)",
    "one-shot": "one-shot magnitude (own)",
    "hyperflux": "Hyperflux (own)",
}
"""Names in tables and pictures; "own" marks a minimal implementation of ours."""


@functools.cache
def _read_trials() -> list[dict[str, str]]:
    return read_rows(TRIALS_RESULTS)


def best_settings(method: str, steps: int) -> dict[str, Any]:
    """Return a method's options: those of the best trial at the nearest number of steps; none if it has no trials."""
    trials = [row for row in _read_trials() if row["method"] == method]
    if not trials or not steps:
        return {}
    nearest = min((row["steps"] for row in trials), key=lambda text: abs(math.log(int(text) / steps)))
    found = group_means([row for row in trials if row["steps"] == nearest], "error", ("options",))
    [best] = min(found, key=lambda key: found[key].mean)
    return dict(json.loads(best))


# The dense networks


def dense_path(task: Task, seed: int, cache: Path, validate: bool = False) -> Path:
    """Return the file of a dense network; the arguments are those of :func:`load_or_train_dense`."""
    return cache / f"{task.name}-seed{seed}{'-validate' if validate else ''}-v{VERSION}.pt"


def load_or_train_dense(
    task: Task, seed: int, directory: Path, cache: Path, validate: bool = False
) -> dict[str, Tensor]:
    """Return the state of a dense network: from the cache, or trained now and stored there.

    Args:
        task: network, data and budget.
        seed: of the initial weights and the order of the samples.
        directory: directory of MNIST's IDX files.
        cache: directory of the stored networks.
        validate: whether to keep a sixth of the training samples out of training, for choosing settings.
    """
    path = dense_path(task, seed, cache, validate)
    if path.exists():
        state: dict[str, Tensor] = torch.load(path, weights_only=True)
        return state
    state = train_network(task, Method(), seed, directory, validate=validate).network.state_dict()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:  # another process may read or write the path
        torch.save(state, file)
    os.replace(file.name, path)
    return state


# The fine-tuning


class PathRecorder(Callback):
    """Records how far AutoPrune is from its path to the target; it must come after the package's callback.

    Args:
        callback: the package's callback.

    Attributes:
        points: the pairs (sparsity, sparsity that the path asks for), after each pruning step but the last one, in
            which the masks become final.
    """

    def __init__(self, callback: AutoPruneCallback) -> None:
        self.callback = callback
        self.points: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record the sparsity after a pruning step."""
        pruner = self.callback._run.pruner
        phases, target = pruner.phases, self.callback.settings.target_density
        if phases.start < trainer.global_step < phases.end:
            density = target_path(phases.progress(trainer.global_step), 1.0, target)
            self.points.append((self.callback.sparsity, 1 - density))


def finetune_and_test(
    task: Task, dense: dict[str, Tensor], method: Method, steps: int, seed: int, data: Data
) -> FinetuningOutcome:
    """Prune a trained network while it is fine-tuned for some steps, and test it.

    Adam starts at a third of the learning rate of the dense training, which falls to 0 on a cosine.

    Args:
        task: network and settings of the training.
        dense: the state of the trained network.
        method: how to prune.
        steps: length of the run; 0: the trained network is tested as it is.
        seed: of the order of the samples and of the method.
        data: samples to train and to test on.
    """
    seed_everything(seed, verbose=False)
    network = task.network().to(memory_format=torch.channels_last)
    network.load_state_dict(dense)
    points: list[tuple[float, float]] = []
    seconds = 0.0
    if steps:
        learner = Learner(method.prepare(network, data.train[0][: task.batch]), method, task.lr * LR_FRACTION)
        learner.example_input_array = data.train[0][:1]
        callbacks = method.callbacks()  # of the prepared network
        recorders = [PathRecorder(callback) for callback in callbacks if isinstance(callback, AutoPruneCallback)]
        trainer = make_trainer(None, [*callbacks, *recorders], steps=steps)
        start = time.perf_counter()
        trainer.fit(learner, make_seeded_loader(data.train, task.batch, ORDER_SEED + seed))
        seconds = time.perf_counter() - start
        network = method.finish(learner.network)
        points = [point for recorder in recorders for point in recorder.points]
    error, loss = evaluate(network, data.test_batches())
    differences = [reached - wanted for reached, wanted in points]
    return FinetuningOutcome(
        error=round(error, 3),
        loss=round(loss, 5),
        sparsity=round(sparsity(network), 6),
        first_sparsity=round(points[0][0], 6) if points else None,
        last_sparsity=round(points[-1][0], 6) if points else None,
        path_error=round(100 * max(differences, key=abs), 3) if points else None,
        seconds=round(seconds, 2),
    )
