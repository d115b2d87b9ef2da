"""The tasks: data, network and budget. Every method trains the same network on the same data for as many steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_autoprune.demo.data import load_mnist
from lightning_autoprune.demo.networks import lenet5, lenet_300_100

from .data import Data, StreamedData
from .image_data import cifar10, crop_and_flip, imagenet
from .networks import CharTransformer, mlp, mobilenet_v2, small_resnet, vgg_like

OptimizerFactory = Callable[[list[dict[str, Any]], float], Optimizer]
"""Takes parameter groups and the learning rate of the groups that have none."""


def adam(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """Return Adam."""
    return Adam(groups, lr, fused=True)


def momentum_sgd(weight_decay: float) -> OptimizerFactory:
    """Return a function that makes SGD with Nesterov's momentum of 0.9 and a weight decay."""
    return functools.partial(SGD, momentum=0.9, weight_decay=weight_decay, nesterov=True)


@dataclass(frozen=True)
class Task:
    """A network, its data and the budget that every method gets.

    Attributes:
        name: on the command line.
        data: reads the data, given its directory. The test samples are the same for all seeds.
        network: makes the network.
        epochs: passes over the training samples.
        batch: samples in a batch.
        lr: learning rate, which falls to 0 on a cosine over the run.
        metric: what ranks the methods on the test samples, ``"error"`` (percent) or ``"loss"`` (cross-entropy in nats).
        compressions: prunable weights / kept ones, for the tables.
        optimizer: makes the optimizer.
        augment: changes a batch of training inputs at random; None: they are trained on as they are.
    """

    name: str
    data: Callable[[Path], Data | StreamedData]
    network: Callable[[], nn.Module]
    epochs: int
    batch: int
    lr: float
    metric: str
    compressions: tuple[float, ...]
    optimizer: OptimizerFactory = adam
    augment: Callable[[Tensor], Tensor] | None = None

    @property
    def third(self) -> int:
        """Return a third of the epochs, rounded up, for benchmarks with many runs."""
        return -(-self.epochs // 3)


@functools.cache
def mnist(directory: Path) -> Data:
    """Return MNIST: 60,000 training and 10,000 test images."""
    images = load_mnist(directory)
    layout = torch.channels_last  # convolutions are almost twice as fast
    splits = [(split.images.contiguous(memory_format=layout), split.labels) for split in (images.train, images.test)]
    return Data(*splits)


def breast_cancer(directory: Path) -> Data:
    """Return scikit-learn's 569 biopsies with 30 measurements each (Wolberg et al., UCI); 30% are test samples."""
    from sklearn.datasets import load_breast_cancer

    values, target = load_breast_cancer(return_X_y=True)
    inputs, labels = torch.tensor(values, dtype=torch.float32), torch.tensor(target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:398], order[398:]
    mean, std = inputs[train].mean(0), inputs[train].std(0)
    inputs = (inputs - mean) / std
    return Data((inputs[train], labels[train]), (inputs[test], labels[test]))


CONTEXT = 64
ALPHABET = 96  # printable ASCII and the line feed


def split_help_text() -> tuple[Tensor, Tensor]:
    """Return Python's help topics as codes of characters, 0 to 95: nine tenths to train on, and the rest to test on."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    codes = torch.tensor(list(text.encode("ascii", "ignore")))
    codes = codes[(codes == 10) | (codes >= 32) & (codes < 127)]
    codes = torch.where(codes == 10, ALPHABET - 1, codes - 32)
    cut = len(codes) * 9 // 10
    return codes[:cut], codes[cut:]


@functools.cache
def python_help(directory: Path) -> Data:
    """Return windows of 64 characters from Python's help topics, labeled with the next ones; the last tenth tests."""
    splits = []
    for split in split_help_text():
        windows = split.unfold(0, CONTEXT + 1, CONTEXT)
        splits.append((windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    return Data(*splits)


SMALL_TASKS = (
    Task("lenet-300-100", mnist, lenet_300_100, 38, 128, 1e-3, "error", (20, 50, 80, 120, 200)),
    Task("lenet-5", mnist, lenet5, 38, 128, 1e-3, "error", (310, 500)),
    Task("resnet", mnist, small_resnet, 5, 128, 2e-3, "error", (10, 30, 100)),
    Task("transformer", python_help, CharTransformer, 6, 32, 2e-3, "loss", (10, 30, 100)),
    Task("tabular", breast_cancer, mlp, 60, 32, 1e-3, "loss", (10, 30, 100)),
)
LARGE_TASKS = (
    Task("vgg-like", cifar10, vgg_like, 200, 128, 0.1, "error", (75,), momentum_sgd(5e-4), crop_and_flip),
    Task("mobilenet-v2", imagenet, mobilenet_v2, 150, 256, 0.05, "error", (2, 4), momentum_sgd(4e-5)),
)
"""The larger networks of the AutoPrune paper, for a GPU; they are in no table and run only if they are named."""

DEFAULT_TASKS = tuple(task.name for task in SMALL_TASKS)
TASKS = {task.name: task for task in SMALL_TASKS + LARGE_TASKS}
