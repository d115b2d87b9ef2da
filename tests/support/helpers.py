"""A small model that does everything a training step may do, and functions to fit and compare it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

from lightning_autoprune.method.pruner import Pruner

ROWS, FEATURES, CLASSES, BATCH = 128, 12, 4, 16


def data(rows: int = ROWS, seed: int = 0) -> TensorDataset:
    """Return a problem that a small network learns: which of the first four features is the largest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator)
    return TensorDataset(x, x[:, :CLASSES].argmax(1))


def loader(rows: int = ROWS, batch: int = BATCH, shuffle: bool = False, seed: int = 0) -> DataLoader[Any]:
    """Return a loader of :func:`data` with so many samples, in batches of so many."""
    return DataLoader(data(rows, seed), batch_size=batch, shuffle=shuffle)


class Resumable:
    """A loader that can resume in the middle of an epoch: Lightning calls its two state methods."""

    def __init__(self) -> None:
        self.batches = list(loader())
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for i in range(self.position, len(self.batches)):
            self.position = (i + 1) % len(self.batches)
            yield self.batches[i]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Net(LightningModule):
    """Two linear layers, BatchNorm, a metric and logs. ``noisy`` adds dropout and random input noise."""

    def __init__(self, noisy: bool = False, optimizer: str = "adam", hidden: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(0.5 if noisy else 0.0)
        self.last = nn.Linear(hidden, CLASSES)
        self.accuracy = Accuracy("multiclass", num_classes=CLASSES)
        self.noisy, self.optimizer = noisy, optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.relu(self.norm(self.first(x)))))

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        if self.noisy:
            x = x + 0.1 * torch.randn_like(x)
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.optimizer, self.parameters())


def held_out_loss(module: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a held-out batch; a `loss_fn` for the callback that has an import path."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    """Return an optimizer that moves a weight even if its gradient is zero."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01)
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def trainer(folder: Path | str = ".", epochs: int = 4, callbacks: Any = None, **options: Any) -> Trainer:
    """Return a quiet Trainer on the CPU, without logger and checkpoints unless `options` say otherwise."""
    options = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 2, **options}
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )


def fit(
    callback: Any = None,
    model: LightningModule | None = None,
    train: Any = None,
    val: Any = None,
    seed: int = 1,
    ckpt_path: Any = None,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[LightningModule, Trainer]:
    """Fit a model from a fixed seed; return it with its trainer."""
    seed_everything(seed, verbose=False)
    model = model or Net(**(model_options or {}))
    callbacks = callback if isinstance(callback, list) else [callback] if callback else None
    t = trainer(callbacks=callbacks, **options)
    t.fit(model, loader() if train is None else train, val, ckpt_path=ckpt_path)
    return model, t


def train(pruner: Pruner, model: nn.Module, x: Tensor, y: Tensor, steps: int, optimizer: Any = None) -> Iterator[float]:
    """Prune in a plain torch loop; yield the sparsity after each step."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        pruner.before_forward()
        nn.functional.cross_entropy(model(x), y).backward()
        if pruner.due:
            pruner.auxiliary_step([weight.grad for weight in pruner.weights.values()])
        pruner.before_weight_step()
        optimizer.step()
        pruner.after_weight_step()
        pruner.end_step()
        yield pruner.sparsity


def saving(folder: str = "checkpoints", **options) -> ModelCheckpoint:
    """Return a callback that saves every checkpoint, as ``step=N.ckpt``."""
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", **options)


def csv_rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows that a CSVLogger wrote, without the columns of this package."""
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("autoprune")} for row in csv.DictReader(file)]
    return [row for row in rows if set(row) - {"step", "epoch"}]


def rows(folder: Path | str) -> list[dict[str, float]]:
    """Return the rows that a CSVLogger wrote and that have metrics of this package."""
    with (Path(folder) / "metrics.csv").open() as file:
        all_rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in all_rows if "autoprune/sparsity" in row]


def csv_logger(folder: Path) -> CSVLogger:
    """Return a logger that writes ``metrics.csv`` into a folder, after each row."""
    return CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=1)


def same(a: Any, b: Any) -> bool:
    """Return True if two nested states are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def flat(model: nn.Module) -> Tensor:
    """Return all values of a model's state as one flat tensor."""
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def sparse(*shape, density=0.05, seed=0):
    """Return a random tensor of which a fraction `density` is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
