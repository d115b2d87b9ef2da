"""The shield: one more forward pass inside the training loop that leaves no trace in the user's run."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torchmetrics import Metric

from lightning_autoprune.method.update_rules import at_least_float32
from lightning_autoprune.tensors.preserve import preserve_buffers, preserve_values
from lightning_autoprune.tensors.random_state import isolated_random
from lightning_autoprune.tensors.sharding import isolated_pass, local_shard, loss_gradients
from lightning_autoprune.tensors.write_detector import WriteDetector
from lightning_autoprune.training.lightning_internals import grad_scaler

__all__ = ["held_out_gradients", "shielded"]


@contextmanager
def shielded(
    model: LightningModule, *seeds: int, kept: Sequence[Tensor] = (), thorough: bool = False
) -> Iterator[None]:
    """Runs a block in which a ``training_step`` can be called without effect on the run.

    ``nn.Dropout`` modules are off inside. Afterwards, as before: what ``self.log`` gathers, torchmetrics states, all
    buffers (BatchNorm statistics among them), random numbers, and the training flags. Gradients are the caller's care:
    use ``torch.autograd.grad``. Not covered is what plain Python keeps (a list that ``training_step`` appends to, a
    direct call of ``self.logger.experiment``, a forward hook that counts), nor what is written to trained weights,
    which is warned about; who does that passes a ``loss_fn``.

    Args:
        model: the module being trained, in training mode.
        seeds: integers that seed the random numbers inside.
        kept: other tensors that are put back, such as parameters that ``training_step`` writes to itself.
        thorough: whether to see what is written to trained weights through ``.data`` too, which takes time.
    """
    detector = WriteDetector([p for p in model.parameters() if p.requires_grad], check_values=thorough)
    with ExitStack() as stack:
        stack.enter_context(preserve_values(kept))
        stack.enter_context(isolated_random(*seeds))
        for module in model.modules():
            if isinstance(module, LightningModule):
                stack.enter_context(_attributes(module, log=_nothing, log_dict=_nothing))
            elif isinstance(module, Metric):
                stack.enter_context(_fresh_metric(module))
            elif isinstance(module, _DropoutNd):
                stack.enter_context(_attributes(module, training=False))
            if module._buffers:
                stack.enter_context(preserve_buffers(module))
        yield
    if detector.modified(check_values=thorough):
        rank_zero_warn(
            "`training_step` writes to weights that are trained, and did so in the held-out pass too: pass a `loss_fn`"
            ' that only gives the loss, or `held_out="train"`.'
        )


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of ``self.log`` and ``self.log_dict``."""


@contextmanager
def _attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Sets instance attributes, and after the block puts back or deletes them."""
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
    """Gives a metric new, empty states, and after the block the old ones."""
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
    kept: Sequence[Tensor] = (),
    thorough: bool = False,
) -> tuple[Tensor, list[Tensor]] | str:
    """The loss of a held-out batch and its gradients dL/dT, without effect on the run.

    Args:
        trainer: a trainer in its training loop.
        batch: a batch on the model's device.
        weights: parameters that are trained (``requires_grad``).
        loss_fn: takes the module and the batch and returns the loss; None calls ``training_step``.
        seeds: integers that seed the random numbers inside.
        agree: makes of whether this loss is good whether those of all ranks are; before the backward pass, in which a
            rank may wait for the others.
        factor: what the gradients are multiplied by.
        kept: tensors whose values are put back, beside what :func:`shielded` does.
        thorough: as of :func:`shielded`.

    Returns:
        The loss and one gradient a weight (zeros where the loss does not depend on it; of sharded weights this rank's
        part of the mean over the ranks), or, where the loss is not a finite scalar, a text that says what it is.
    """
    module = trainer.lightning_module
    with shielded(module, *seeds, kept=kept, thorough=thorough), isolated_pass(module, weights), torch.enable_grad():
        with trainer.precision_plugin.train_step_context():  # past the strategy: DDP would wait for a backward
            output: Any = loss_fn(module, batch) if loss_fn else module.training_step(*_arguments(trainer, batch))
        loss = output.get("loss") if isinstance(output, Mapping) else output
        problem = _problem(loss)
        if not agree(not problem):
            return problem or "bad on another rank"
        assert isinstance(loss, Tensor)
        with ExitStack() as stack:
            for weight in weights:
                stack.enter_context(_no_hooks(weight))
            scaler = grad_scaler(trainer)  # without it 16-bit gradients would be 0; a few rows have larger ones
            scale = scaler.get_scale() / 16 if scaler else 1.0
            results = loss_gradients(scale * factor * loss.sum(), weights)
    if any(result is None and weight.grad is not None for weight, result in zip(weights, results, strict=True)):
        rank_zero_warn(
            "The held-out loss gave no gradient for a weight that the training loss gave one for: under activation"
            ' checkpointing use `use_reentrant=False`, or `held_out="train"`.'
        )
    found = [torch.zeros_like(local_shard(w)) if g is None else g for w, g in zip(weights, results, strict=True)]
    return at_least_float32(loss.detach()), found if scale == 1 else list(torch._foreach_div(found, scale))


def _problem(loss: Any) -> str:
    """What is wrong with a loss; empty if nothing is."""
    if not isinstance(loss, Tensor):
        return f"{'None' if loss is None else 'of type ' + type(loss).__name__}, not a tensor"
    if loss.numel() != 1:
        return f"of shape {tuple(loss.shape)}, not a scalar"
    if not math.isfinite(loss.item()):
        return f"{loss.item()}, not finite"
    return "" if loss.requires_grad else "without a gradient: it does not depend on the model's weights"


@contextmanager
def _no_hooks(weight: Tensor) -> Iterator[None]:
    """Takes the user's gradient hooks off a weight (``wandb.watch`` sets some), and puts them back."""
    hooks = weight._backward_hooks
    weight._backward_hooks = None
    try:
        yield
    finally:
        weight._backward_hooks = hooks


def _arguments(trainer: Trainer, batch: Any) -> list[Any]:
    """What Lightning passes to ``training_step``: the batch, and its index if it is asked for."""
    kwargs = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, trainer.fit_loop.batch_idx)
    return list(kwargs.values())
