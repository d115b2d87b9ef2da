"""One fit under the callback: what is pruned, by which gradients, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_autoprune.errors import AutoPruneError, listed
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.method.settings import Settings
from lightning_autoprune.model.prunable_layers import being_pruned
from lightning_autoprune.reporting.layer_table import LayerSummary, summarize_layers
from lightning_autoprune.tensors.sharding import reshard
from lightning_autoprune.training.auxiliary_steps import AuxiliarySteps
from lightning_autoprune.training.followed_metric import best_values
from lightning_autoprune.training.held_out.sources import HeldOutSource
from lightning_autoprune.training.lightning_internals import owners, steps_done, total_steps, will_step
from lightning_autoprune.training.loggers.figures import log_figures
from lightning_autoprune.training.metrics import MetricsReporter
from lightning_autoprune.training.model_analysis import plan
from lightning_autoprune.training.trainer_checks import check_shards
from lightning_autoprune.training.weight_averages import prune_again, prune_averages

__all__ = ["PruningRun", "warn_of_changes"]


class PruningRun:
    """Prunes a module from the start of its training to the end.

    Args:
        trainer: the trainer.
        module: the module that it trains.
        weights: those that may be pruned, by layer name.
        optimizers: those that train them.
        settings: how to prune.
        source: of the held-out data; it has been started.
        train_gradients: as of the callback.
        loss_fn: as of the callback.
        seed: as of the callback.

    Attributes:
        module: that is trained.
        pruner: the course of the run.
        report: what is logged.
        gradients: those that M follows.
        active: whether training is under way.

    Raises:
        AutoPruneError: if the length of the run can't be known, the target can't be met, or there are no neurons.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        weights: Mapping[str, nn.Parameter],
        optimizers: Sequence[Optimizer],
        settings: Settings,
        source: HeldOutSource,
        train_gradients: bool | None,
        loss_fn: Callable[[LightningModule, Any], Tensor] | None,
        seed: int,
    ) -> None:
        chosen, neurons, self._cost = plan(module, weights, settings)
        if trainer.world_size > 1 and neurons:  # numbered alike on all ranks
            neurons = trainer.strategy.broadcast(neurons).to(module.device)
        self.module, self._source, self._optimizers = module, source, list(optimizers)
        self._trainer = trainer
        self.report = MetricsReporter(list(chosen))
        self.pruner = Pruner(chosen, settings, total_steps(trainer), steps_done(trainer), neurons)
        self.gradients = AuxiliarySteps(
            module, self.pruner, source, self._optimizers, self.report, train_gradients, loss_fn, seed
        )
        self._handles: list[Any] = []
        self._masked: set[int] = set()  # the optimizers whose gradients Lightning's hook has masked
        self._stepping: set[int] = set()  # those whose step is under way, under manual optimization
        self._stepped: set[int] = set()  # those whose hook was called in the training step under way
        self._left_dense: list[str] = []  # of the layers that were thawed too late
        self._no_neurons = [name for name in weights if name not in chosen]

    def start(self, trainer: Trainer) -> None:
        """Enters the phase that the run is in, and hooks into the optimizers."""
        step, phases = self.pruner.step, self.pruner.phases
        if step > phases.start and self.pruner.auxiliary is None:
            rank_zero_warn(
                f"This fit begins after {step} of {phases.total} steps without a state of pruning, which begins after"
                f" {phases.start} and ends after {phases.end}: {max(phases.end - step, 0)} steps are left for it. For"
                " all of them, start a new fit from the weights alone, without `ckpt_path`."
            )
        self.pruner.start()
        if self.pruner.frozen:
            self._source.on_masks_final()
            prune_averages(trainer, self.pruner)
        else:
            being_pruned.update(self.module.modules())
        reshard(self.module)  # the example may have left copies of the weights as they were
        self._hook_into(self._optimizers)

    def _hook_into(self, optimizers: Sequence[Optimizer]) -> None:
        for handle in self._handles:
            handle.remove()
        self._optimizers[:] = optimizers
        self._handles = [o.register_step_post_hook(self._after_weight_step) for o in optimizers]
        if not self.module.automatic_optimization:  # a step past Lightning, by `optimizers(use_pl_optimizer=False)`
            self._handles += [o.register_step_pre_hook(self._before_manual_step) for o in optimizers]

    def _follow(self, owned: Mapping[int, Optimizer]) -> None:
        """Hooks into the optimizers that train the weights now, where the user has made new ones."""
        found = {id(owner): owner for weight in self.pruner.weights.values() if (owner := owned.get(id(weight)))}
        if found.keys() - set(map(id, self._optimizers)):
            self._hook_into(list(found.values()))

    def take_in(self, trainer: Trainer, candidates: Mapping[str, nn.Parameter]) -> None:
        """Prunes layers too that have been thawed since, as finetuning callbacks do; warns of those that stay dense.

        Optimizers that have been made anew since are followed.

        Args:
            trainer: the trainer.
            candidates: all weights of the module that may be pruned, trained or not, by layer name.
        """
        owned = owners(trainer)
        self._follow(owned)
        known = [*self.pruner.weights, *self._left_dense, *self._no_neurons]
        for name, weight in candidates.items():
            if name in known or not weight.requires_grad or id(weight) not in owned:
                continue
            try:
                self._check_thawed(trainer, name, weight, owned[id(weight)])
                taken = {n: w for n, w in candidates.items() if n in self.pruner.weights or n == name}
                self.pruner.extend(taken)
                self.report.extend(taken)
            except AutoPruneError as error:
                rank_zero_warn(f"Layer {name!r}, which is thawed now, stays dense. {error}")
                self._left_dense.append(name)

    def _check_thawed(self, trainer: Trainer, name: str, weight: nn.Parameter, owner: Optimizer) -> None:
        """Raises if a layer can't be pruned that has been thawed."""
        if self.pruner.frozen:
            raise AutoPruneError("The masks are final.")
        if self.pruner.neurons:
            raise AutoPruneError("Neurons are found when fitting starts.")
        if owner not in self._optimizers:
            raise AutoPruneError(
                "It has an optimizer of its own, which trained no prunable weight when fitting started."
            )
        if trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy):
            raise AutoPruneError("DDP does not share the gradients of what was frozen when fitting started.")
        check_shards(trainer, {name: weight})

    @property
    def active(self) -> bool:
        """Whether training is under way."""
        return bool(self._handles)

    @property
    def over(self) -> bool:
        """Whether all steps have been taken."""
        return self.pruner.step >= self.pruner.phases.total

    def upcoming(self, trainer: Trainer) -> int | None:
        """The number of the training step that the batch being loaded ends, if an auxiliary step follows it."""
        return self.pruner.step if self.pruner.due and will_step(trainer) else None

    # Each step

    def before_weight_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Masks the gradients before they are clipped; M may need them as they were."""
        if id(optimizer) not in self._stepping:
            self._masked.add(id(optimizer))
            self._mask(trainer, optimizer)

    def _before_manual_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepping.add(id(optimizer))
        if id(optimizer) not in self._masked:
            self._mask(self._trainer, optimizer)

    def _mask(self, trainer: Trainer, optimizer: Optimizer) -> None:
        self.gradients.before_weight_step(trainer, optimizer)
        self.pruner.before_weight_step({id(p) for group in optimizer.param_groups for p in group["params"]})

    def _after_weight_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepping.discard(id(optimizer))
        self._masked.discard(id(optimizer))
        self._stepped.add(id(optimizer))
        self.pruner.after_weight_step()

    def end_step(self, trainer: Trainer, log_is_due: Callable[[int], bool]) -> None:
        """Steps M, updates the masks, moves on to the next phase, and reports.

        Args:
            trainer: the trainer.
            log_is_due: tells whether to log once so many steps are over.
        """
        if len(self._stepped) < len(self._optimizers):  # some optimizers call no hooks
            self.pruner.after_weight_step()
        self._stepped.clear()
        self._masked.clear()
        self._stepping.clear()
        self.gradients.after_weight_step(trainer)
        dense = self.pruner.auxiliary is None
        frozen_now = self.pruner.end_step(self.report.history.look_at)
        if dense and self.pruner.auxiliary is not None:
            self.gradients.warn_of_unused()
        if frozen_now:
            self._finish_pruning(trainer)
        layers = self.pruner.layer_sparsity()
        flops = self._cost.flops_left(layers) if self._cost else None
        metrics = self.report.publish(trainer, 1 - self.pruner.sparsity, self.pruner.mu, flops, over=self.pruner.frozen)
        if frozen_now or log_is_due(self.pruner.step):
            masks = self.pruner.each_mask() if frozen_now or not self.pruner.frozen else ()  # they change no more
            self.report.log(trainer, metrics, layers, masks, remember=frozen_now)

    def _finish_pruning(self, trainer: Trainer) -> None:
        being_pruned.difference_update(self.module.modules())
        self._source.on_masks_final()
        self.report.history.final = steps_done(trainer)
        prune_averages(trainer, self.pruner)
        if self.gradients.last < 0 and self.pruner.phases.end > self.pruner.phases.start:
            rank_zero_warn("No auxiliary step was taken, so the masks follow the weights' magnitude alone: run longer.")

    # What is told of it

    def layers(self) -> list[LayerSummary]:
        """A row for each layer."""
        revived = dict(zip(self.pruner.weights, self.report.history.revived, strict=True))
        return summarize_layers(self.pruner.weights, self._flops(), revived, self.pruner.layer_sparsity())

    def log_figures(self, trainer: Trainer, *, ended: bool = False) -> None:
        """Hands the loggers the figures of the run so far."""
        history = self.report.history
        if self.pruner.M:
            history.look_at(self.pruner.M)
        if trainer.is_global_zero:
            best = best_values(trainer, history) if ended else None
            log_figures(trainer, steps_done(trainer), self.layers(), history, best)

    def log_artifact(self, trainer: Trainer) -> None:
        """Hands W&B the best checkpoint that is pruned."""
        if self.pruner.frozen:
            from lightning_autoprune.training.loggers.wandb import log_artifact

            layers = self.pruner.layer_sparsity()
            metadata = {"sparsity": self.pruner.sparsity, "layer_sparsity": layers}
            if self._cost:
                metadata["flops"] = self._cost.flops_left(layers)
            log_artifact(trainer, self.pruner, metadata)

    def _flops(self) -> dict[str, int] | None:
        return {name: self._cost.flops_of(name) for name in self._cost.layers} if self._cost else None

    # The end

    def end(self) -> None:
        """Writes the zeros once more, which what other callbacks do when fitting ends may have overwritten."""
        prune_again(self.pruner)

    def release(self) -> None:
        """Lets go of the module and the optimizers; what has been pruned stays pruned."""
        being_pruned.difference_update(self.module.modules())
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the weights, the optimizer and the loops; plain types and tensors."""
        return {
            "layers": list(self.pruner.weights),
            "settings": self.pruner.described(),
            "left_dense": list(self._left_dense),
            "source": self._source.description,
            "gradients": self.gradients.state_dict(),
            "pruner": self.pruner.state_dict(),
            "report": self.report.state_dict(),
            "held_out": self._source.state_dict(),
            "flops": self._flops(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, before :meth:`start`.

        Raises:
            AutoPruneError: if it was made for other layers, shapes or held-out data.
        """
        self._left_dense = list(state["left_dense"])
        self.pruner.load_state_dict(state["pruner"])
        if list(state["layers"]) != list(self.pruner.weights):  # neurons are numbered in the order of the layers
            raise AutoPruneError(
                f"The checkpoint's pruning state is for other layers: {listed(state['layers'])} there, and"
                f" {listed(self.pruner.weights)} here. Build the same model with the same `include` and `exclude`, or"
                " start from its weights alone."
            )
        if self.pruner.auxiliary:
            warn_of_changes(state["settings"], self.pruner.described(), self.pruner.frozen)
        self.report.load_state_dict(state["report"])
        self.gradients.load_state_dict(state["gradients"])
        if self.pruner.frozen:
            return
        if self._source.description != state["source"]:
            raise AutoPruneError(
                f"The checkpoint's run held out {state['source']}; this callback holds out {self._source.description}."
                " Resume with the same `held_out`, `redraw_held_out` and `seed`, or start from the checkpoint's weights"
                " alone."
            )
        self._source.load_state_dict(state["held_out"])

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave in the middle of the run, on weights of the same moment.

        Raises:
            AutoPruneError: as :meth:`load_state_dict`; if the masks are final here and were not then.
        """
        auxiliary = state["pruner"]["auxiliary"]
        if self.pruner.frozen and not (auxiliary and auxiliary["frozen"]):
            raise AutoPruneError(
                "A checkpoint of an earlier phase can't be restored while the masks are final: stop this fit, and pass"
                " the checkpoint to a new one as `ckpt_path`."
            )
        self.load_state_dict(state)


def warn_of_changes(saved: Mapping[str, Any], here: Mapping[str, Any], frozen: bool) -> None:
    """Warns of settings that differ from those of the checkpoint.

    Args:
        saved: the settings of the checkpoint's run, and its length as ``steps``.
        here: those of this run.
        frozen: whether the masks are final; the length of the run does not matter then.
    """
    names = [name for name in here if saved[name] != here[name] and not (frozen and name == "steps")]
    if not names:
        return
    if frozen:
        what = "Its masks are final, so they stay: to prune anew, start a new fit from its weights alone."
    else:
        what = "The run goes on with the new ones, as far as they still matter."
    changes = ", ".join(f"{name} {saved[name]} (here {here[name]})" for name in names)
    rank_zero_warn(f"The checkpoint's run had other settings: {changes}. {what}")
