"""The course of a run: dense, pruning, fine-tuning. Torch only; a training loop of any kind can drive it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_autoprune.errors import AutoPruneError, quote_names
from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.dense_phase import DensePhase
from lightning_autoprune.method.granularity import GRANULARITIES, Granularity
from lightning_autoprune.method.initialization import InitialM
from lightning_autoprune.method.joining import start_like
from lightning_autoprune.method.neurons import Neurons
from lightning_autoprune.method.path_following import PathFollower
from lightning_autoprune.method.pull import Pull
from lightning_autoprune.method.saved_state import select_layers
from lightning_autoprune.method.schedule import Phases
from lightning_autoprune.method.settings import Settings
from lightning_autoprune.method.update_rules import make_rule
from lightning_autoprune.tensors.sharding import Layout, gather_whole, layout

__all__ = ["Pruner"]


class Pruner:
    """Drives :class:`~lightning_autoprune.method.auxiliary.AuxiliaryParameters` through the phases of a run.

    Call ``start`` first, after ``load_state_dict`` if a run is resumed. Then, in each training step, call
    ``before_forward`` (needed with neurons only), the forward and backward pass, ``before_weight_step``, the
    optimizer's step, ``after_weight_step``, ``auxiliary_step`` if it is ``due`` and there are gradients (it may also
    come before the weight step), and ``end_step``. In the dense phase, ``observe`` takes in gradients while it
    ``observes``, and ``add_loss`` the training loss; without them, M starts by magnitude, and a quarter of the run is
    dense.

    Args:
        weights: the parameters to prune, by layer name; there may be none until ``extend`` gives some.
        settings: how to prune.
        total_steps: length of the run in training steps.
        step: number of steps that are over.
        neurons: the channels to prune in place of single weights; those parameters produce and read them.

    Attributes:
        weights: the parameters to prune, by layer name.
        layouts: their layouts when they were taken in.
        step: number of training steps that are over.
        auxiliary: the auxiliary parameters; None in the dense phase.
        dense_phase: when pruning begins, and what is measured before it does.

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
        self.settings, self.step, self.neurons = settings, step, neurons
        self._set_weights(weights)
        self.dense_phase = DensePhase(total_steps, step, settings.warmup, settings.finetune)
        self.auxiliary: AuxiliaryParameters | None = None
        self._follower = PathFollower(settings)
        self._pull = Pull(settings.pull, settings.target_density or 1.0)
        self._stepped_layers: set[int] = set()  # those whose M was stepped in the training step under way
        self._check_target(self.weights)

    def start(self) -> None:
        """Enter the phase that the run is in."""
        self._enter_phase()

    def extend(self, weights: Mapping[str, Tensor]) -> None:
        """Take in weights that are trained from now on. Those that are pruned already are left unchanged.

        With a target, the new weights start at the present density, those of the largest magnitude kept: a dense layer
        would raise the pressure, and the others would be pruned far beyond the target to make up for it.

        Args:
            weights: all weights, by layer name, in the order that they will have.

        Raises:
            AutoPruneError: if the target can't be met with them. In that case nothing is changed.
        """
        assert self.can_extend, "channels are found when fitting starts"
        assert self.step < self.phases.end, "final masks do not change"
        self._check_target(weights)
        if self.step >= self.phases.start:
            new = {name: weight for name, weight in weights.items() if name not in self.weights}
            by_magnitude = self.auxiliary and self._follower.target is not None
            joining = self._attach(new, "magnitude" if by_magnitude else self.settings.initial_m)
            if self.auxiliary is None:
                self.auxiliary = joining
            else:
                if by_magnitude:
                    self.auxiliary.absorb_threshold()
                    start_like(joining, self.auxiliary)
                self.auxiliary.join(joining, list(weights))
        self._set_weights(weights)

    def replace(self, weights: Mapping[str, Tensor], *, ended: bool = False) -> None:
        """Go on with other tensors in place of the weights, and keep their masks, M, dormant values and averages.

        Pruned weights are 0 in the new tensors from the next :meth:`after_weight_step` on.

        Args:
            weights: the weight of each layer from now on, in the shapes and the order of now; dtypes and devices may be
                others. A layer that is missing is forgotten.
            ended: whether no more steps will be taken.

        Raises:
            AutoPruneError: if there are steps to come, and the target can't be met with the layers that are left, or a
                layer is missing while channels are being pruned.
        """
        assert all(weight.shape == self.layouts[name].shape for name, weight in weights.items()), "other shapes"
        if (missing := self.layouts.keys() - weights.keys()) and not ended:
            self._check_forgetting(missing, weights)
        if self.neurons:
            self.neurons = self.neurons.select(weights)
        if self.auxiliary and not weights:
            self.auxiliary = None
        elif self.auxiliary and {name: layout(weight) for name, weight in weights.items()} == self.layouts:
            self.auxiliary.weights = dict(weights)
        elif self.auxiliary:
            replicated = self.auxiliary.granularity.replicated
            state = select_layers(self.auxiliary.state_dict(), weights, units_by_layer=not replicated)
            self.auxiliary = self._attach(weights, None)
            self.auxiliary.load_state_dict(state)
        self._set_weights(weights)

    def _check_forgetting(self, missing: Collection[str], weights: Mapping[str, Tensor]) -> None:
        """Raise if the run can't go on without some layers."""
        if self.masks_final:
            return
        if not self.can_extend:
            raise AutoPruneError(
                f"The weights of {quote_names(sorted(missing))} were replaced or removed during the run. Neurons are"
                ' found when fitting starts: change the model before that, or use `granularity="weight"`.'
            )
        if weights:
            self._check_target(weights)

    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.layouts: dict[str, Layout] = {name: layout(weight) for name, weight in weights.items()}

    def leave_dense(self, names: Container[str]) -> None:
        """Stop counting some of the weights as prunable, in the dense phase."""
        assert self.can_extend, "channels are found when fitting starts"
        assert self.auxiliary is None, "pruning has begun"
        self._set_weights({name: weight for name, weight in self.weights.items() if name not in names})

    def can_meet_target(self, names: Container[str]) -> bool:
        """Return True if some of the weights, one at least, can meet the target without the others."""
        weights = {name: weight for name, weight in self.weights.items() if name in names}
        try:
            self._check_target(weights)
        except AutoPruneError:
            return False
        return bool(weights)

    def _check_target(self, weights: Mapping[str, Tensor]) -> None:
        if self._follower.target is not None and weights:
            self._make_granularity().check_density(weights, self._follower.target, self.settings.layer_floor)

    @property
    def phases(self) -> Phases:
        """The phases of the run, as far as they are known: pruning may still begin earlier."""
        return self.dense_phase.phases

    @property
    def mu(self) -> float:
        """The pressure μ now."""
        return self._follower.mu

    @property
    def masks_final(self) -> bool:
        """True once the masks do not change any more."""
        if self.auxiliary is None:
            return not self.weights and self.step >= self.phases.end  # the layers were removed from the model
        return self.auxiliary.masks_final

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
        # counted from the planned start, which loaders that ask ahead of time know
        return is_pruning and (step - self.dense_phase.late_start + 1) % self.settings.mask_every_n_steps == 0

    @property
    def observes(self) -> bool:
        """True if the gradients of the training step under way decide about the M that pruning starts with."""
        wanted = self.settings.initial_m == "fisher" and self._prunes_single_weights
        return wanted and self.auxiliary is None and self.dense_phase.observes(self.step)

    def observe(self, dL_dT: Mapping[str, Tensor]) -> None:
        """Take in gradients of the dense phase, by layer name, before the weight step; see :attr:`observes`.

        Args:
            dL_dT: this rank's shards of the gradients; layers without one are left out. Only their sizes relative to
                each other matter.
        """
        self.dense_phase.fisher.add(dL_dT)

    def add_loss(self, loss: Tensor) -> None:
        """Take in the training loss of a batch, which may decide when pruning begins."""
        self.dense_phase.add_loss(self.step, loss)

    def before_forward(self) -> None:
        """Prepare the weights for passes whose gradients M follows; needed with neurons only.

        In these passes the weights that produce pruned channels have values, which change no output: without them the
        channels would get no gradient and never come back.
        """
        if self.auxiliary:
            self.auxiliary.before_forward()

    def after_backward(self) -> None:
        """Undo :meth:`before_forward` if no weight step follows, as while gradients are accumulated."""
        if GRANULARITIES[self.settings.granularity].prunes_channels:
            self.after_weight_step()

    @property
    def enters_phase(self) -> bool:
        """True if the end of the training step under way begins the pruning, or makes the masks final."""
        return self.step + 1 in (self.phases.start, self.phases.end)

    def before_weight_step(self, stepped: Container[int] | None = None, gradient_scale: float = 1.0) -> None:
        """Mask the gradients, and add the pull. Call it before they are clipped: their norm should be that of the step.

        Args:
            stepped: the ``id`` of each parameter that the coming step trains; None: all of them.
            gradient_scale: the factor of a gradient scaler that is still in the gradients.
        """
        if self.auxiliary:
            self.auxiliary.mask_gradients(stepped)
        if self.step < self.phases.end and self.phases.start < self.phases.total:
            self._pull.add_to_gradients(self.weights, stepped, gradient_scale)

    def after_weight_step(self) -> None:
        """Set pruned weights back to 0, after each optimizer step."""
        if self.auxiliary:
            self.auxiliary.after_weight_step()

    def pruned_are_zero(self) -> bool:
        """Return True if all pruned weights are 0 on this rank: nothing else has written to them."""
        return self.auxiliary is None or self.auxiliary.pruned_are_zero()

    def auxiliary_step(self, dL_dT: Sequence[Tensor | None]) -> bool:
        """Step M on one unmasked gradient per weight; return False if a gradient is not finite.

        A weight without a gradient (None), because it is not trained now, keeps its M.
        """
        assert self.auxiliary is not None, "no auxiliary step in the dense phase: see `due`"
        taken = self.auxiliary.step(dL_dT, self._step_size, self.mu)
        if taken:
            self._stepped_layers.update(i for i, gradient in enumerate(dL_dT) if gradient is not None)
        return taken

    @property
    def _step_size(self) -> float:
        """η of each auxiliary step: its share of ``auxiliary_lr``, or less in a short run."""
        steps = self._number_of_auxiliary_steps
        reach = make_rule(self.settings.update_rule).reach(steps) if self._prunes_single_weights else 1.0
        return self.settings.auxiliary_lr / steps * reach

    @property
    def _prunes_single_weights(self) -> bool:
        return GRANULARITIES[self.settings.granularity].prunes_single_weights

    @property
    def _number_of_auxiliary_steps(self) -> float:
        return max(self.phases.end - self.phases.start, 1) / self.settings.mask_every_n_steps

    def end_step(self, before_forgetting: Callable[[Mapping[str, Tensor]], None] | None = None) -> bool:
        """End a training step: update masks and pressure; return True if the masks became final.

        If M was not stepped, the pressure stays, because it had no effect.

        Args:
            before_forgetting: called with M once, when M is final and before it is forgotten.
        """
        if self.due and self._stepped_layers:
            assert self.auxiliary is not None
            if len(self._stepped_layers) < len(self.weights):  # the others keep their masks
                self.auxiliary.absorb_threshold()
            self.auxiliary.update_masks()
            if self._follower.target is not None:
                progress = self.phases.progress(self.step + 1)
                self._follower.follow(self.auxiliary, self._stepped_layers, progress, self._number_of_auxiliary_steps)
        else:
            self.after_backward()
        self._stepped_layers.clear()
        if self.dense_phase.decides_after(self.step):
            self.dense_phase.decide(self.dense_phase.losses.means())
        self.step += 1
        return self._enter_phase(before_forgetting)

    def _enter_phase(self, before_forgetting: Callable[[Mapping[str, Tensor]], None] | None = None) -> bool:
        if self.auxiliary is None and self.weights and self.step >= self.phases.start:
            self.auxiliary = self._attach(self.weights, self.settings.initial_m)
            self._follower.first_density = self.auxiliary.density
            self.dense_phase.fisher.clear()
        if self.auxiliary is None or self.auxiliary.masks_final or self.step < self.phases.end:
            return False
        if self._follower.target is not None:
            self.auxiliary.meet(self._follower.target)
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
            fisher={name: F for name, w in weights.items() if (F := self.dense_phase.fisher.of(name, w)) is not None},
        )

    def described(self) -> dict[str, Any]:
        """Return the settings and the length of the run, by name, as plain data."""
        return {**self.settings.described(), "steps": self.phases.total}

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs besides the weights."""
        return {
            "step": self.step,
            "total": self.phases.total,
            **self._follower.state_dict(),
            "pull": self._pull.state_dict(),
            "dense_phase": self.dense_phase.state_dict(self.weights),
            "auxiliary": self.auxiliary.state_dict() if self.auxiliary else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, on weights from the same step.

        Raises:
            AutoPruneError: if the state was made for other layers or shapes; names them.
        """
        self.step = state["step"]
        self._follower.load_state_dict(state)
        if "pull" in state:  # older files lack it
            self._pull.load_state_dict(state["pull"])
        self.dense_phase.load_state_dict(state.get("dense_phase", {}), self.step, self.weights)  # older files lack it
        self.auxiliary = None
        if state["auxiliary"] is not None:
            self.auxiliary = self._attach(self.weights, None)
            self.auxiliary.load_state_dict(state["auxiliary"])
            if state.get("total", self.phases.total) != self.phases.total:  # the path is another: don't go back on it
                self._follower.stay_below(self.auxiliary.density)
