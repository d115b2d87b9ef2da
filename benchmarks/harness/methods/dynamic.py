"""SET and RigL: networks that are sparse from the first step, and whose masks move.

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
    """Return how many weights each layer keeps, ``keep`` in all: Erdős–Rényi-Kernel (Evci et al., section 3, (1)).

    The density of a layer is proportional to the sum of its dimensions over their product. A layer that would need more
    weights than it has stays dense, and the other layers share the remaining ones. Largest remainders make the sum
    exact.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if not 0 <= keep <= sum(sizes):
        raise ValueError(f"`keep` is {keep}; it must be from 0 to {sum(sizes)}, the number of weights.")
    dense: set[int] = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        remaining = keep - sum(sizes[i] for i in dense)
        raw = {i: remaining * sum(shapes[i]) / sum(sum(shapes[j]) for j in sparse) for i in sparse}
        too_small = {i for i in sparse if raw[i] > sizes[i]}
        if not too_small:
            break
        dense |= too_small
    counts = [sizes[i] if i in dense else int(raw[i]) for i in range(len(shapes))]
    for i in sorted(sparse, key=lambda i: counts[i] - raw[i])[: keep - sum(counts)]:
        counts[i] += 1
    return counts


class DynamicSparse(Masked):
    """Random masks with a fixed number of weights per layer, which regularly exchange the smallest weights for others.

    Each exchange stays within a layer. The fraction of kept weights that it replaces falls on a cosine from
    ``fraction`` to 0 (Evci et al., section 3, (2)). As in their algorithm 1, a dropped weight may grow again in the
    same exchange; it then keeps its value and its moments. All other grown weights start at 0 with fresh moments in
    Adam.

    This differs from the papers in two ways: the optimizer also steps in the steps of an exchange, and SET has RigL's
    cosine and densities, as in the comparison of Evci et al.

    The masks have the exact number of weights. A grown weight that never gets a gradient (of a dead unit) stays 0, and
    the results count it as pruned.

    Args:
        compression: prunable weights / weights to keep.
        grow: where weights grow, ``"gradient"``: where the loss has the largest gradient in that step (RigL);
            ``"random"``: anywhere (SET).
        fraction: fraction of the kept weights in the first exchange.
        every: number of steps from one exchange to the next.
        end: fraction of the run after which the masks are final.
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
            raise ValueError(f"`grow` is {grow!r}; it must be 'gradient' or 'random'.")
        self.grow, self.fraction, self.every, self.seed = grow, fraction, every, seed
        self.gradients: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the first masks."""
        super().on_train_start(trainer, pl_module)
        self.optimizer = trainer.optimizers[0]
        # The seed itself has drawn the initial weights: with the same numbers the masks would depend on them.
        self.generator = torch.Generator().manual_seed(derive_seed(self.seed))
        counts = erk_counts([weight.shape for weight in self.weights], self.target)
        self.masks = [
            top_masks([self._random_scores(w)], count)[0] for w, count in zip(self.weights, counts, strict=True)
        ]
        self.apply()

    @torch.no_grad()
    def on_before_optimizer_step(self, *_: Any) -> None:
        """Zero the gradients of pruned weights for Adam, after storing the dense gradients for RigL's exchange."""
        gradients = [weight.grad for weight in self.weights]
        if self.grow == "gradient" and (self.step + 1) % self.every == 0:
            self.gradients = [gradient.clone() for gradient in gradients]
        for gradient, mask in zip(gradients, self.masks, strict=True):
            gradient.mul_(mask)

    @property
    def exchange_fraction(self) -> float:
        """Return the fraction of the kept weights that an exchange replaces now."""
        return self.fraction / 2 * (1 + math.cos(math.pi * self.progress))

    def after_step(self) -> None:
        """Exchange weights every ``every`` steps, until the masks are final."""
        if self.step % self.every or self.progress == 1:
            return
        masks = []
        for i, (weight, mask) in enumerate(zip(self.weights, self.masks, strict=True)):
            kept = int(mask.sum())
            count = min(round(self.exchange_fraction * kept), mask.numel() - kept)
            [kept_mask] = top_masks([weight.abs().masked_fill(~mask, -1)], kept - count)
            score = self.gradients[i].abs() if self.grow == "gradient" else self._random_scores(weight)
            [grown] = top_masks([score.masked_fill(kept_mask, -1)], count)
            fresh = grown & ~mask
            weight.data.masked_fill_(fresh, 0)
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[weight][moment].masked_fill_(fresh, 0)
            masks.append(kept_mask | grown)
        self.masks, self.gradients = masks, []

    def _random_scores(self, weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=self.generator)
