"""Hooks around the steps of the optimizers that train prunable weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, update_wrapper
from types import MethodType
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
        self._remove_handles()
        for optimizer in self.optimizers:
            before = partial(self._on_manual_step, optimizer) if self._manual else None
            self._handles += hook_steps(optimizer, before, partial(self._on_after_step, optimizer))
        self._attached = True

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def remove(self) -> None:
        """Remove the hooks, and forget the optimizers."""
        self._remove_handles()
        self._attached, self.optimizers = False, []
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


def hook_steps(optimizer: Any, before: Callable[..., None] | None, after: Callable[..., None]) -> list[Any]:
    """Call functions around each step of an optimizer, and return handles with a method ``remove``.

    Lightning also takes optimizers that are not torch's, or that wrap others. They may have no hooks, or those of the
    optimizer inside, after whose step they move the weights. Their method ``step`` is replaced instead.

    Args:
        optimizer: what Lightning takes for an optimizer.
        before: called before the gradients are used; None: nothing.
        after: called after the weights have moved.
    """
    if "_optimizer_step_post_hooks" in vars(optimizer):
        handles = [optimizer.register_step_post_hook(after)]
        return [optimizer.register_step_pre_hook(before), *handles] if before else handles
    return [HookedStep(optimizer, before or _do_nothing, after)]


class HookedStep:
    """Takes the place of an optimizer's method ``step``, and calls functions before and after it.

    A copy of the optimizer, or a pickled one, has the method of its class.
    """

    def __init__(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> None:
        update_wrapper(self, optimizer.step)  # a scheduler marks the method that it has replaced
        self._optimizer, self._before, self._after = optimizer, before, after
        self._step, self._was_set = optimizer.step, "step" in vars(optimizer)
        optimizer.step = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._before()
        result = self._step(*args, **kwargs)
        self._after()
        return result

    def __reduce__(self) -> Any:
        return _plain_step, (self._optimizer,)

    def remove(self) -> None:
        """Put the method back, unless another one has taken its place meanwhile."""
        self._before, self._after = _do_nothing, _do_nothing
        if vars(self._optimizer).get("step") is not self:
            return
        if self._was_set:
            self._optimizer.step = self._step
        else:
            del self._optimizer.step


def _plain_step(optimizer: Any) -> Any:
    return MethodType(type(optimizer).step, optimizer)


def _do_nothing(*_: Any) -> None:
    """Take the place of the functions once the hooks are removed."""
