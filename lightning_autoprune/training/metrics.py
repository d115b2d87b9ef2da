"""What the callback tells: metrics for callbacks and the progress bar, and every layer's curve for the loggers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.tensors.bitmasks import pack, unpack
from lightning_autoprune.training.followed_metric import HELD_OUT_LOSS, followed_metric
from lightning_autoprune.training.lightning_internals import steps_done

__all__ = ["MetricsReporter"]


class MetricsReporter:
    """Gathers the figures of a run between two logs, and hands them out.

    Metrics (``monitor=`` of ModelCheckpoint and EarlyStopping takes them): ``autoprune/sparsity`` and
    ``autoprune/density`` in [0, 1], ``autoprune/compression`` (all weights per weight kept), ``autoprune/pressure``
    (μ), ``autoprune/flops`` (operations with the weights that are left, / all, in [0, 1]) of a module with an
    ``example_input_array``, and while M is trained on held-out batches ``autoprune/held_out_loss`` (mean since the last
    log).

    The loggers also get ``autoprune/sparsity/<layer>``, and ``autoprune/pruned`` and ``autoprune/revived``: how many
    weights are pruned now that were not at the last log, and the other way round.

    Args:
        names: of the layers, in the order in which their masks are given.

    Attributes:
        history: the run so far, for its pictures.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.history = RunHistory(names)
        self._loss_sum, self._losses = 0.0, 0
        self._before: list[Tensor] = []  # the masks at the last log, packed

    def extend(self, weights: Mapping[str, Tensor]) -> None:
        """Takes in layers that have not been pruned so far.

        Args:
            weights: of all layers from now on, in the order in which their masks are given.
        """
        if self._before:
            before = dict(zip(self.history.names, self._before, strict=True))
            self._before = [
                before[name] if name in before else pack(torch.ones(weight.shape, dtype=torch.bool))
                for name, weight in weights.items()
            ]
        self.history.add_layers(list(weights))

    def held_out_loss(self, loss: float) -> None:
        """Takes the loss of a held-out batch."""
        self._loss_sum += loss
        self._losses += 1

    def publish(
        self, trainer: Trainer, density: float, mu: float, flops: float | None = None, *, over: bool = False
    ) -> dict[str, float]:
        """Makes the metrics of this moment available to callbacks and the progress bar, and returns them.

        Args:
            trainer: the trainer.
            density: fraction of the weights kept.
            mu: the pressure.
            flops: fraction of the operations left, if it is known.
            over: whether M is trained no more, so that the last held-out loss is no news and is taken back.
        """
        metrics = {
            "autoprune/sparsity": 1 - density,
            "autoprune/density": density,
            "autoprune/compression": 1 / density,
            "autoprune/pressure": mu,
        }
        if flops is not None:
            metrics["autoprune/flops"] = flops
        if self._losses:
            metrics[HELD_OUT_LOSS] = self._loss_sum / self._losses
        elif over:
            trainer._logger_connector._callback_metrics.pop(HELD_OUT_LOSS, None)
        _set_metrics(trainer, metrics, progress_bar={"sparsity": metrics["autoprune/sparsity"]})
        return metrics

    def measure(self, trainer: Trainer, pruner: Pruner, *, late: bool = False) -> None:
        """Takes the metric that is followed, if it has just been measured.

        Args:
            trainer: the trainer, when a validation or a training epoch ends.
            pruner: with the masks that it was measured with.
            late: whether the epoch's hooks are over, which may have logged it.
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
        """Writes to all loggers, and starts counting anew.

        Args:
            trainer: the trainer.
            metrics: what :meth:`publish` gave.
            layers: sparsity of every layer, by name.
            masks: True where a weight is kept; empty before pruning starts, and where they have not changed.
            remember: whether this moment is one that the history must have.
        """
        pruned = revived = 0
        packed = []
        for i, now in enumerate(masks):
            packed.append(pack(now))
            before = unpack(self._before[i], now.shape).to(now.device) if self._before else torch.ones_like(now)
            pruned += int((before & ~now).sum())
            back = int((now & ~before).sum())
            revived += back
            self.history.revived[i] += back
        self.history.record_sparsity(
            steps_done(trainer), list(layers.values()), metrics["autoprune/sparsity"], always=remember
        )
        metrics = {**metrics, "autoprune/pruned": float(pruned), "autoprune/revived": float(revived)}
        metrics |= {f"autoprune/sparsity/{name}": value for name, value in layers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=steps_done(trainer))
        self._loss_sum, self._losses = 0.0, 0
        self._before = packed or self._before

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {
            "loss": (self._loss_sum, self._losses),
            "before": list(self._before),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self._loss_sum, self._losses = state["loss"]
        self._before = list(state["before"])
        self.history = RunHistory.from_state_dict(state["history"])


def _set_metrics(trainer: Trainer, metrics: Mapping[str, float], progress_bar: Mapping[str, float]) -> None:
    """Sets metrics past ``self.log``, whose bookkeeping costs about half a millisecond a key and step."""
    connector = trainer._logger_connector
    connector._callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    connector._progress_bar_metrics.update(progress_bar)
