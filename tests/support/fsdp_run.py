"""Fits on two ranks with sharded weights for ``test_fsdp``: ``python fsdp_run.py FOLDER`` in each process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ddp_run
import torch
from ddp_run import RANKS, Plain, held_out, not_finite, union
from helpers import CLASSES, csv_logger, loader, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_autoprune.tensors.sharding import gather_whole, local_shard, shard_like


class Sharded(Plain):
    """A weight of 13 rows, which two ranks can't halve, and one of a single row, of which the second rank has none.

    Args:
        blocks: the layers that are gathered separately; the others are gathered with the module.
        norm: whether there is BatchNorm.
    """

    def __init__(self, blocks: tuple[str, ...] = ("first", "one"), norm: bool = False) -> None:
        super().__init__()
        self.blocks = blocks
        self.first, self.last = nn.Linear(12, 13), nn.Linear(13, CLASSES)
        self.norm = nn.BatchNorm1d(13) if norm else nn.Identity()
        self.one = nn.Linear(CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.to(self.last.bias.dtype))
        return y + self.one(y).tanh() * y

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for name in self.blocks:
                fully_shard(getattr(self, name), mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Uneven(Sharded):
    """A large layer between small ones; its shard on one rank, unlike the whole, is small enough to share a bucket."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.back, self.wide = nn.Linear(8192, 5, bias=False), nn.Linear(CLASSES, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.back(y.repeat(1, 8192 // CLASSES)).sum(1, keepdim=True) * self.wide(y).sum(1, keepdim=True)


class PartlySharded(Sharded):
    def configure_model(self) -> None:
        fully_shard(self.first, mesh=self.device_mesh["data_parallel"])


class Replicated(Sharded):
    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh)


class Stop(Callback):
    """Ends the training while masks still change."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 16


def strategy(file: bool = True, tensor: int = 1) -> ModelParallelStrategy:
    return ModelParallelStrategy(RANKS // tensor, tensor, save_distributed_checkpoint=not file)


def run(folder: Path, ranks: int = RANKS, model: Any = Sharded, file: bool = True, **more: Any) -> dict[str, Any]:
    """Fit, and return what the rank saw, with whole weights."""
    torch.manual_seed(0)  # each rank cuts its shard out of its own copy of the weights
    sharded = {"strategy": strategy(file), "devices": ranks} if ranks > 1 else {}
    result = ddp_run.run(folder, ranks, model(), **{**sharded, **more})
    result["state"] = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in result["state"].items()}
    return result


def double(folder: Path, ranks: int, precision: str, **more: Any) -> dict[str, Any]:
    """Fit in double precision; the strategy does not take ``precision="64-true"``."""
    return run(folder, ranks, lambda: Sharded().double(), **more)


def resumed(folder: Path, ranks: int, half: Path | None, file: bool, held: Any = 0.25) -> dict[str, Any]:
    """Fit with a checkpoint after each epoch, from the start or from the checkpoint `half`."""
    save = ModelCheckpoint(folder / ("file" if file else "parts"), "{epoch}", save_top_k=-1)
    options = {"callbacks": [save], "enable_checkpointing": True, "ckpt_path": half, "file": file}
    return run(
        folder, ranks, partial(Sharded, norm=True), options={"held_out": held}, epochs=5, val=loader(64), **options
    )


def without_a_pass(module: Any, batch: Any) -> Tensor:
    return torch.tensor(float("nan"))


def after_a_pass(module: Any, batch: Any) -> Tensor:
    return module(batch[0]).sum() * float("nan")


def bad_losses(folder: Path, loss_fn: Callable[[Any, Any], Tensor]) -> dict[str, Any]:
    """Fit with two held-out losses that are not finite, one of them in the step that makes the masks final."""

    def sometimes(module: Any, batch: Any) -> Tensor:
        bad = module.trainer.global_step in (4, 26)
        return loss_fn(module, batch) if bad else nn.functional.cross_entropy(module(batch[0]), batch[1])

    return run(folder, model=partial(Sharded, blocks=()), options={"loss_fn": sometimes})


def with_example(folder: Path) -> dict[str, Any]:
    def model() -> Sharded:
        model = Sharded()
        model.example_input_array = torch.zeros(2, 12)
        return model

    return run(folder, model=model)


class GradientWatch(Callback):
    """Compares the gradients before and after the held-out pass, and counts how often one is complete."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.unchanged: list[bool] = []
        self.complete = 0

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        module.last.weight.register_post_accumulate_grad_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.complete += 1

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.before = [local_shard(p.grad).clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.unchanged.append(same(self.before, [local_shard(p.grad) for p in module.parameters()]))


def traces(folder: Path) -> dict[str, Any]:
    watch = GradientWatch()
    return {**run(folder, callbacks=[watch]), "unchanged": watch.unchanged, "complete": watch.complete}


def round_trips(folder: Path) -> list[bool]:
    """Shard and gather tensors, one of them with no entry on the second rank; return whether each is as before."""
    mesh = init_device_mesh("cpu", (RANKS,))
    is_same = []
    for shape in ((13, 12), (4,), (1, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        like = distribute_tensor(x, mesh, [Shard(0)])
        is_same += [same(gather_whole(shard_like(y, like), like), y) for y in (x, x > 0, x.double())]
        is_same.append(same(shard_like(x, like), local_shard(like)))
    return is_same


def figures(folder: Path) -> dict[str, Any]:
    """Fit with figures after each epoch, which rank 0 alone gives to the logger."""
    model, options = partial(Sharded, ("first",), norm=True), {"figures_every_n_epochs": 1}
    return run(folder, model=model, options=options, logger=csv_logger(folder / "logs"), val=loader(64))


def refused(folder: Path, **more: Any) -> str:
    return ddp_run.refused(folder, **{"model": Sharded(), "strategy": strategy(), **more})


RUNS: dict[str, Callable[[Path], Any]] = {
    "train": lambda folder: union(folder, RANKS, "train", double),
    "loader": lambda folder: union(folder, RANKS, held_out(), double),
    "both": lambda folder: union(folder, RANKS, held_out(), double, train_gradients=True),
    "floors": lambda folder: union(folder, RANKS, "train", double, **FLOORS),
    "redrawn": figures,
    "val": lambda folder: run(folder, options={"held_out": "val"}, val=loader(64)),
    "accumulating": lambda folder: run(folder, accumulate_grad_batches=3, gradient_clip_val=0.5, epochs=9),
    "bfloat16": lambda folder: run(folder, precision="bf16-mixed"),
    "example": with_example,
    "traces": traces,
    "not finite": lambda folder: run(folder, options={"loss_fn": not_finite}),
    "without a pass": lambda folder: bad_losses(folder, without_a_pass),
    "after a pass": lambda folder: bad_losses(folder, after_a_pass),
    "whole": lambda folder: resumed(folder, RANKS, None, file=True),
    "half": lambda folder: resumed(folder / "again", RANKS, folder / "file" / "epoch=2.ckpt", file=True),
    "frozen": lambda folder: resumed(folder / "again", RANKS, folder / "file" / "epoch=3.ckpt", file=True),
    "from one": lambda folder: resumed(folder / "again", RANKS, folder / "alone" / "file" / "epoch=2.ckpt", file=True),
    "stopped": lambda folder: run(folder, callbacks=[Stop()], logger=csv_logger(folder / "stopped")),
    "whole, in parts": lambda folder: resumed(folder, RANKS, None, file=False),
    "half, in parts": lambda folder: resumed(folder / "again", RANKS, folder / "parts" / "epoch=2.ckpt", file=False),
    "uneven": lambda folder: run(folder, model=Uneven, options={"layer_floor": 0.2, "pressure": 3.0}),
    "round trips": round_trips,
    "neurons": lambda folder: refused(folder, options={"granularity": "neuron"}),
    "tensor parallel": lambda folder: refused(folder, strategy=strategy(tensor=RANKS)),
    "replicated": lambda folder: refused(folder, model=Replicated()),
    "not sharded": lambda folder: refused(folder, model=PartlySharded()),
    "fixed": lambda folder: refused(folder, options={"redraw_held_out": False}),
    "artifact": lambda folder: refused(folder, options={"log_artifact": True}),
    "averages": lambda folder: refused(folder, callbacks=[EMAWeightAveraging()]),
}
FLOORS: dict[str, Any] = {"layer_floor": 0.25, "pressure": 5.0, "target_sparsity": None, "auxiliary_lr": 30_000}


if __name__ == "__main__":
    ddp_run.main(RUNS)
