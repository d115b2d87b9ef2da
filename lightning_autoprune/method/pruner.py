"""The course of a run: dense, pruning, fine-tuning. Torch only; a training loop of any kind can drive it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.granularity import GRANULARITIES, Granularity
from lightning_autoprune.method.initialization import InitialM
from lightning_autoprune.method.neurons import Neurons
from lightning_autoprune.method.pressure_controller import PressureController
from lightning_autoprune.method.schedule import Phases, make_schedule
from lightning_autoprune.method.settings import Settings
from lightning_autoprune.method.update_rules import make_rule
from lightning_autoprune.tensors.sharding import gather_whole

__all__ = ["Pruner"]


class Pruner:
    """Drives :class:`~lightning_autoprune.method.auxiliary.AuxiliaryParameters` through the phases of a run.

    Call ``start`` first, after ``load_state_dict`` if a run is resumed. Then, in each training step, call
    ``before_weight_step``, the optimizer's step, ``after_weight_step``, ``auxiliary_step`` if it is ``due`` and there
    are gradients (it may also come before the weight step), and ``end_step``.

    Args:
        weights: the parameters to prune, by layer name.
        settings: how to prune.
        total_steps: length of the run in training steps.
        step: number of steps that are over.
        neurons: the channels to prune in place of single weights; those parameters produce and read them.

    Attributes:
        step: number of training steps that are over.
        auxiliary: the auxiliary parameters; None in the dense phase.

    Raises:
        AutoPruneError: if the target can't be met because of the layers' floors.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> pruner = Pruner({"layer": layer.weight}, Settings(target_sparsity=0.75), total_steps=100)
        >>> pruner.start()
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     layer(torch.randn(16, 8)).square().mean().backward()
        ...     if pruner.due:
        ...         _ = pruner.auxiliary_step([layer.weight.grad])
        ...     pruner.before_weight_step()
        ...     _ = optimizer.step()
        ...     pruner.after_weight_step()
        ...     _ = pruner.end_step()
        >>> pruner.sparsity
        0.75
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        settings: Settings,
        total_steps: int,
        step: int = 0,
        neurons: Neurons | None = None,
    ) -> None:
        self.weights, self.settings, self.step, self.neurons = dict(weights), settings, step, neurons
        self.phases = Phases.of(total_steps, settings.warmup, settings.finetune)
        self.auxiliary: AuxiliaryParameters | None = None
        self._controller = PressureController(settings.pressure, gain=min(0.05 * settings.mask_every_n_steps, 0.5))
        self._target, self._path = settings.target_density, make_schedule(settings.schedule)
        self._m_was_stepped = False  # in the training step under way
        self._check_target(self.weights)

    def start(self) -> None:
        """Enter the phase that the run is in."""
        self._enter_phase()

    def extend(self, weights: Mapping[str, Tensor]) -> None:
        """Take in weights that are trained from now on. Those that are pruned already are left unchanged.

        Args:
            weights: all weights, by layer name, in the order that they will have.

        Raises:
            AutoPruneError: if the target can't be met with them, or they give no M to start with. In that case nothing
                is changed.
        """
        assert self.can_extend, "channels are found when fitting starts"
        assert not self.masks_final, "final masks do not change"
        self._check_target(weights)
        if self.auxiliary:
            new = {name: weight for name, weight in weights.items() if name not in self.weights}
            self.auxiliary.join(self._attach(new, self.settings.initial_m), list(weights))
        self.weights = dict(weights)

    def _check_target(self, weights: Mapping[str, Tensor]) -> None:
        if self._target is not None:
            self._make_granularity().check_density(weights, self._target, self.settings.layer_floor)

    @property
    def mu(self) -> float:
        """The pressure μ now."""
        return self._controller.mu

    @property
    def masks_final(self) -> bool:
        """True once the masks do not change any more."""
        return self.auxiliary is not None and self.auxiliary.masks_final

    @property
    def can_extend(self) -> bool:
        """True if weights that are trained later can be pruned too."""
        return GRANULARITIES[self.settings.granularity].can_extend

    @property
    def sparsity(self) -> float:
        """Fraction of all prunable weights that are pruned, in [0, 1)."""
        return self.auxiliary.sparsity if self.auxiliary else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """Return the fraction of each layer's weights that are pruned, in [0, 1), by layer name."""
        return self.auxiliary.layer_sparsity() if self.auxiliary else dict.fromkeys(self.weights, 0.0)

    def masks(self) -> list[Tensor]:
        """Return bool tensors, True where a weight is kept, in the order of the weights; empty in the dense phase.

        Where weights are sharded, call this on all ranks, like :meth:`each_mask` and :attr:`M`.
        """
        return list(self.each_mask())

    def each_mask(self) -> Iterator[Tensor]:
        """Yield the masks one after the other, so that no more than one of them is gathered at a time."""
        masks = self.auxiliary.masks() if self.auxiliary else []
        for mask, weight in zip(masks, self.weights.values(), strict=False):
            yield gather_whole(mask, weight)

    @property
    def M(self) -> Mapping[str, Tensor]:  # noqa: N802
        """The auxiliary parameters by layer name (with neurons, under ``"neurons"``); empty except while pruning."""
        if self.auxiliary is None or self.auxiliary.masks_final:
            return {}
        return self.auxiliary.granularity.named_M(self.auxiliary)

    @property
    def due(self) -> bool:
        """True if an auxiliary step belongs to the training step under way."""
        return self.auxiliary is not None and self.is_due(self.step)

    def is_due(self, step: int) -> bool:
        """Return True if an auxiliary step belongs to a training step, which may lie ahead.

        Args:
            step: number of the steps before it.
        """
        has_begun = self.auxiliary is not None or step >= self.phases.start
        is_pruning = has_begun and step < self.phases.end and not self.masks_final
        return is_pruning and (step - self.phases.start + 1) % self.settings.mask_every_n_steps == 0

    def before_weight_step(self, stepped: Container[int] | None = None) -> None:
        """Mask the gradients. Call it before they are clipped, so that their norm covers only the weights that train.

        Args:
            stepped: the ``id`` of each parameter that the coming step trains; None: all of them.
        """
        if self.auxiliary:
            self.auxiliary.mask_gradients(stepped)

    def after_weight_step(self) -> None:
        """Set pruned weights back to 0, after each optimizer step."""
        if self.auxiliary:
            self.auxiliary.after_weight_step()

    def auxiliary_step(self, dL_dT: Sequence[Tensor | None]) -> bool:
        """Step M on one unmasked gradient per weight; return False if a gradient is not finite.

        A weight without a gradient (None), because it is not trained now, keeps its M.
        """
        assert self.auxiliary is not None, "no auxiliary step in the dense phase: see `due`"
        taken = self.auxiliary.step(dL_dT, self.settings.auxiliary_lr / self._number_of_auxiliary_steps, self.mu)
        self._m_was_stepped = taken and any(gradient is not None for gradient in dL_dT)
        return taken

    @property
    def _number_of_auxiliary_steps(self) -> float:
        return max(self.phases.end - self.phases.start, 1) / self.settings.mask_every_n_steps

    def end_step(self, before_forgetting: Callable[[Mapping[str, Tensor]], None] | None = None) -> bool:
        """End a training step: update masks and pressure; return True if the masks became final.

        If M was not stepped, the pressure stays, because it had no effect.

        Args:
            before_forgetting: called with M once, when M is final and before it is forgotten.
        """
        if self.due:
            assert self.auxiliary is not None
            self.auxiliary.update_masks()
            if self._target is not None and self._m_was_stepped:
                path = self._path(self.phases.progress(self.step + 1), 1.0, self._target)
                self._controller.update(self.auxiliary.density, path)
        self._m_was_stepped = False
        self.step += 1
        return self._enter_phase(before_forgetting)

    def _enter_phase(self, before_forgetting: Callable[[Mapping[str, Tensor]], None] | None = None) -> bool:
        if self.auxiliary is None and self.step >= self.phases.start:
            self.auxiliary = self._attach(self.weights, self.settings.initial_m)
        if self.auxiliary is None or self.auxiliary.masks_final or self.step < self.phases.end:
            return False
        if self._target is not None:
            self.auxiliary.meet(self._target)
        if before_forgetting:
            before_forgetting(self.M)
        self.auxiliary.finalize_masks()
        return True

    def _make_granularity(self) -> Granularity:
        return GRANULARITIES[self.settings.granularity].make(self.neurons)

    def _attach(self, weights: Mapping[str, Tensor], initial_m: InitialM | None) -> AuxiliaryParameters:
        s = self.settings
        return AuxiliaryParameters(
            weights,
            granularity=self._make_granularity(),
            initial_m=initial_m,
            initial_scale=s.initial_scale,
            update_rule=s.update_rule,
            estimator=s.estimator,
            leaky_slope=s.leaky_slope,
            layer_floor=s.layer_floor,
            decay=make_rule(s.update_rule).decay(self._number_of_auxiliary_steps),
        )

    def described(self) -> dict[str, Any]:
        """Return the settings and the length of the run, by name, as plain data."""
        return {**self.settings.described(), "steps": self.phases.total}

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs besides the weights."""
        auxiliary = self.auxiliary.state_dict() if self.auxiliary else None
        return {"step": self.step, "pressure": (self.mu, self._controller.error), "auxiliary": auxiliary}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, on weights from the same step.

        Raises:
            AutoPruneError: if the state was made for other layers or shapes; names them.
        """
        self.step = state["step"]
        if self._target is not None:  # otherwise the pressure is that of the settings
            self._controller.mu, self._controller.error = state["pressure"]
        self.auxiliary = None
        if state["auxiliary"] is not None:
            self.auxiliary = self._attach(self.weights, None)
            self.auxiliary.load_state_dict(state["auxiliary"])
