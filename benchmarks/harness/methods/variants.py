"""Ours with parts that were tried and did not become settings of the callback."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_autoprune.method import pruner
from lightning_autoprune.method.schedule import target_path
from lightning_autoprune.method.update_rules import decay_for

from .autoprune import AutoPrune


class Variant(AutoPrune):
    """``AutoPruneCallback`` with one or more of these.

    Args:
        power: of the path to the target, in place of the package's choice.
        memory: number of auxiliary steps that the running mean squares remember, in place of the package's choice.
        regrowth: share of the pruning phase, at its end, with no pressure, after 0.8 of the density asked for.
        distillation: weight of the divergence KL(teacher ‖ network) in the loss once the masks are frozen; the teacher
            is the network as it was at the end of the dense phase, so no further training is spent.
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
        super().__init__(compression, seed, **options)
        self.power, self.memory, self.regrowth = power, memory, regrowth
        self.distillation, self.batchnorm = distillation, batchnorm
        self._teacher: nn.Module | None = None
        self._passed: tuple[Tensor, Tensor] | None = None  # inputs and logits of the step under way

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the path and the memory in place."""
        path = functools.partial(target_path, power=self.power) if self.power else target_path
        if self.regrowth:
            path = functools.partial(_overshoot, regrowth=self.regrowth)
        pruner.target_path = path
        pruner.decay_for = (lambda steps: 1 - 1 / self.memory) if self.memory else decay_for

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keeps the dense network when pruning begins."""
        if self.distillation and self._teacher is None and self.callback._run.pruner.auxiliary is not None:
            self._teacher = copy.deepcopy(pl_module.network).requires_grad_(False)
            pl_module.network.register_forward_hook(self._keep)

    def _keep(self, network: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        self._passed = (inputs[0], logits) if network.training and self.callback._run.pruner.masks_final else None

    def penalty(self, network: nn.Module) -> Tensor | float:
        """The divergence from the teacher, in nats."""
        if self._passed is None:
            return 0.0
        inputs, logits = self._passed
        with torch.no_grad():
            aim = self._teacher(inputs).log_softmax(-1)
        found = logits.log_softmax(-1)
        return self.distillation * nn.functional.kl_div(found, aim, reduction="none", log_target=True).sum(-1).mean()

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the package's own choices back, and takes BatchNorm's statistics anew."""
        pruner.target_path, pruner.decay_for = target_path, decay_for
        norms = [m for m in pl_module.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if self.batchnorm and norms:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over all batches
            pl_module.network.train()
            for inputs, _ in trainer.train_dataloader:
                pl_module.network(inputs)


def _overshoot(progress: float, start: float, target: float, regrowth: float) -> float:
    """To 0.8 of the target density, then so high that the controller takes the pressure away."""
    if progress > 1 - regrowth:
        return 1.0
    return target_path(progress / (1 - regrowth), start, 0.8 * target)
