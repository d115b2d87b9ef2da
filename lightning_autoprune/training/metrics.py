"""What the callback reports: metrics for callbacks and the progress bar, and every layer's curve for the loggers."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.reporting.metric_names import LAYER_SPARSITY, SPARSITY, loggable_names
from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.tensors.bitmasks import pack, unpack
from lightning_autoprune.training.followed_metric import HELD_OUT_LOSS, followed_metric
from lightning_autoprune.training.lightning_internals import drop_metric, set_metrics, steps_done
from lightning_autoprune.training.lightning_package import Trainer

__all__ = ["MetricsReporter"]

_MAX_METRICS_PER_CALL = 900  # MLflow refuses more than 1000, and a large model has more layers


class MetricsReporter:
    """Gathers the figures of a run between two logs, and publishes them.

    These metrics can be monitored by ModelCheckpoint and EarlyStopping:

    * ``autoprune/sparsity`` and ``autoprune/density``, in [0, 1];
    * ``autoprune/compression``: all weights / kept weights;
    * ``autoprune/pressure``: μ;
    * ``autoprune/flops``: operations with the kept weights / all operations, in [0, 1], if the module has an
      ``example_input_array``;
    * ``autoprune/held_out_loss``: mean since the last log, while M is trained on held-out batches.

    The loggers also get two counts since the last log: ``autoprune/pruned``, the weights that were pruned, and
    ``autoprune/revived``, those that came back. With ``log_layers`` they get ``autoprune/layer_sparsity/<layer>`` too.
    No name is the folder of another one: some loggers make a file of each.

    Args:
        names: names of the layers, in the order in which their masks are given.
        log_layers: whether the loggers get the sparsity of every layer.

    Attributes:
        history: the run so far, for its figures.
    """

    def __init__(self, names: Sequence[str] = (), *, log_layers: bool = True) -> None:
        self.history = RunHistory(names)
        self._log_layers = log_layers
        self._loss_sum, self._losses = 0.0, 0
        self._logged_masks: list[Tensor] = []  # the masks at the last log, packed

    def extend(self, weights: Mapping[str, Tensor]) -> None:
        """Set which layers are pruned; some may be new, and in the dense phase some may be left out.

        Args:
            weights: the weights of all layers from now on, in the order in which their masks are given.
        """
        if self._logged_masks:
            before = dict(zip(self.history.names, self._logged_masks, strict=True))
            self._logged_masks = [
                before[name] if name in before else pack(torch.ones(weight.shape, dtype=torch.bool))
                for name, weight in weights.items()
            ]
        self.history.set_layers(list(weights))

    def forget(self, names: Container[str]) -> None:
        """Remove layers that are not pruned any more, in the same way as if they had never been."""
        kept = [i for i, name in enumerate(self.history.names) if name not in names]
        self._logged_masks = [self._logged_masks[i] for i in kept] if self._logged_masks else []
        self.history.set_layers([self.history.names[i] for i in kept])

    def record_held_out_loss(self, loss: float) -> None:
        """Record the loss of a held-out batch."""
        self._loss_sum += loss
        self._losses += 1

    def publish(
        self, trainer: Trainer, density: float, mu: float, flops: float | None = None, *, over: bool = False
    ) -> dict[str, float]:
        """Make the metrics of this moment available to callbacks and the progress bar, and return them.

        Args:
            trainer: the trainer.
            density: fraction of the weights kept.
            mu: the pressure.
            flops: fraction of the operations left, if it is known.
            over: whether the masks are final. The held-out loss is then withdrawn, as it would never change again.
        """
        metrics = {
            SPARSITY: 1 - density,
            "autoprune/density": density,
            "autoprune/compression": 1 / density,
            "autoprune/pressure": mu,
        }
        if flops is not None:
            metrics["autoprune/flops"] = flops
        if self._losses:
            metrics[HELD_OUT_LOSS] = self._loss_sum / self._losses
        elif over:
            drop_metric(trainer, HELD_OUT_LOSS)
        set_metrics(trainer, metrics, progress_bar={"sparsity": metrics[SPARSITY]})
        return metrics

    def measure(self, trainer: Trainer, pruner: Pruner, *, late: bool = False) -> None:
        """Record the metric that is followed, if it has just been measured.

        Args:
            trainer: the trainer, when a validation or a training epoch ends.
            pruner: has the masks with which it was measured.
            late: whether the epoch's hooks, which may have logged it, are over.
        """
        found = followed_metric(trainer, self.history.metric, late=late)
        if found is not None:
            step = steps_done(trainer) - (not trainer.validating)  # a validation comes before its step is counted
            self.history.record_metric(found[0], step, pruner.sparsity, found[1], masks_final=pruner.masks_final)

    def log(
        self,
        trainer: Trainer,
        metrics: dict[str, float],
        layers: Mapping[str, float],
        masks: Iterable[Tensor],
        *,
        remember: bool = False,
    ) -> None:
        """Write to all loggers, and start counting anew.

        Args:
            trainer: the trainer.
            metrics: what :meth:`publish` returned.
            layers: sparsity of every layer, by name.
            masks: True where a weight is kept; empty before pruning starts and if they can't have changed.
            remember: whether the history must record this moment.
        """
        pruned, revived = self._count_changes(masks)
        step, overall = steps_done(trainer), metrics[SPARSITY]
        self.history.record_sparsity(step, list(layers.values()), overall, always=remember)
        metrics = {**metrics, "autoprune/pruned": float(pruned), "autoprune/revived": float(revived)}
        if self._log_layers:
            names = loggable_names(layers)
            metrics |= {f"{LAYER_SPARSITY}/{names[layer]}": value for layer, value in layers.items()}
        items = list(metrics.items())
        for logger in trainer.loggers:
            for start in range(0, len(items), _MAX_METRICS_PER_CALL):
                # by keyword, as Lightning does: a logger's own class may have other names for what comes first
                logger.log_metrics(metrics=dict(items[start : start + _MAX_METRICS_PER_CALL]), step=step)
        self._loss_sum, self._losses = 0.0, 0

    def _count_changes(self, masks: Iterable[Tensor]) -> tuple[int, int]:
        """Return how many weights were pruned and how many came back since the last log, and store the masks."""
        pruned = revived = 0
        packed = []
        for i, mask in enumerate(masks):
            before = torch.ones_like(mask)
            if self._logged_masks:
                before = unpack(self._logged_masks[i], mask.shape).to(mask.device)
            packed.append(pack(mask))
            back = int((mask & ~before).sum())
            pruned, revived = pruned + int((before & ~mask).sum()), revived + back
            self.history.revived[i] += back
        self._logged_masks = packed or self._logged_masks
        return pruned, revived

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {
            "loss": (self._loss_sum, self._losses),
            "before": list(self._logged_masks),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._loss_sum, self._losses = state["loss"]
        self._logged_masks = list(state["before"])
        self.history = RunHistory.from_state_dict(state["history"])
