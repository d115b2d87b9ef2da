"""Unsupported setups raise an error before the first training step, with the reason and the way out."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Net, data, fit, flat, loader, trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelPruning
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from manual_models import ManualNet, TwoOptimizersNet
from torch.distributed.tensor import Shard
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler

from lightning_autoprune import AutoPruneCallback, AutoPruneError
from lightning_autoprune.training.followed_metric import HELD_OUT_LOSS
from lightning_autoprune.training.strategies import support_for


@pytest.fixture(autouse=True)
def restore_process_state():
    """Remove the process group and the environment variables that a refused strategy of several processes leaves."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


class UnsupportedStrategy(Strategy):
    """A strategy that is related to none of those that work."""

    root_device, is_global_zero, world_size, global_rank, local_rank = torch.device("cpu"), True, 1, 0, 0

    def all_gather(self, tensor, group=None, sync_grads=False):
        return tensor

    def barrier(self, name=None):
        """Do nothing."""

    def broadcast(self, obj, src=0):
        return obj

    def model_to_device(self):
        """Do nothing."""

    def reduce(self, tensor, *_, **__):
        return tensor


class TwiceSteppingStrategy(SingleDeviceStrategy):
    def optimizer_step(self, optimizer, closure, model=None, **options):
        super().optimizer_step(optimizer, closure, model, **options)
        return super().optimizer_step(optimizer, closure, model, **options)


class ScalingDDPStrategy(DDPStrategy):
    def backward(self, closure_loss, *args, **options):
        return super().backward(2 * closure_loss, *args, **options)

    def training_step(self, *args, **options):
        return super().training_step(*args, **options)


class LBFGSNet(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class LoaderIteratorNet(Net):
    def training_step(self, dataloader_iter):
        raise AssertionError


class OptimizerPerLayerNet(TwoOptimizersNet):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 0.05) for layer in (self.first, self.last)]


class AveragingAdam(torch.optim.Adam):
    def train(self):
        """Put the trained weights in place."""

    def eval(self):
        """Put the average of the weights in place."""


class ScheduleFreeNet(Net):
    def configure_optimizers(self):
        return AveragingAdam(self.parameters())


class PerturbingSGD(torch.optim.SGD):
    def first_step(self):
        """Move to where the loss is higher."""

    def second_step(self):
        """Move back and descend."""


class SharpnessAwareNet(Net):
    def configure_optimizers(self):
        return PerturbingSGD(self.parameters(), 0.1)


class CustomLoader(DataLoader):
    def __init__(self, path):
        super().__init__(data(), batch_size=8)


class BiasesOnlyNet(Net):
    def configure_optimizers(self):
        return torch.optim.SGD([self.first.bias, self.last.bias], 0.1)


class NoOptimizerNet(Net):
    def configure_optimizers(self):
        return None


class OtherCallback(AutoPruneCallback):
    pass


class UntrainableNet(Net):
    """A model that fails if a training step is taken."""

    def training_step(self, batch):
        raise AssertionError("training started")


UNSUPPORTED = {
    "LBFGS": (AutoPruneCallback(), {"model": LBFGSNet()}, "LBFGS evaluates the loss several times within one step"),
    "dataloader_iter": (
        AutoPruneCallback(),
        {"model": LoaderIteratorNet()},
        "`training_step` of LoaderIteratorNet takes a `dataloader_iter`, so no batch can be held out",
    ),
    "train with two optimizers": (
        AutoPruneCallback(held_out="train"),
        {"model": OptimizerPerLayerNet()},
        "gradients of one optimizer's steps, and 2 optimizers train prunable weights: hold data out instead",
    ),
    "train_gradients with two optimizers": (
        AutoPruneCallback(train_gradients=True, loss_fn=lambda module, batch: batch[0].sum()),
        {"model": OptimizerPerLayerNet()},
        "`train_gradients=True` uses the gradients of one optimizer's steps, and 2 optimizers train prunable",
    ),
    "max_steps with two optimizers": (
        AutoPruneCallback(held_out="train"),
        {"model": TwoOptimizersNet(), "max_steps": 10},
        "whose length is not known: `max_steps` counts the steps of all optimizers. Set `max_epochs`",
    ),
    "max_steps with manual optimization": (
        AutoPruneCallback(held_out="train"),
        {"model": ManualNet(), "max_steps": 10},
        "not known: with manual optimization, `max_steps` counts the optimizer's steps, and a batch may have none",
    ),
    "schedule-free optimizer": (
        AutoPruneCallback(),
        {"model": ScheduleFreeNet()},
        r"AveragingAdam puts weights of its own in place for evaluation \(it has a `train\(\)` and an",
    ),
    "sharpness-aware optimizer": (
        AutoPruneCallback(),
        {"model": SharpnessAwareNet()},
        r"PerturbingSGD evaluates the loss twice within one step \(it has a `first_step\(\)` and a `second_step\(\)",
    ),
    "checkpoint monitors held-out loss": (
        [AutoPruneCallback(), ModelCheckpoint(monitor=HELD_OUT_LOSS)],
        {"enable_checkpointing": True},
        "ModelCheckpoint monitors 'autoprune/held_out_loss', which is logged only while masks are being trained:"
        " not in the dense phase, and not once masks are final. Monitor a metric of your own.$",
    ),
    "early stopping monitors held-out loss": (
        [AutoPruneCallback(), EarlyStopping(HELD_OUT_LOSS)],
        {},
        "EarlyStopping monitors .* and not once masks are final. Monitor a metric of your own, or pass `strict=F",
    ),
    "held-out loss is not logged": (
        [AutoPruneCallback(held_out="train"), EarlyStopping(HELD_OUT_LOSS, strict=False)],
        {},
        "EarlyStopping monitors 'autoprune/held_out_loss', which is not logged with `held_out=\"train\"`: monitor",
    ),
    "custom batch sampler": (
        AutoPruneCallback(redraw_held_out=False),
        {"train": DataLoader(data(), batch_sampler=BatchSampler(SubsetRandomSampler(range(64)), 8, False))},
        "this one has the sampler SequentialSampler and the batch sampler BatchSampler",
    ),
    "loader that cannot be rebuilt": (
        AutoPruneCallback(redraw_held_out=False),
        {"train": CustomLoader("path")},
        "needs a loader that can be rebuilt with other samples, and a CustomLoader can't: Trying to inject custom",
    ),
    "unsupported strategy": (
        AutoPruneCallback(),
        {"strategy": UnsupportedStrategy()},
        r"under UnsupportedStrategy yet: use one device \(`Trainer\(devices=1\)`\), `strategy=\"ddp\"`, or FSDP2 by",
    ),
    "strategy that overrides the optimizer's step": (
        AutoPruneCallback(),
        {"strategy": TwiceSteppingStrategy("cpu")},
        "under TwiceSteppingStrategy, which overrides `optimizer_step` of SingleDeviceStrategy: pruning relies on what",
    ),
    "DDP strategy that overrides the gradients": (
        AutoPruneCallback(),
        {"strategy": ScalingDDPStrategy(), "devices": 1},
        "under ScalingDDPStrategy, which overrides `training_step`, `backward` of DDPStrategy: pruning relies on what",
    ),
    "overfit_batches": (
        AutoPruneCallback(held_out=0.25, redraw_held_out=False),
        {"overfit_batches": 2},
        "`overfit_batches` of the Trainer replaces the sampler",
    ),
    "only biases are trained, with neurons": (
        AutoPruneCallback(granularity="neuron"),
        {"model": BiasesOnlyNet()},
        r"No optimizer trains any of the prunable weights \(first, last\) when fitting starts, and none can be pruned"
        ' later: with `granularity="neuron"`, channels are found when fitting starts',
    ),
    "no optimizer": (
        AutoPruneCallback(),
        {"model": NoOptimizerNet()},
        r"No optimizer trains any of the prunable weights \(first, last\) when fitting starts, .* no optimizer has any",
    ),
    "manual without loss_fn": (
        AutoPruneCallback(),
        {"model": ManualNet()},
        r"ManualNet uses manual optimization: its `training_step` takes .* Pass `loss_fn`, or `held_out=\"train\"`.",
    ),
    "include without a match": (
        AutoPruneCallback(include=["fc*"]),
        {},
        r"`include` has 'fc\*', which matches no layer; there are 'first',",
    ),
    "iterable dataset": (
        AutoPruneCallback(),
        {"train": DataLoader(Stream(), 16)},
        "training data is an IterableDataset.*: pass `held",
    ),
    "fixed split of an iterable dataset": (
        AutoPruneCallback(held_out=0.5, redraw_held_out=False),
        {"train": DataLoader(Stream(), 16)},
        r"training data is an IterableDataset.*: pass `held_out=DataLoader\(...\)`",
    ),
    "batches of one sample": (
        AutoPruneCallback(),
        {"train": loader(batch=1)},
        "`held_out=0.25` of a training batch of 1 sample leaves one side empty: use a larger batch",
    ),
    "fixed split that is empty": (
        AutoPruneCallback(held_out=0.001, redraw_held_out=False),
        {},
        "`held_out=0.001` of 128 training samples holds 0 out and leaves 128 to train on",
    ),
    "empty held-out loader": (
        AutoPruneCallback(held_out=DataLoader(data(3), 16, drop_last=True)),
        {},
        "The held-out loader gives no batches: it is empty, or `drop_last` leaves nothing",
    ),
    "two training loaders": (
        AutoPruneCallback(),
        {"train": [loader(), loader(rows=64)]},
        "There are 2 training loaders, whose batches differ",
    ),
    "no validation data": (
        AutoPruneCallback(held_out="val"),
        {},
        '`held_out="val"` needs validation data, and this fit has none',
    ),
    "ModelPruning": (
        [AutoPruneCallback(), ModelPruning("l1_unstructured", [])],
        {},
        "The Trainer also has Lightning's ModelPruning, which puts its own masks over the same weights: keep one",
    ),
    "two callbacks": (
        [AutoPruneCallback(), OtherCallback()],
        {},
        "The Trainer has two AutoPrune callbacks, which would prune the same",
    ),
    "unknown length": (
        AutoPruneCallback(),
        {"epochs": -1},
        "whose length is not known: set `max_steps` of the Trainer",
    ),
    "target below the floors": (
        AutoPruneCallback(target_sparsity=0.999),
        {},
        "Keeping 0 of 256 weights is not possible",
    ),
}


@pytest.mark.parametrize(("callback", "options", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_setups_are_refused_before_the_first_step(callback, options, message):
    with pytest.raises(AutoPruneError, match=message):
        fit(callback, **{"model": UntrainableNet(), **options})


def test_offloaded_weights_are_refused():
    gpu = ModelParallelStrategy()
    gpu.parallel_devices, gpu.cluster_environment = [torch.device("cuda:0")], LightningEnvironment()
    trainer: Any = SimpleNamespace(strategy=gpu, world_size=2)
    mesh = SimpleNamespace(size=lambda: 2)
    weight: Any = SimpleNamespace(device_mesh=mesh, placements=(Shard(0),), device=torch.device("cpu"))
    with pytest.raises(AutoPruneError, match=r"Layer 'a' is on the cpu, and the model runs on cuda: leave the `CPUOff"):
        support_for(trainer).check_weights(trainer, {"a": weight})
    weight.device = torch.device("cuda:0")
    support_for(trainer).check_weights(trainer, {"a": weight})


class CountingStrategy(SingleDeviceStrategy):
    """A subclass that overrides nothing that pruning relies on."""

    batches = 0

    def batch_to_device(self, *args, **options):
        self.batches += 1
        return super().batch_to_device(*args, **options)

    def process_dataloader(self, dataloader):
        return super().process_dataloader(dataloader)


def test_a_subclass_of_a_supported_strategy_gives_the_same_bits():
    strategy = CountingStrategy("cpu")
    (plain, _), (counting, _) = (fit(AutoPruneCallback(0.8), strategy=s) for s in ("auto", strategy))
    assert torch.equal(flat(plain), flat(counting))
    assert strategy.batches >= 32


def test_the_xla_subclass_is_refused():
    trainer: Any = SimpleNamespace(strategy=object.__new__(SingleDeviceXLAStrategy))
    with pytest.raises(AutoPruneError, match="does not work under SingleDeviceXLAStrategy yet"):
        support_for(trainer)


def test_lightning_refuses_two_callbacks_of_the_same_class():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AutoPruneCallback`"):
        trainer(callbacks=[AutoPruneCallback(), AutoPruneCallback()])
