"""Trains and tests every method in the same way: Lightning's Trainer, a cosine schedule, one thread."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_autoprune.model.prunable_layers import prunable_weights

from .data import Batch, Data, StreamedData
from .tasks import OptimizerFactory, Task, adam

UNLABELED = -100
"""The label of a place that has none: torch's cross-entropy leaves it out."""


def silence(threads: int = 1) -> None:
    """Switch off warnings and Lightning's messages, and set the number of threads.

    Denormal numbers are flushed to 0: values that vanish, under an L2 penalty or in a hundred layers, would make a run
    up to seven times slower.
    """
    warnings.filterwarnings("ignore")
    for package in ("lightning.pytorch", "pytorch_lightning"):  # the one imported last logs for both
        logging.getLogger(package).setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


@dataclass(frozen=True)
class Hardware:
    """Where and how a network is trained: on one device.

    Attributes:
        accelerator: of the Trainer, such as ``"cpu"``, ``"gpu"`` or ``"auto"``.
        precision: of the Trainer, such as ``"32-true"``, ``"16-mixed"`` or ``"bf16-mixed"``.
        workers: number of processes that load data that is not in memory.
    """

    accelerator: str = "cpu"
    precision: str = "32-true"
    workers: int = 0


def make_trainer(
    epochs: int | None, callbacks: list[Callback], hardware: Hardware = Hardware(), steps: int = -1
) -> Trainer:
    """Return a Trainer on one device that writes nothing.

    Args:
        epochs: length of the run; None: ``steps`` gives it.
        callbacks: those of the method.
        hardware: the device.
        steps: the most steps of the run; -1: no limit.
    """
    return Trainer(
        max_epochs=epochs,
        max_steps=steps,
        accelerator=hardware.accelerator,
        devices=1,
        precision=hardware.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


class Method(Callback):
    """A way to prune: a Lightning callback with a few more hooks. The base class prunes nothing: dense training."""

    def callbacks(self) -> list[Callback]:
        """Return the callbacks for the Trainer."""
        return [self]

    def prepare(self, network: nn.Module, inputs: Tensor) -> nn.Module:
        """Return the network to train.

        Args:
            network: the task's network, which may be changed in place.
            inputs: one batch of inputs.
        """
        return network

    def parameters(self, network: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups for the optimizer; a group without ``lr`` gets the task's."""
        return [{"params": list(network.parameters())}]

    def penalty(self, network: nn.Module) -> Tensor | float:
        """Return a term to add to the training loss."""
        return 0.0

    def finish(self, network: nn.Module) -> nn.Module:
        """Return the trained network with plain weights, zero where they are pruned."""
        return network


class Learner(LightningModule):
    """Cross-entropy over the last dimension of the logits, plus the method's penalty.

    Args:
        network: to train.
        method: how to prune.
        lr: learning rate at the start.
        optimizer: makes the optimizer.
        augment: changes a batch of inputs at random; None: nothing does.

    Attributes:
        samples: number of samples passed forward and backward so far. It is in a list, so that restoring the module's
            state does not reset it.
    """

    def __init__(
        self,
        network: nn.Module,
        method: Method,
        lr: float,
        optimizer: OptimizerFactory = adam,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.lr, self.samples = network, lr, [0]
        self.make_optimizer, self.augment = optimizer, augment
        object.__setattr__(self, "method", method)  # not as a submodule

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of a batch (inputs, labels)."""
        inputs, labels = batch
        self.samples[0] += len(inputs)
        logits = self.network(self.augment(inputs) if self.augment else inputs)
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()) + self.method.penalty(self.network)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and a cosine schedule over the steps of the run."""
        optimizer = self.make_optimizer(self.method.parameters(self.network), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@dataclass
class Outcome:
    """The results of one run, with a column in the file for each.

    Attributes:
        error: wrong predictions on the test samples, in percent.
        loss: cross-entropy on the test samples, in nats.
        sparsity: fraction of prunable weights that are 0.
        compression: prunable weights / nonzero prunable weights.
        compression_all: all parameters / nonzero ones; biases, normalizations and embeddings all count as nonzero.
        passes: samples passed forward and backward / samples that dense training passes.
        layers: percentage of weights kept, by layer.
        seconds: duration of the training.
    """

    error: float
    loss: float
    sparsity: float
    compression: float
    compression_all: float
    passes: float
    layers: str
    seconds: float


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[Batch], device: torch.device | str = "cpu") -> tuple[float, float]:
    """Move the network to a device, and return the error in percent and the cross-entropy in nats, over all labels."""
    network.to(device).eval()
    wrong, loss, count = 0.0, 0.0, 0
    for inputs, labels in batches:
        logits, labels = network(inputs.to(device)).flatten(0, -2), labels.to(device).flatten()
        has_label = labels != UNLABELED
        logits, labels = logits[has_label], labels[has_label]
        wrong += float((logits.argmax(1) != labels).sum())
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return 100 * wrong / count, loss / count


@dataclass
class TrainedNetwork:
    """A network after training, with plain weights.

    Attributes:
        network: the network, zero where it is pruned.
        data: the data, with the samples to test on.
        device: where it was trained; the network is on the CPU.
        passes: see :class:`Outcome`.
        seconds: see :class:`Outcome`.
    """

    network: nn.Module
    data: Data | StreamedData
    device: torch.device
    passes: float
    seconds: float


def train_network(
    task: Task,
    method: Method,
    seed: int,
    directory: Path,
    epochs: int | None = None,
    validate: bool = False,
    hardware: Hardware = Hardware(),
) -> TrainedNetwork:
    """Train one network.

    Args:
        task: network, data and budget.
        method: how to prune.
        seed: of the initial weights and the order of the samples.
        directory: directory of the task's data.
        epochs: length of the run; None: the task's.
        validate: whether to keep a sixth of the training samples out of training, to test on in place of the test set.
        hardware: where and how to train.
    """
    data, epochs = task.data(directory), epochs or task.epochs
    if validate:
        data = data.without_test_set()
    seed_everything(seed, verbose=False)
    network = task.network().to(memory_format=torch.channels_last)
    prepared = method.prepare(network, data.first_inputs(task.batch))
    learner = Learner(prepared, method, task.lr, task.optimizer, task.augment)
    learner.example_input_array = data.first_inputs(1)
    trainer = make_trainer(epochs, method.callbacks(), hardware)
    start = time.perf_counter()
    trainer.fit(learner, data.train_loader(task.batch, seed, hardware.workers))
    seconds = time.perf_counter() - start
    passes = learner.samples[0] / (data.train_samples * epochs)
    network = method.finish(learner.network)
    return TrainedNetwork(network, data, trainer.strategy.root_device, round(passes, 2), round(seconds, 1))


def train_and_test(
    task: Task,
    method: Method,
    seed: int,
    directory: Path,
    epochs: int | None = None,
    validate: bool = False,
    hardware: Hardware = Hardware(),
) -> Outcome:
    """Train and test one network; the arguments are those of :func:`train_network`."""
    trained = train_network(task, method, seed, directory, epochs, validate, hardware)
    error, loss = evaluate(trained.network, trained.data.test_batches(hardware.workers), trained.device)
    weights = prunable_weights(trained.network)
    total, kept = sum(w.numel() for w in weights.values()), sum(int(w.count_nonzero()) for w in weights.values())
    rest = sum(p.numel() for p in trained.network.parameters()) - total
    return Outcome(
        error=round(error, 3),
        loss=round(loss, 5),
        sparsity=round(1 - kept / total, 6),
        compression=round(total / kept, 1),
        compression_all=round((total + rest) / (kept + rest), 1),
        passes=trained.passes,
        layers=" ".join(f"{n}:{100 * float(w.count_nonzero()) / w.numel():.2f}%" for n, w in weights.items()),
        seconds=trained.seconds,
    )
