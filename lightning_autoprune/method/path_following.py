"""Keeping the density on its path to the target while pruning. Torch only.

The pressure μ does the work: it weighs little on a weight that the loss is sensitive to. It answers late, though. Where
the density has left its path by more than 2%, the masks are h(M - θ) until the next step, with the threshold θ at which
the density is on the path.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.pressure_controller import PressureController
from lightning_autoprune.method.schedule import make_schedule
from lightning_autoprune.method.settings import Settings

__all__ = ["PathFollower"]

_TOLERANCE = 0.02  # by how much, relative to the path, the density may leave it before a threshold brings it back

_THRESHOLD_STEPS = 40  # a run of so many auxiliary steps is too short for the pressure: the threshold prunes instead


class PathFollower:
    """Moves the pressure, and the masks where that is not enough, so that the density follows a path to the target.

    Args:
        settings: how to prune.

    Attributes:
        target: the density to reach, in (0, 1]; None: the pressure is constant, and nothing is followed.
        first_density: the density when pruning begins, less than 1 if some weights are 0 already.

    Example:
        >>> import torch
        >>> auxiliary = AuxiliaryParameters({"layer": torch.linspace(1, 2, 1000)})
        >>> follower = PathFollower(Settings(target_sparsity=0.75))
        >>> follower.follow(auxiliary, [0], progress=0.5, steps=100)
        >>> abs(auxiliary.density / follower.path_density(0.5) - 1) < 0.02
        True
    """

    def __init__(self, settings: Settings) -> None:
        self.target = settings.target_density
        self.first_density = 1.0
        self._highest_density = 1.0  # that the path may ask for; less than 1 after resuming with another length
        self._path = make_schedule(settings.schedule)
        self._controller = PressureController(settings.pressure, gain=min(0.05 * settings.mask_every_n_steps, 0.5))

    @property
    def mu(self) -> float:
        """The pressure μ now."""
        return self._controller.mu

    def path_density(self, progress: float) -> float:
        """Return the density that should have been reached when so much of the pruning phase is over, in [0, 1]."""
        assert self.target is not None
        return min(self._path(progress, self.first_density, self.target), self._highest_density)

    def follow(self, auxiliary: AuxiliaryParameters, layers: Collection[int], progress: float, steps: float) -> None:
        """Answer to the density that M has led to: with the pressure, and with a threshold if it is far off its path.

        The pressure answers to the density at the threshold 0, so that θ falls back to 0. A short run leaves it no time
        for that, so M moves by a share of θ: min((40 / K)², 1) in a run of K auxiliary steps. If only some layers were
        stepped, their M moves by all of θ. With single weights, both
        look at the layers whose M was stepped, and leave out those that are not trained now.

        Args:
            auxiliary: the auxiliary parameters, with masks h(M).
            layers: numbers of the layers whose M was stepped.
            progress: how much of the pruning phase is over, in [0, 1].
            steps: K, the number of auxiliary steps in the run.
        """
        path, ordered = self.path_density(progress), sorted(layers)
        self._controller.update(auxiliary.density_of(ordered), path)
        if abs(self._controller.error) > _TOLERANCE:
            are_all = len(ordered) == len(auxiliary.weights)
            share = min((_THRESHOLD_STEPS / steps) ** 2, 1.0) if are_all else 1.0
            auxiliary.approach(path, ordered, share)

    def stay_below(self, density: float) -> None:
        """Let the path ask for no higher density from now on."""
        self._highest_density = min(self._highest_density, density)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {
            "pressure": (self.mu, self._controller.error),
            "first_density": self.first_density,
            "highest_density": self._highest_density,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if self.target is not None:  # otherwise the pressure is that of the settings
            self._controller.mu, self._controller.error = state["pressure"]
        self.first_density = state.get("first_density", 1.0)  # older files lack it, and the next
        self._highest_density = state.get("highest_density", 1.0)
