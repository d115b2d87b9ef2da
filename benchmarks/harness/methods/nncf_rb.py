"""NNCF's regularization-based sparsity (``nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED``), by NNCF's code."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_autoprune.model.prunable_layers import prunable_weights

from .regularized import Regularized


def import_nncf() -> Any:
    """Import and return nncf, without its usage statistics.

    Raises:
        ImportError: if nncf or torchao is not installed.
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


class NetworkWrapper(nn.Module):
    """Holds the network: NNCF adds a submodule to the module that it prunes, and an ``nn.Sequential`` would call it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the network's outputs."""
        return self.network(inputs)


class NNCFRegularized(Regularized):
    """A Bernoulli mask with a learned logit per weight; a loss term pulls the kept fraction toward a schedule.

    The kept fraction is that of all layers together, by the masks without noise. The schedule is NNCF's exponential
    one, which steps at the beginning of each epoch. At the cut, ``nncf.strip`` makes the network plain. Exactly the
    target number of weights is kept, those with the largest logits (NNCF's loss leaves a few more or fewer), and
    fine-tuned.

    Args:
        compression: prunable weights / weights to keep.
        p: scale in NNCF's loss, ((kept fraction - its target) / p)².
        mask_lr: initial learning rate of the logits; None: the task's.
        ramp: fraction of the run after which the schedule has its last ratio.
        end: fraction of the run after which the network is cut.
    """

    def __init__(
        self, compression: float, p: float = 0.05, mask_lr: float | None = 0.05, ramp: float = 0.2, end: float = 0.66
    ) -> None:
        super().__init__(compression, 1.0, ramp, end, mask_lr)
        self.p, self.nncf = p, import_nncf()

    def prepare(self, network: nn.Module, inputs: Tensor) -> nn.Module:
        """Wrap the network, and exclude its embeddings, which NNCF would prune as well."""
        rb = self.nncf.torch.function_hook.pruning.rb
        self.masks, self.wrapper = [], NetworkWrapper(network)
        has_embeddings = any(isinstance(module, nn.Embedding) for module in network.modules())
        self.nncf.prune(
            self.wrapper,
            mode=self.nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED,
            ignored_scope=self.nncf.IgnoredScope(types=["embedding"]) if has_embeddings else None,
            examples_inputs=inputs[:2],
        )
        modules = rb.algo.get_pruned_modules(self.wrapper)
        self.partners = [modules[f"{name}.weight"].mask for name in prunable_weights(self.wrapper)]
        self.loss = rb.losses.RBLoss(self.wrapper, target_ratio=0.0, p=self.p)
        return self.wrapper

    def parameters(self, network: nn.Module) -> list[dict[str, Any]]:
        """Return the parameters of the network, and the logits as a second group."""
        return super().parameters(self.wrapper.network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the schedule, now that the number of epochs is known."""
        super().on_train_start(trainer, pl_module)
        epochs = max(round(self.ramp * int(trainer.max_epochs or 1)), 1)
        schedulers = self.nncf.torch.function_hook.pruning.rb.schedulers
        self.schedule = schedulers.ExponentialRBPruningScheduler(self.loss, 0.0, 1 - 1 / self.compression, epochs)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedule, as NNCF's example does."""
        self.schedule.step()

    def penalty(self, network: nn.Module) -> Tensor | float:
        """Return NNCF's loss; 0 after the cut."""
        return 0.0 if self.masks else self.loss()

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return the logit, which grows with the probability of being kept."""
        return partner

    def plain_weight(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return a copy of the weight without its mask, since ``nncf.strip`` masks the weight in place."""
        return weight.clone()

    def unwrap(self) -> None:
        """Remove NNCF's masks, and make the weights trainable again."""
        self.nncf.strip(self.wrapper, do_copy=False, strip_format=self.nncf.StripFormat.IN_PLACE)
        for weight in self.weights:
            weight.requires_grad_(True)

    def finish(self, network: nn.Module) -> nn.Module:
        """Return the network without its wrapper."""
        return self.wrapper.network
