"""A trial of the split, before training starts: does the network take a part of a batch?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_autoprune.tensors.preserve import preserve_attributes
from lightning_autoprune.tensors.sharding import isolated_pass, local_shard
from lightning_autoprune.training.held_out.held_out_source import HeldOutError
from lightning_autoprune.training.held_out_pass import held_out_loss, problem_of_loss, shielded
from lightning_autoprune.training.lightning_package import LightningModule, Trainer

__all__ = ["try_batches"]


def try_batches(
    trainer: Trainer,
    whole: Any,
    rest: Any,
    held_out: Any,
    loss_fn: Callable[[LightningModule, Any], Tensor] | None,
    agree: Callable[[bool], bool],
    *seeds: int,
) -> None:
    """Compute the losses of a batch and of its parts one after the other, without effect on the run.

    A network may need whole batches: because it keeps a state from one batch to the next, or compares the samples of a
    batch with each other. A network with lazy layers is not tried.

    Args:
        trainer: a trainer in its training loop.
        whole: a training batch on the model's device.
        rest: a part of it that W would be trained on.
        held_out: the other part.
        loss_fn: see :func:`~lightning_autoprune.training.held_out_pass.held_out_gradients`.
        agree: returns True if its argument is True on all ranks.
        seeds: integers that seed the random numbers inside.

    Raises:
        HeldOutError: if there is no loss for one of them; says for which, and shows the error. A loss that is infinite
            or NaN may be due to the data, and is no error here.
    """
    module = trainer.lightning_module
    if any(is_lazy(parameter) for parameter in module.parameters()):  # the first pass gives them shapes and values
        return
    tries: list[tuple[str, Any, Any]] = [("the held-out part of a batch", held_out, loss_fn)]
    if module.automatic_optimization:  # otherwise `training_step` takes optimizer steps
        tries = [("a whole batch", whole, None), ("the rest of a batch", rest, None), *tries]
    with ExitStack() as stack:
        stack.enter_context(preserve_attributes(module.modules()))
        stack.enter_context(_preserve_parameters(module))
        stack.enter_context(shielded(module, *seeds))
        stack.enter_context(isolated_pass(module, list(module.parameters())))
        stack.enter_context(torch.enable_grad())
        for what, batch, function in tries:
            error, problem = None, ""
            try:
                problem = problem_of_loss(held_out_loss(trainer, batch, function), may_overflow=True)
            except Exception as raised:
                error, problem = raised, f"{type(raised).__name__}: {raised}"
            try:
                if not agree(not problem):
                    name = "`loss_fn`" if function else f"`training_step` of {type(module).__name__}"
                    how = f"raises on {what}: {problem}" if error else f"gives a loss for {what} that is {problem}"
                    raise HeldOutError(
                        f"{name} {how}" if problem else f"{name} fails on {what} on another rank"
                    ) from error
            finally:
                error = None  # its traceback refers to this frame: as a cycle, they would outlive the trial


@contextmanager
def _preserve_parameters(module: nn.Module) -> Iterator[None]:
    """Restore the parameters that are written to in the block.

    Those that are not trained are left out if they take more memory than the others, as those of a large frozen model
    do; a teacher, which ``training_step`` may write to, takes no more.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    others = [p for p in module.parameters() if not p.requires_grad]
    if sum(p.numel() for p in others) <= sum(p.numel() for p in trained):
        trained += others
    shards = [local_shard(p).detach() for p in trained if not p.is_inference()]
    saved = [(shard, shard._version, shard.clone()) for shard in shards]
    try:
        yield
    finally:
        for shard, version, value in saved:
            if shard._version != version or not torch.equal(shard, value):
                shard.copy_(value)
