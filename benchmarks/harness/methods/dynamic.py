"""Sparse from the first step, with masks that move: SET and RigL.

SET: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
network science", 2018. RigL: Evci et al., "Rigging the lottery: making all tickets winners", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_autoprune.tensors.random_state import derive_seed

from .common import Masked, top_masks


def erk_counts(shapes: Sequence[Sequence[int]], keep: int) -> list[int]:
    """Weights to keep in each layer, ``keep`` in all: Erdős–Rényi-Kernel densities (Evci et al., section 3, (1)).

    The density of a layer is proportional to the sum of its dimensions over their product; a layer that would need
    more than all of its weights stays dense, and the others share the rest. Largest remainders make the sum exact.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if not 0 <= keep <= sum(sizes):
        raise ValueError(f"{keep} weights to keep of {sum(sizes)}")
    dense: set[int] = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        left = keep - sum(sizes[i] for i in dense)
        raw = {i: left * sum(shapes[i]) / sum(sum(shapes[j]) for j in sparse) for i in sparse}
        over = {i for i in sparse if raw[i] > sizes[i]}
        if not over:
            break
        dense |= over
    counts = [sizes[i] if i in dense else int(raw[i]) for i in range(len(shapes))]
    for i in sorted(sparse, key=lambda i: counts[i] - raw[i])[: keep - sum(counts)]:
        counts[i] += 1
    return counts


class DynamicSparse(Masked):
    """Random masks of a fixed number of weights per layer; every so often the smallest are exchanged for others.

    Each exchange is within a layer, of a share of its kept weights that falls on a cosine from ``fraction`` to 0
    (Evci et al., section 3, (2)). As in their algorithm 1, a dropped weight is a candidate for growing at once, and
    then it goes on as it was. Other grown weights start at 0 with fresh moments in Adam. Where we differ: the
    optimizer's step is taken in the steps of an exchange too, and SET has RigL's cosine and densities, as in their
    comparison. The masks have the exact number; a grown weight that never gets a gradient (a dead unit) stays 0, and
    the results count it as pruned.

    Args:
        compression: prunable weights / those to keep.
        grow: ``"gradient"`` (RigL): where the loss has the largest gradient in that step; ``"random"`` (SET).
        fraction: of the kept weights, exchanged at first.
        every: steps from one exchange to the next.
        end: fraction of the run that is over when the masks are final.
        seed: of the first masks and of random growth.
    """

    def __init__(
        self,
        compression: float,
        grow: Literal["gradient", "random"] = "gradient",
        fraction: float = 0.5,
        every: int = 50,
        end: float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__(compression, begin=0.0, end=end)
        if grow not in ("gradient", "random"):
            raise ValueError(f"grow={grow!r}")
        self.grow, self.fraction, self.every, self.seed = grow, fraction, every, seed
        self.gradients: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the first masks."""
        super().on_train_start(trainer, pl_module)
        self.optimizer = trainer.optimizers[0]
        self.generator = torch.Generator().manual_seed(
            derive_seed(self.seed)
        )  # the seed itself made the initial weights
        counts = erk_counts([weight.shape for weight in self.weights], self.target)
        self.masks = [top_masks([self._random(w)], count)[0] for w, count in zip(self.weights, counts, strict=True)]
        self.apply()

    @torch.no_grad()
    def on_before_optimizer_step(self, *_: Any) -> None:
        """Hides the gradients of pruned weights from Adam's moments; keeps the dense ones where they are needed."""
        gradients = [weight.grad for weight in self.weights]
        if self.grow == "gradient" and (self.step + 1) % self.every == 0:
            self.gradients = [gradient.clone() for gradient in gradients]
        for gradient, mask in zip(gradients, self.masks, strict=True):
            gradient.mul_(mask)

    @property
    def share(self) -> float:
        """Of the kept weights, to exchange now."""
        return self.fraction / 2 * (1 + math.cos(math.pi * self.progress))

    def after_step(self) -> None:
        """Exchanges weights every so many steps, until the masks are final."""
        if self.step % self.every or self.progress == 1:
            return
        masks = []
        for i, (weight, mask) in enumerate(zip(self.weights, self.masks, strict=True)):
            kept = int(mask.sum())
            count = min(round(self.share * kept), mask.numel() - kept)
            [stay] = top_masks([weight.abs().masked_fill(~mask, -1)], kept - count)
            score = self.gradients[i].abs() if self.grow == "gradient" else self._random(weight)
            [grown] = top_masks([score.masked_fill(stay, -1)], count)
            fresh = grown & ~mask
            weight.data.masked_fill_(fresh, 0)
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[weight][moment].masked_fill_(fresh, 0)
            masks.append(stay | grown)
        self.masks, self.gradients = masks, []

    def _random(self, weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=self.generator)
