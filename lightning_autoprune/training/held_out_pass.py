"""The held-out pass: one more forward and backward pass in the training loop that leaves no trace in the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torchmetrics import Metric

from lightning_autoprune.tensors.dtypes import at_least_float32
from lightning_autoprune.tensors.preserve import preserve_buffers, preserve_values
from lightning_autoprune.tensors.random_state import isolated_random
from lightning_autoprune.tensors.sharding import isolated_pass, local_shard, loss_gradients
from lightning_autoprune.tensors.write_detector import WriteDetector
from lightning_autoprune.training.lightning_internals import grad_scaler, training_step_arguments
from lightning_autoprune.training.lightning_package import LightningModule, Trainer, both

__all__ = ["SINGLE_SAMPLE", "HeldOutGradients", "held_out_gradients", "held_out_loss", "problem_of_loss", "shielded"]

SINGLE_SAMPLE = "that of a single sample, of which BatchNorm can't take statistics"


class HeldOutGradients(NamedTuple):
    """The loss of a held-out batch and its gradients.

    Attributes:
        loss: a scalar, in at least float32.
        gradients: dL/dT, one per weight: zeros where the loss does not depend on it. For a sharded weight it is this
            rank's shard, averaged over the ranks.

    All of them are new tensors, which may be written to.
    """

    loss: Tensor
    gradients: list[Tensor]


@contextmanager
def shielded(
    model: LightningModule, *seeds: int, preserved: Sequence[Tensor] = (), check_values: bool = False
) -> Iterator[None]:
    """Run a block in which ``training_step`` can be called without effect on the run.

    ``nn.Dropout`` modules are off inside. Afterwards, these are as they were before: what ``self.log`` gathers,
    torchmetrics states, all buffers (such as BatchNorm statistics), random numbers, and the training flags. Gradients
    are left to the caller, who uses ``torch.autograd.grad``. Two things are not covered: state in plain Python (a list
    that ``training_step`` appends to, a direct call of ``self.logger.experiment``, a forward hook that counts), and
    writes to trained weights, which raise a warning. A user who does either must pass a ``loss_fn``.

    Args:
        model: the module being trained, in training mode.
        seeds: integers that seed the random numbers inside.
        preserved: other tensors to restore, such as parameters that ``training_step`` writes to itself.
        check_values: whether to detect writes to trained weights through ``.data`` too, which takes time.
    """
    trained = WriteDetector([p for p in model.parameters() if p.requires_grad], check_values=check_values)
    with ExitStack() as stack:
        stack.enter_context(preserve_values(preserved))
        stack.enter_context(isolated_random(*seeds))
        for module in model.modules():
            if isinstance(module, both(LightningModule)):
                stack.enter_context(_attributes(module, log=_ignore, log_dict=_ignore))
            elif isinstance(module, Metric):
                stack.enter_context(_fresh_metric(module))
            elif isinstance(module, _DropoutNd):
                stack.enter_context(_attributes(module, training=False))
            if module._buffers:
                stack.enter_context(preserve_buffers(module))
        yield
    if trained.modified(check_values=check_values):
        rank_zero_warn(
            "`training_step` writes to weights that are trained, and did so in the held-out pass too: pass a `loss_fn`"
            ' that only gives the loss, or `held_out="train"`.'
        )


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take the place of ``self.log`` and ``self.log_dict``."""


@contextmanager
def _attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Set instance attributes, and restore or delete them after the block."""
    saved = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            del module.__dict__[name]
        module.__dict__.update(saved)


@contextmanager
def _fresh_metric(metric: Metric) -> Iterator[None]:
    """Give a metric new, empty states, and restore the old ones after the block."""
    saved = metric.__dict__.copy()
    for name, default in metric._defaults.items():
        fresh: Any = default.detach().clone().to(metric.device) if isinstance(default, Tensor) else []
        metric.__dict__[name] = fresh
    try:
        yield
    finally:
        metric.__dict__.clear()
        metric.__dict__.update(saved)


def held_out_gradients(
    trainer: Trainer,
    batch: Any,
    weights: Sequence[Tensor],
    loss_fn: Callable[[LightningModule, Any], Tensor] | None,
    *seeds: int,
    agree: Callable[[bool], bool] = bool,
    factor: float = 1.0,
    preserved: Sequence[Tensor] = (),
    check_values: bool = False,
) -> HeldOutGradients | str:
    """Return the loss of a held-out batch and its gradients dL/dT, without effect on the run.

    Args:
        trainer: a trainer in its training loop.
        batch: a batch on the model's device.
        weights: parameters that are trained (``requires_grad``).
        loss_fn: takes the module and the batch and returns the loss; None calls ``training_step``.
        seeds: integers that seed the random numbers inside.
        agree: returns True if its argument is True on all ranks. It is called before the backward pass, in which a rank
            may wait for the others.
        factor: what the gradients are multiplied by.
        preserved: other tensors whose values are restored; see :func:`shielded`.
        check_values: see :func:`shielded`.

    Returns:
        The loss and one gradient per weight. If the loss is not a finite scalar, a text that says what it is.
    """
    module = trainer.lightning_module
    shield = shielded(module, *seeds, preserved=preserved, check_values=check_values)
    with shield, isolated_pass(module, weights), torch.enable_grad():
        try:
            loss = held_out_loss(trainer, batch, loss_fn)
            problem = problem_of_loss(loss)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            problem = SINGLE_SAMPLE
        if not agree(not problem):
            return problem or "bad on another rank"
        assert isinstance(loss, Tensor)
        with ExitStack() as stack:
            for weight in weights:
                stack.enter_context(_no_hooks(weight))
            # Without the scale, 16-bit gradients would be 0. Small batches have larger gradients, hence the 1/16.
            scaler = grad_scaler(trainer)
            scale = scaler.get_scale() / 16 if scaler else 1.0
            results = loss_gradients(scale * factor * loss.sum(), weights)
    if any(result is None and weight.grad is not None for weight, result in zip(weights, results, strict=True)):
        rank_zero_warn(
            "The held-out loss gave no gradient for a weight that the training loss gave one for: under activation"
            ' checkpointing use `use_reentrant=False`, or `held_out="train"`.'
        )
    gradients = _without_shared_memory(
        [torch.zeros_like(local_shard(w)) if g is None else g for w, g in zip(weights, results, strict=True)]
    )
    if scale != 1:
        torch._foreach_div_(gradients, scale)
    return HeldOutGradients(at_least_float32(loss.detach().clone()), gradients)


def _without_shared_memory(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients that can be written to: copies of those that share memory with others, or are expanded.

    Autograd gives the same tensor for both weights of a sum, an expanded one for a weight that is summed up, and views
    with gaps for weights that are concatenated, which collectives do not take.
    """
    found, known = [], set[int]()
    for gradient in gradients:
        storage = gradient.untyped_storage()
        is_dense = gradient.stride() == torch.empty_like(gradient, device="meta").stride()
        found.append(gradient if is_dense and storage._cdata not in known else gradient.clone())
        known.add(storage._cdata)  # not the address of the data, which not every device tells
    return found


def held_out_loss(trainer: Trainer, batch: Any, loss_fn: Callable[[LightningModule, Any], Tensor] | None) -> Any:
    """Return what ``training_step``, or the user's ``loss_fn``, gives as the loss of a batch."""
    module = trainer.lightning_module
    with trainer.precision_plugin.train_step_context():  # past the strategy: DDP would wait for a backward
        arguments = [] if loss_fn else training_step_arguments(trainer, batch)
        output: Any = loss_fn(module, batch) if loss_fn else module.training_step(*arguments)
    return output.get("loss") if isinstance(output, Mapping) else output


def problem_of_loss(loss: Any, *, may_overflow: bool = False) -> str:
    """Return what is wrong with a loss; empty if nothing is.

    Args:
        loss: what ``training_step`` or ``loss_fn`` gives as the loss.
        may_overflow: whether it may be infinite or NaN.
    """
    if not isinstance(loss, Tensor):
        return f"{'None' if loss is None else 'of type ' + type(loss).__name__}, not a tensor"
    if loss.numel() != 1:
        return f"of shape {tuple(loss.shape)}, not a scalar"
    if not may_overflow and not math.isfinite(loss.item()):
        return f"{loss.item()}, not finite"
    return "" if loss.requires_grad else "without a gradient: it does not depend on the model's weights"


@contextmanager
def _no_hooks(weight: Tensor) -> Iterator[None]:
    """Run a block without the user's gradient hooks on a weight (``wandb.watch`` sets some)."""
    hooks = weight._backward_hooks
    weight._backward_hooks = None
    try:
        yield
    finally:
        weight._backward_hooks = hooks
