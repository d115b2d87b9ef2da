"""Fits on two ranks for ``test_ddp``: ``python ddp_run.py FOLDER`` in each process saves what its rank saw."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import BATCH, Net, csv_logger, data, fit, loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from lightning_autoprune import AutoPruneCallback

RANKS = 2
SETTINGS: dict[str, Any] = {"target_sparsity": 0.7, "warmup": 0.1, "finetune": 0.2}


@atexit.register
def destroy_process_group() -> None:
    """End the group before the interpreter ends: if Lightning leaves it open, torch may abort (its issue 190489)."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Plain(Net):
    """Has no BatchNorm, so that the mean over the parts of a batch is the mean over the batch."""

    def __init__(self) -> None:
        super().__init__(optimizer="sgd")
        self.norm = nn.Identity()


class Recorder(Callback):
    """Records the masks after each step, and the held-out loss if there is one."""

    def __init__(self, callback: AutoPruneCallback) -> None:
        self.callback, self.masks, self.losses = callback, [], []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if (loss := trainer.callback_metrics.get("autoprune/held_out_loss")) is not None:
            self.losses.append(float(loss))
        masks = self.callback._run.pruner.masks()
        self.masks.append(torch.cat([mask.flatten() for mask in masks]) if masks else torch.ones(1))


class UpTo(DistributedSampler):
    """Gives the ranks different numbers of samples."""

    def __init__(self, dataset: Any, samples: tuple[int, int]) -> None:
        super().__init__(dataset, RANKS, int(torch.distributed.get_rank()), shuffle=False)
        self.samples = samples[self.rank]

    def __iter__(self):
        return iter(range(self.samples))

    def __len__(self) -> int:
        return self.samples


def run(
    folder: Path, ranks: int = RANKS, model: Any = None, options: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Fit with the same number of steps on one rank as on two; return what the rank saw."""
    torch.manual_seed(0)  # for the model that is made here
    callback = AutoPruneCallback(**{**SETTINGS, **(options or {})})
    recorder = Recorder(callback)
    callbacks = [callback, recorder, *more.pop("callbacks", [])]
    train = more.pop("train", None) or loader(batch=BATCH // ranks)
    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {"devices": 1}
    model, trainer = fit(callbacks, model or Plain(), train, folder=folder, **{**strategy, **more})
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "masks": recorder.masks,
        "losses": recorder.losses,
        "state": model.state_dict(),
        "metrics": metrics,
        "sparsity": callback.sparsity,
    }


def held_out(rows: int = 44, batch: int = 11) -> DataLoader[Any]:
    return DataLoader(data(rows, seed=5), batch)


def union(folder: Path, ranks: int, held: Any, fit: Any = run, **options: Any) -> dict[str, Any]:
    """Fit on the same samples per step for any number of ranks, in double precision: rounding changes no mask."""
    sampler = DistributedSampler(data(), ranks, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    train = DataLoader(data(), BATCH // ranks, sampler=sampler)
    return fit(folder, ranks, options={"held_out": held, **options}, precision="64-true", epochs=5, train=train)


def resumed(folder: Path, ranks: int, half: Path | None) -> dict[str, Any]:
    """Fit with a checkpoint after each epoch, from the start or from the checkpoint `half`."""
    save = ModelCheckpoint(folder / "saved", "{epoch}", save_top_k=-1)
    options = {"callbacks": [save], "enable_checkpointing": True, "ckpt_path": half}
    return run(folder, ranks, Net(), {"held_out": held_out()}, epochs=5, **options)


def unfrozen(folder: Path) -> dict[str, Any]:
    """Fit with a backbone that a finetuning callback unfreezes, and whose gradients DDP does not share."""

    class Backbone(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(12, 12)

        def forward(self, x: Any) -> Any:
            return super().forward(self.backbone(x))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)

    return run(folder, model=Backbone(), callbacks=[BackboneFinetuning(2, verbose=False)], epochs=6)


def logged(folder: Path) -> dict[str, Any]:
    """Fit with an artifact of the model itself, as there is no file; a hook of the model waits for the other rank."""
    import wandb

    class Waiting(Plain):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["ranks"] = int(self.all_gather(torch.ones(())).sum())

    logger = WandbLogger(project="test", save_dir=str(folder / "wandb"))
    result = run(folder, model=Waiting(), options={"log_artifact": True}, logger=logger)
    wandb.finish()
    return result


def not_finite(module: Any, batch: Any) -> Any:
    """Return a loss that is NaN on rank 1 at every fifth step."""
    loss = nn.functional.cross_entropy(module(batch[0]), batch[1])
    bad = module.trainer.global_rank == 1 and module.trainer.global_step % 5 == 0
    return loss * float("nan") if bad else loss


class Gathering(Plain):
    """Has a loss over all ranks, whose backward pass waits for them; held-out losses are sometimes NaN on rank 1."""

    held = 0

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        loss = self.all_gather(nn.functional.cross_entropy(self(x), y), sync_grads=True).mean()
        self.held += len(x) == 2
        bad = len(x) == 2 and self.held % 4 == 0 and self.global_rank == 1
        return loss + float("nan") if bad else loss


def batches_of_other_sizes(folder: Path) -> dict[str, Any]:
    """Fit on batches of 16 samples on one rank and 10 on the other, which hold out shares of 0.25 and 0.2."""
    rank = torch.distributed.get_rank()
    indices = torch.randperm(128, generator=torch.Generator().manual_seed(rank))
    batches = [batch.tolist() for batch in indices[:80].split((16, 10)[rank])][:5]
    return run(folder, train=DataLoader(data(), batch_sampler=batches), use_distributed_sampler=False, epochs=8)


def refused(folder: Path, **more: Any) -> str:
    """Return the error of a fit."""
    try:
        run(folder, **more)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def uneven_batches(folder: Path) -> dict[str, Any]:
    """Fit on epochs whose last batch has three samples on rank 0, of which none can be held out."""
    samples = 32 + (3 if torch.distributed.get_rank() == 0 else 16)
    train = DataLoader(Subset(data(), range(samples)), 16, shuffle=True)
    return run(folder, train=train, use_distributed_sampler=False, epochs=8)


RUNS: dict[str, Callable[[Path], Any]] = {
    "train": lambda folder: union(folder, RANKS, "train"),
    "loader": lambda folder: union(folder, RANKS, held_out()),
    "both": lambda folder: union(folder, RANKS, held_out(), train_gradients=True),
    "redrawn": lambda folder: run(folder, model=Net(noisy=True), logger=csv_logger(folder / "logs")),
    "val": lambda folder: run(folder, options={"held_out": "val"}, val=loader(64)),
    "accumulating": lambda folder: run(folder, model=Net(), accumulate_grad_batches=3, gradient_clip_val=0.5, epochs=9),
    "neurons": lambda folder: run(folder, model=neuron_net(), options={"granularity": "neuron"}, epochs=8),
    "uneven batches": uneven_batches,
    "other sizes": batches_of_other_sizes,
    "gathering": lambda folder: run(folder, model=Gathering(), epochs=8),
    "uneven loaders": lambda folder: run(
        folder, options={"held_out": DataLoader(data(64, 5), 8, sampler=UpTo(data(64, 5), (24, 40)))}
    ),
    "not finite": lambda folder: run(folder, options={"loss_fn": not_finite}),
    "whole": lambda folder: resumed(folder, RANKS, None),
    "half": lambda folder: resumed(folder / "again", RANKS, folder / "saved" / "epoch=2.ckpt"),
    "unfrozen": unfrozen,
    "logged": logged,
    "fixed": lambda folder: refused(folder, options={"redraw_held_out": False}),
    "not wrapped": lambda folder: refused(folder, strategy=UnwrappedDDP()),
    "averaging": lambda folder: refused(folder, strategy=DDPStrategy(model_averaging_period=2)),
}


class UnwrappedDDP(DDPStrategy):
    """A strategy under which no gradients are averaged."""

    def configure_ddp(self) -> None:
        """Leave the model as it is."""


def neuron_net() -> Net:
    model = Net()
    model.example_input_array = torch.zeros(2, 12)
    return model


def main(runs: dict[str, Callable[[Path], Any]]) -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:  # Lightning starts the ranks by itself
        result = run(folder, strategy=sys.argv[2])
        torch.save(result, folder / f"{sys.argv[2]}.pt")
        return
    results = {}
    for name, function in runs.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results[name] = function(folder), [str(w.message) for w in caught]
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(RUNS)
