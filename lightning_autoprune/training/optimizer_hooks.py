"""Hooks around the steps of the optimizers that train prunable weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OptimizerHooks"]


class OptimizerHooks:
    """Calls a function before and after each real step of some optimizers.

    With automatic optimization, Lightning's hook calls :meth:`on_before_step` before gradients are clipped. With manual
    optimization, an optimizer may also be stepped without Lightning (``optimizers(use_pl_optimizer=False)``), and only
    torch's own hooks report that.

    Args:
        optimizers: those that train prunable weights.
        manual: True with manual optimization.
        before_step: called with the optimizer before its gradients are used, once per step.
        after_step: called after its step.

    Attributes:
        optimizers: those that are followed now.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        manual: bool,
        before_step: Callable[[Optimizer], None],
        after_step: Callable[[], None],
    ) -> None:
        self.optimizers = list(optimizers)
        self._manual, self._before_step, self._after_step = manual, before_step, after_step
        self._handles: list[Any] = []
        self._attached = False
        self._prepared: set[int] = set()  # the optimizers for which `before_step` was called
        self._stepping: set[int] = set()  # those whose step is under way, with manual optimization
        self._stepped: set[int] = set()  # those that have stepped in the training step under way

    @property
    def attached(self) -> bool:
        """True between :meth:`attach` and :meth:`remove`."""
        return self._attached

    def attach(self) -> None:
        """Register the hooks."""
        self._attached = True
        for handle in self._handles:
            handle.remove()
        self._handles = [o.register_step_post_hook(self._on_after_step) for o in self.optimizers]
        if self._manual:
            self._handles += [o.register_step_pre_hook(self._on_manual_step) for o in self.optimizers]

    def remove(self) -> None:
        """Remove the hooks, and forget the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.optimizers, self._attached = [], [], False
        self._before_step, self._after_step = _do_nothing, _do_nothing  # so that the hooks hold no reference to the run

    def follow(self, weights: Iterable[Tensor], owners: Mapping[int, Optimizer]) -> None:
        """Hook into the optimizers that train the weights now, if the user has made new ones.

        Args:
            weights: the prunable weights.
            owners: the optimizer of each parameter, by the parameter's ``id``.
        """
        found = {id(owner): owner for weight in weights if (owner := owners.get(id(weight)))}
        if found.keys() - set(map(id, self.optimizers)):
            self.optimizers = list(found.values())
            self.attach()

    def on_before_step(self, optimizer: Optimizer) -> None:
        """Handle Lightning's hook ``on_before_optimizer_step``."""
        if id(optimizer) not in self._stepping:
            self._prepared.add(id(optimizer))
            self._before_step(optimizer)

    def _on_manual_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepping.add(id(optimizer))
        if id(optimizer) not in self._prepared:
            self._before_step(optimizer)

    def _on_after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepping.discard(id(optimizer))
        self._prepared.discard(id(optimizer))
        self._stepped.add(id(optimizer))
        self._after_step()

    def end_training_step(self) -> None:
        """End a training step, with a last call of ``after_step`` if an optimizer called no hook."""
        if len(self._stepped) < len(self.optimizers):
            self._after_step()
        self._stepped.clear()
        self._prepared.clear()
        self._stepping.clear()


def _do_nothing(*_: Any) -> None:
    """Take the place of the functions once the hooks are removed."""
