"""Ours with parts that were tried and did not become settings of the callback."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_autoprune.method.schedule import target_path
from lightning_autoprune.method.update_rules import AdaptiveRule

from .autoprune import AutoPrune


class LongMemory(AdaptiveRule):
    """The adaptive rule with another memory.

    Args:
        steps: number of auxiliary steps that the running mean squares remember.
    """

    def __init__(self, steps: float) -> None:
        self.steps = steps

    def decay(self, steps: float) -> float:
        """Return the decay, whatever the length of the run."""
        return 1 - 1 / self.steps


class Variant(AutoPrune):
    """``AutoPruneCallback`` with one or more of these parts.

    Args:
        power: power of the path to the target, in place of the package's choice.
        memory: number of auxiliary steps that the running mean squares remember, in place of the package's choice.
        regrowth: fraction of the pruning phase, at its end, without pressure, after 0.8 of the target density.
        distillation: weight of the divergence KL(teacher ‖ network) in the loss once the masks are final. The teacher
            is the network at the end of the dense phase, so no further training is spent on it.
        batchnorm: whether BatchNorm's statistics are taken anew at the end, as means over the training batches.
        options: as of :class:`AutoPrune`.
    """

    def __init__(
        self,
        compression: float | None,
        seed: int = 0,
        power: float | None = None,
        memory: float | None = None,
        regrowth: float = 0.0,
        distillation: float = 0.0,
        batchnorm: bool = False,
        **options: Any,
    ) -> None:
        if power:
            options["schedule"] = functools.partial(target_path, power=power)
        if regrowth:
            options["schedule"] = functools.partial(_overshoot, regrowth=regrowth)
        if memory:
            options["update_rule"] = LongMemory(memory)
        super().__init__(compression, seed, **options)
        self.distillation, self.batchnorm = distillation, batchnorm
        self._teacher: nn.Module | None = None
        self._passed: tuple[Tensor, Tensor] | None = None  # inputs and logits of the step under way

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keep the dense network as the teacher when pruning begins."""
        if self.distillation and self._teacher is None and self.callback._run.pruner.auxiliary is not None:
            self._teacher = copy.deepcopy(pl_module.network).requires_grad_(False)
            pl_module.network.register_forward_hook(self._keep)

    def _keep(self, network: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        self._passed = (inputs[0], logits) if network.training and self.callback._run.pruner.masks_final else None

    def penalty(self, network: nn.Module) -> Tensor | float:
        """Return the divergence from the teacher, in nats."""
        if self._passed is None:
            return 0.0
        inputs, logits = self._passed
        with torch.no_grad():
            aim = self._teacher(inputs).log_softmax(-1)
        found = logits.log_softmax(-1)
        return self.distillation * nn.functional.kl_div(found, aim, reduction="none", log_target=True).sum(-1).mean()

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take BatchNorm's statistics anew."""
        norms = [m for m in pl_module.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if self.batchnorm and norms:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over all batches
            pl_module.network.train()
            for inputs, _ in trainer.train_dataloader:
                pl_module.network(inputs)


def _overshoot(progress: float, start: float, target: float, regrowth: float) -> float:
    """Return a path to 0.8 of the target density, then a density so high that the controller removes the pressure."""
    if progress > 1 - regrowth:
        return 1.0
    return target_path(progress / (1 - regrowth), start, 0.8 * target)
