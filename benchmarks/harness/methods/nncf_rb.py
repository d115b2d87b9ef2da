"""NNCF's regularization-based sparsity (``nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED``), by its own code."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_autoprune.model.prunable_layers import prunable_weights

from .regularized import Regularized


def load() -> Any:
    """The module nncf, which sends no usage statistics from here.

    Raises:
        ImportError: if it is not installed.
    """
    os.environ.setdefault("NNCF_CI", "1")
    try:
        import nncf
        import nncf.torch.function_hook.pruning.rb.algo
        import nncf.torch.function_hook.pruning.rb.losses
        import nncf.torch.function_hook.pruning.rb.schedulers
        import nncf.torch.function_hook.strip  # needs torchao, which NNCF doesn't require
    except ImportError as error:
        raise ImportError(
            "This method needs nncf 3.4 and torchao, which the extra `nncf` brings:"
            " pip install 'lightning-autoprune[nncf]'"
        ) from error
    return nncf


class Whole(nn.Module):
    """The network as a part of a module: NNCF adds a module to what it wraps, which an ``nn.Sequential`` would call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs."""
        return self.network(inputs)


class NNCFRegularized(Regularized):
    """A Bernoulli mask of a learned logit on each weight; the loss draws the kept share to its schedule.

    The share is that of all layers together, by the masks without noise. The schedule is NNCF's exponential one, which
    is stepped at the beginning of each epoch. At the cut ``nncf.strip`` makes the network plain; exactly the target
    number of weights is kept, those of the largest logits (NNCF's loss leaves a few more or fewer), and fine-tuned.

    Args:
        compression: prunable weights / those to keep.
        p: of NNCF's loss, ((kept share - its target) / p)².
        mask_lr: learning rate of the logits at the start; None: the task's.
        ramp: fraction of the run after which the schedule has its last ratio.
        end: fraction of the run that is over at the cut.
    """

    def __init__(
        self, compression: float, p: float = 0.05, mask_lr: float | None = 0.05, ramp: float = 0.2, end: float = 0.66
    ) -> None:
        super().__init__(compression, 1.0, ramp, end, mask_lr)
        self.p, self.nncf = p, load()

    def prepare(self, network: nn.Module, inputs: Tensor) -> nn.Module:
        """Wraps the network, without its embeddings, which NNCF would prune as well."""
        rb = self.nncf.torch.function_hook.pruning.rb
        self.masks, self.whole = [], Whole(network)
        embeds = any(isinstance(module, nn.Embedding) for module in network.modules())
        self.nncf.prune(
            self.whole,
            mode=self.nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED,
            ignored_scope=self.nncf.IgnoredScope(types=["embedding"]) if embeds else None,
            examples_inputs=inputs[:2],
        )
        modules = rb.algo.get_pruned_modules(self.whole)
        self.partners = [modules[f"{name}.weight"].mask for name in prunable_weights(self.whole)]
        self.loss = rb.losses.RBLoss(self.whole, target_ratio=0.0, p=self.p)
        return self.whole

    def parameters(self, network: nn.Module) -> list[dict[str, Any]]:
        """The masks are a group of their own."""
        return super().parameters(self.whole.network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the schedule, now that the number of epochs is known."""
        super().on_train_start(trainer, pl_module)
        epochs = max(round(self.ramp * int(trainer.max_epochs or 1)), 1)
        schedulers = self.nncf.torch.function_hook.pruning.rb.schedulers
        self.schedule = schedulers.ExponentialRBPruningScheduler(self.loss, 0.0, 1 - 1 / self.compression, epochs)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps the schedule, as NNCF's example does."""
        self.schedule.step()

    def penalty(self, network: nn.Module) -> Tensor | float:
        """NNCF's loss; none after the cut."""
        return 0.0 if self.masks else self.loss()

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Grows with the probability to be kept."""
        return partner

    def settled(self, weight: Tensor, partner: Tensor) -> Tensor:
        """The weight without its mask; ``nncf.strip`` masks the one in place."""
        return weight.clone()

    def unwrap(self) -> None:
        """Takes NNCF's masks off; the weights can be trained again."""
        self.nncf.strip(self.whole, do_copy=False, strip_format=self.nncf.StripFormat.IN_PLACE)
        for weight in self.weights:
            weight.requires_grad_(True)

    def finish(self, network: nn.Module) -> nn.Module:
        """The network as it was given."""
        return self.whole.network
