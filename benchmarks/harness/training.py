"""One way to train and test for all methods: Lightning's Trainer, Adam with a cosine, one thread."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_autoprune.model.prunable_layers import prunable_weights

from .tasks import Task, batches


def quiet(threads: int = 1) -> None:
    """No warnings, no notes of Lightning, and the same number of threads for all that is compared.

    Denormals are 0: what vanishes, under an L2 penalty or in a hundred layers, would slow its runs up to seven times.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def quiet_trainer(epochs: int, callbacks: list[Callback]) -> Trainer:
    """A Trainer on the CPU that writes nothing."""
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


class Method(Callback):
    """A way to prune: a callback of the Trainer with a few more hooks. This one does nothing: dense training."""

    def callbacks(self) -> list[Callback]:
        """What goes into the Trainer."""
        return [self]

    def prepare(self, network: nn.Module, inputs: Tensor) -> nn.Module:
        """The network to train in place of ``network`` (which may be changed); ``inputs`` is one batch of inputs."""
        return network

    def parameters(self, network: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for Adam; a group without ``lr`` has the task's."""
        return [{"params": list(network.parameters())}]

    def penalty(self, network: nn.Module) -> Tensor | float:
        """Added to the training loss."""
        return 0.0

    def finish(self, network: nn.Module) -> nn.Module:
        """The network with plain weights, zeros where they are pruned."""
        return network


class Learner(LightningModule):
    """Cross-entropy over the last dimension of the logits, plus the method's penalty.

    Attributes:
        rows: number of rows passed forward and backward so far (in a list, which no copy of the module's state resets).
    """

    def __init__(self, network: nn.Module, method: Method, lr: float) -> None:
        super().__init__()
        self.network, self.lr, self.rows = network, lr, [0]
        object.__setattr__(self, "method", method)

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits."""
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of a batch (inputs, labels)."""
        inputs, labels = batch
        self.rows[0] += len(inputs)
        logits = self.network(inputs)
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()) + self.method.penalty(self.network)

    def configure_optimizers(self) -> Any:
        """Adam and a cosine over the steps of the run."""
        optimizer = torch.optim.Adam(self.method.parameters(self.network), self.lr, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@dataclass
class Outcome:
    """The figures of one run.

    Attributes:
        error: wrong predictions on the test rows, in percent.
        loss: cross-entropy on the test rows, in nats.
        sparsity: fraction of prunable weights that are 0.
        compression: prunable weights / those that are not 0.
        compression_all: the same with biases, norms and embeddings counted on both sides.
        passes: rows passed forward and backward / those of dense training.
        layers: share of weights kept, in percent, by layer.
        seconds: length of the training.
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
def evaluate(network: nn.Module, rows: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Error in percent and cross-entropy in nats, over all labels."""
    network.eval()
    wrong, loss, count = 0.0, 0.0, 0
    for inputs, labels in zip(rows[0].split(1000), rows[1].split(1000), strict=True):
        logits, labels = network(inputs).flatten(0, -2), labels.flatten()
        wrong += float((logits.argmax(1) != labels).sum())
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return 100 * wrong / count, loss / count


@dataclass
class Trained:
    """A network after training, with plain weights.

    Attributes:
        test: rows to test on.
        passes, seconds: as of :class:`Outcome`.
    """

    network: nn.Module
    test: tuple[Tensor, Tensor]
    passes: float
    seconds: float


def trained(
    task: Task, method: Method, seed: int, directory: Path, epochs: int | None = None, validate: bool = False
) -> Trained:
    """Trains one network; ``validate``: with a sixth of the training rows in place of the test rows."""
    data, epochs = task.data(directory), epochs or task.epochs
    if validate:
        data = data.without_test()
    seed_everything(seed, verbose=False)
    network = task.network().to(memory_format=torch.channels_last)
    learner = Learner(method.prepare(network, data.train[0][: task.batch]), method, task.lr)
    learner.example_input_array = data.train[0][:1]
    trainer = quiet_trainer(epochs, method.callbacks())
    began = time.perf_counter()
    trainer.fit(learner, batches(data.train, task.batch, seed))
    seconds = time.perf_counter() - began
    passes = learner.rows[0] / (len(data.train[0]) * epochs)
    return Trained(method.finish(learner.network), data.test, round(passes, 2), round(seconds, 1))


def train(
    task: Task, method: Method, seed: int, directory: Path, epochs: int | None = None, validate: bool = False
) -> Outcome:
    """Trains and tests one network; ``validate``: tests on a sixth of the training rows in place of the test rows."""
    run = trained(task, method, seed, directory, epochs, validate)
    error, loss = evaluate(run.network, run.test)
    weights = prunable_weights(run.network)
    total, kept = sum(w.numel() for w in weights.values()), sum(int(w.count_nonzero()) for w in weights.values())
    rest = sum(p.numel() for p in run.network.parameters()) - total
    return Outcome(
        error=round(error, 3),
        loss=round(loss, 5),
        sparsity=round(1 - kept / total, 6),
        compression=round(total / kept, 1),
        compression_all=round((total + rest) / (kept + rest), 1),
        passes=run.passes,
        layers=" ".join(f"{n}:{100 * float(w.count_nonzero()) / w.numel():.2f}%" for n, w in weights.items()),
        seconds=run.seconds,
    )
