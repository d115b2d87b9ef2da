"""This package's callback with the settings of the AutoPrune paper, and ours where the paper does not say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_autoprune.method.schedule import Phases

from .autoprune import AutoPrune

STATED: Mapping[str, Any] = {
    "update_rule": "autoprune",
    "pressure": 5e-2,
    "held_out": 0.5,
    "redraw_held_out": False,
    "train_gradients": False,
}
"""What the paper states: its rule, μ, and a fixed 1:1 split into the samples of W and those of M."""

STEP_SIZE = 1.5e-2
"""η of the paper: per auxiliary step, while the callback's ``auxiliary_lr`` is the total of all steps."""

UNSTATED: Mapping[str, Any] = {"initial_m": "constant", "initial_scale": 0.1, "warmup": 0.0, "finetune": 0.35}
"""Our choices where the paper does not say."""


class Paper(AutoPrune):
    """``AutoPruneCallback`` in the paper's setting.

    Args:
        compression: prunable weights / weights to keep; None: no target, as in the paper.
        seed: of the held-out samples.
        step_size: η, how far one auxiliary step moves an m at a gradient of 1.
        options: further arguments of the callback, such as the estimator.
    """

    def __init__(self, compression: float | None, seed: int = 0, step_size: float = STEP_SIZE, **options: Any) -> None:
        super().__init__(compression, seed, **{**STATED, **UNSTATED, **options})
        self.step_size = step_size

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set ``auxiliary_lr`` to the step size times the number of auxiliary steps.

        The number is only known now: the fixed split halves the training loader when fitting starts. The package's
        callback comes after this one in the Trainer, so it begins with the new value.
        """
        settings = self.callback.settings
        phases = Phases.of(int(trainer.estimated_stepping_batches), settings.warmup, settings.finetune)
        steps = (phases.end - phases.start) / settings.mask_every_n_steps
        self.callback.settings = dataclasses.replace(settings, auxiliary_lr=self.step_size * steps)
