"""The course of a run: dense, pruning, frozen. Torch only; a training loop of any kind can drive it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.exact_topk import check_count
from lightning_autoprune.method.initialization import InitialM
from lightning_autoprune.method.neurons import NeuronParameters, Neurons
from lightning_autoprune.method.pressure_controller import PressureController
from lightning_autoprune.method.schedule import Phases, target_path
from lightning_autoprune.method.settings import Settings
from lightning_autoprune.method.sharded_auxiliary import ShardedParameters
from lightning_autoprune.method.update_rules import decay_for
from lightning_autoprune.tensors.sharding import WholeTensors, gather_whole, is_sharded

__all__ = ["Pruner"]


class Pruner:
    """Drives :class:`~lightning_autoprune.method.auxiliary.AuxiliaryParameters` through the phases of a run.

    Call ``start`` first, after ``load_state_dict`` where a run is resumed. Then, in each training step:
    ``before_weight_step``, the optimizer's step, ``after_weight_step``, ``auxiliary_step`` where it is ``due`` and
    there are gradients (or before the weight step, on its own), ``end_step``.

    Args:
        weights: the parameters to prune, by layer name.
        settings: how.
        total_steps: length of the run in training steps.
        step: number of steps that are over.
        neurons: the channels to prune in place of single weights, made and read by those parameters.

    Attributes:
        step: number of training steps that are over.
        auxiliary: the auxiliary parameters; None in the dense phase.

    Raises:
        AutoPruneError: if the target can't be met with what the layers' floors keep.

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
        self._target = settings.target_density
        self._moved = False  # whether M has been stepped in the training step under way
        self._check_target(self.weights)

    def start(self) -> None:
        """Enters the phase that the run is in."""
        self._enter_phase()

    def extend(self, weights: Mapping[str, Tensor]) -> None:
        """Takes in weights that are trained from now on; those that were there stay as they are.

        Args:
            weights: all, by layer name, in the order that they will have.

        Raises:
            AutoPruneError: if the target can't be met with them, or they give no M to start with. Nothing is changed.
        """
        assert self.neurons is None, "channels are found when fitting starts"
        assert not self.frozen, "final masks do not change"
        self._check_target(weights)
        if self.auxiliary:
            new = {name: weight for name, weight in weights.items() if name not in self.weights}
            self.auxiliary.join(self._attached(new), list(weights))
        self.weights = dict(weights)

    def _check_target(self, weights: Mapping[str, Tensor]) -> None:
        if self._target is None:
            return
        if self.neurons is not None:
            self.neurons.check_density(self._target, self.settings.layer_floor)
            return
        totals = [weight.numel() for weight in weights.values()]
        check_count(round(self._target * sum(totals)), totals, self.settings.layer_floor)

    @property
    def mu(self) -> float:
        """The pressure μ now."""
        return self._controller.mu

    @property
    def frozen(self) -> bool:
        """Whether the masks are final."""
        return self.auxiliary is not None and self.auxiliary.frozen

    @property
    def sparsity(self) -> float:
        """Fraction of all prunable weights that are pruned, in [0, 1)."""
        return self.auxiliary.sparsity if self.auxiliary else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """Fraction of each layer's weights that are pruned, in [0, 1), by layer name."""
        return self.auxiliary.layer_sparsity() if self.auxiliary else dict.fromkeys(self.weights, 0.0)

    def masks(self) -> list[Tensor]:
        """Bool tensors, True where a weight is kept, in the order of the weights; empty in the dense phase.

        To be called on all ranks where weights are sharded, as :meth:`each_mask` and :attr:`M`.
        """
        return list(self.each_mask())

    def each_mask(self) -> Iterator[Tensor]:
        """The same one after the other, so that no more than one of them is gathered at a time."""
        masks = self.auxiliary.masks() if self.auxiliary else []
        for mask, weight in zip(masks, self.weights.values(), strict=False):
            yield gather_whole(mask, weight)

    @property
    def M(self) -> Mapping[str, Tensor]:  # noqa: N802
        """The auxiliary parameters by layer name (of channels, under ``"neurons"``); empty but while pruning."""
        if self.auxiliary is None or self.auxiliary.frozen:
            return {}
        if self.neurons is not None:
            return {"neurons": self.auxiliary.M[0]}
        return WholeTensors(self.auxiliary.M, self.weights)

    @property
    def due(self) -> bool:
        """Whether an auxiliary step goes with the training step under way."""
        pruning = self.auxiliary is not None and not self.auxiliary.frozen
        return pruning and (self.step - self.phases.start + 1) % self.settings.mask_every_n_steps == 0

    def before_weight_step(self, stepped: Container[int] | None = None) -> None:
        """Masks the gradients; before they are clipped, so that the norm is that of what trains.

        Args:
            stepped: the ``id`` of each parameter that the coming step trains; None: of all.
        """
        if self.auxiliary:
            self.auxiliary.mask_gradients(stepped)

    def after_weight_step(self) -> None:
        """Sets pruned weights back to 0, after each optimizer step."""
        if self.auxiliary:
            self.auxiliary.after_weight_step()

    def auxiliary_step(self, dL_dT: Sequence[Tensor | None]) -> bool:
        """Steps M on one gradient a weight, not masked; tells whether it could (all gradients finite).

        A weight without a gradient (None), as it is not trained now, is left as it is.
        """
        assert self.auxiliary is not None, "no auxiliary step in the dense phase: see `due`"
        taken = self.auxiliary.step(dL_dT, self.settings.auxiliary_lr / self._auxiliary_steps, self.mu)
        self._moved = taken and any(gradient is not None for gradient in dL_dT)
        return taken

    @property
    def _auxiliary_steps(self) -> float:
        return max(self.phases.end - self.phases.start, 1) / self.settings.mask_every_n_steps

    def end_step(self, look: Callable[[Mapping[str, Tensor]], None] | None = None) -> bool:
        """Ends a training step: updates masks and pressure; tells whether the masks were frozen.

        Where M was not stepped the pressure stays as it is, as it had no effect.

        Args:
            look: called with M once, when it is final and before it is forgotten.
        """
        if self.due:
            assert self.auxiliary is not None
            self.auxiliary.update_masks()
            if self._target is not None and self._moved:
                path = target_path(self.phases.progress(self.step + 1), 1.0, self._target)
                self._controller.update(self.auxiliary.density, path)
        self._moved = False
        self.step += 1
        return self._enter_phase(look)

    def _enter_phase(self, look: Callable[[Mapping[str, Tensor]], None] | None = None) -> bool:
        if self.auxiliary is None and self.step >= self.phases.start:
            self.auxiliary = self._attached(self.weights)
        if self.auxiliary is None or self.auxiliary.frozen or self.step < self.phases.end:
            return False
        if self._target is not None:
            self.auxiliary.meet(self._target)
        if look:
            look(self.M)
        self.auxiliary.freeze()
        return True

    def _attached(self, weights: Mapping[str, Tensor], initial: InitialM | None = None) -> AuxiliaryParameters:
        s = self.settings
        options: dict[str, Any] = {
            "initial": initial or s.initial_m,
            "scale": s.initial_scale,
            "rule": s.update_rule,
            "estimator": s.estimator,
            "leaky_slope": s.leaky_slope,
            "layer_floor": s.layer_floor,
            "decay": decay_for(self._auxiliary_steps),
        }
        if self.neurons is not None:
            return NeuronParameters(weights, self.neurons, **options)
        sharded = any(is_sharded(weight) for weight in weights.values())
        return (ShardedParameters if sharded else AuxiliaryParameters)(weights, **options)

    def described(self) -> dict[str, Any]:
        """The settings, and the length of the run, by name."""
        return {**asdict(self.settings), "steps": self.phases.total}

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the weights."""
        auxiliary = self.auxiliary.state_dict() if self.auxiliary else None
        return {"step": self.step, "pressure": (self.mu, self._controller.error), "auxiliary": auxiliary}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, on weights of the same moment.

        Raises:
            AutoPruneError: if the state was made for other layers or shapes; names them.
        """
        self.step = state["step"]
        if self._target is not None:  # else the pressure is the setting's
            self._controller.mu, self._controller.error = state["pressure"]
        self.auxiliary = None
        if state["auxiliary"] is not None:
            self.auxiliary = self._attached(self.weights, "constant")  # all kept, so that no weight is written
            self.auxiliary.load_state_dict(state["auxiliary"])
