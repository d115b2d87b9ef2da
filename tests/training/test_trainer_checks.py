"""What is refused, with the reason and the way out, before the first training step."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Net, data, fit, loader, trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelPruning
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from test_callback import Manual, TwoOptimizers
from torch.distributed.tensor import Shard
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler

from lightning_autoprune import AutoPruneCallback, AutoPruneError
from lightning_autoprune.training.followed_metric import HELD_OUT_LOSS
from lightning_autoprune.training.strategies import support_for


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A strategy of several processes makes one before the refusal, and tells so in the environment."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


class AnotherStrategy(SingleDeviceStrategy):
    pass


class LBFGS(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Iterating(Net):
    def training_step(self, dataloader_iter):
        raise AssertionError


class OneForEach(TwoOptimizers):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 0.05) for layer in (self.first, self.last)]


class Averaging(torch.optim.Adam):
    def train(self):
        """Puts the weights in place that are trained."""

    def eval(self):
        """Puts their average in place."""


class ScheduleFree(Net):
    def configure_optimizers(self):
        return Averaging(self.parameters())


class Perturbing(torch.optim.SGD):
    def first_step(self):
        """Climbs."""

    def second_step(self):
        """Goes back, and descends."""


class SharpnessAware(Net):
    def configure_optimizers(self):
        return Perturbing(self.parameters(), 0.1)


class OwnLoader(DataLoader):
    def __init__(self, path):
        super().__init__(data(), batch_size=8)


class Biases(Net):
    def configure_optimizers(self):
        return torch.optim.SGD([self.first.bias, self.last.bias], 0.1)


class NoOptimizer(Net):
    def configure_optimizers(self):
        return None


class Other(AutoPruneCallback):
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"held_out": 0.0},
            r'`held_out` is 0.0; it must be a number in \(0, 1\). `held_out` may also be "val", ',
        ),
        ({"held_out": 1.0}, r"`held_out` is 1.0; it must be a number in \(0, 1\)"),
        ({"held_out": 1}, r"`held_out` is 1; it must be a number in \(0, 1\)"),
        ({"held_out": "test"}, "`held_out` is 'test'; allowed are 'val', 'train'"),
        ({"held_out": [1]}, r"`held_out` is \[1\]; it must be a number"),
        ({"log_every_n_steps": 0}, r"`log_every_n_steps` is 0; it must be an integer in \[1, inf\)"),
        ({"log_every_n_steps": 2.5}, r"`log_every_n_steps` is 2.5; it must be an integer in \[1, inf\)"),
        ({"target_sparsity": 1}, r"`target_sparsity` is 1; it must be a number in \[0, 1\)"),
        ({"warmup": 0.5, "finetune": 0.5}, "leave no time to prune"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(options, message):
    with pytest.raises(AutoPruneError, match=message):
        AutoPruneCallback(**options)


class Forgetful(Net):
    """Fails if a single training step is taken."""

    def training_step(self, batch):
        raise AssertionError("training started")


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (AutoPruneCallback(), {"model": LBFGS()}, "LBFGS evaluates the loss several times within one step"),
        (
            AutoPruneCallback(),
            {"model": Iterating()},
            "`training_step` of Iterating takes a `dataloader_iter`, so no batch can be held out",
        ),
        (
            AutoPruneCallback(held_out="train"),
            {"model": OneForEach()},
            "gradients of one optimizer's steps, and 2 optimizers train prunable weights: hold data out instead",
        ),
        (
            AutoPruneCallback(train_gradients=True, loss_fn=lambda module, batch: batch[0].sum()),
            {"model": OneForEach()},
            "`train_gradients=True` uses the gradients of one optimizer's steps, and 2 optimizers train prunable",
        ),
        (
            AutoPruneCallback(held_out="train"),
            {"model": TwoOptimizers(), "max_steps": 10},
            "whose length is not known: `max_steps` counts the steps of all optimizers. Set `max_epochs`",
        ),
        (
            AutoPruneCallback(held_out="train"),
            {"model": Manual(), "max_steps": 10},
            "not known: with manual optimization, `max_steps` counts the optimizer's steps, and a batch may have none",
        ),
        (
            AutoPruneCallback(),
            {"model": ScheduleFree()},
            r"Averaging puts weights of its own in place for evaluation \(it has a `train\(\)` and an",
        ),
        (
            AutoPruneCallback(),
            {"model": SharpnessAware()},
            r"Perturbing evaluates the loss twice within one step \(it has a `first_step\(\)` and a `second_step\(\)",
        ),
        (
            [AutoPruneCallback(), ModelCheckpoint(monitor=HELD_OUT_LOSS)],
            {"enable_checkpointing": True},
            "ModelCheckpoint monitors 'autoprune/held_out_loss', which is logged only while masks are being trained:"
            " not in the dense phase, and not once masks are final. Monitor a metric of your own.$",
        ),
        (
            [AutoPruneCallback(), EarlyStopping(HELD_OUT_LOSS)],
            {},
            "EarlyStopping monitors .* and not once masks are final. Monitor a metric of your own, or pass `strict=F",
        ),
        (
            [AutoPruneCallback(held_out="train"), EarlyStopping(HELD_OUT_LOSS, strict=False)],
            {},
            "EarlyStopping monitors 'autoprune/held_out_loss', which is not logged with `held_out=\"train\"`: monitor",
        ),
        (
            AutoPruneCallback(redraw_held_out=False),
            {"train": DataLoader(data(), batch_sampler=BatchSampler(SubsetRandomSampler(range(64)), 8, False))},
            "this one has the sampler SequentialSampler and the batch sampler BatchSampler",
        ),
        (
            AutoPruneCallback(redraw_held_out=False),
            {"train": OwnLoader("path")},
            "needs a loader that can be rebuilt with other samples, and a OwnLoader can't: Trying to inject custom",
        ),
        (
            AutoPruneCallback(),
            {"strategy": AnotherStrategy("cpu")},
            r"under AnotherStrategy yet: use one device \(`Trainer\(devices=1\)`\), `strategy=\"ddp\"`, or FSDP2 by",
        ),
        (
            AutoPruneCallback(held_out=0.25, redraw_held_out=False),
            {"overfit_batches": 2},
            "`overfit_batches` of the Trainer replaces the sampler",
        ),
        (AutoPruneCallback(include="first"), {}, r"`include` is 'first'; it must be a list of patterns: \['first'\]"),
        (
            AutoPruneCallback(),
            {"model": Biases()},
            r"No optimizer trains any of the prunable weights \(first, last\)",
        ),
        (AutoPruneCallback(), {"model": NoOptimizer()}, "No optimizer trains any of the prunable weights"),
        (
            AutoPruneCallback(),
            {"model": Manual()},
            r"Manual uses manual optimization: its `training_step` takes .* Pass `loss_fn`, or `held_out=\"train\"`.",
        ),
        (
            AutoPruneCallback(include=["fc*"]),
            {},
            r"`include` has 'fc\*', which matches no layer; there are 'first',",
        ),
        (AutoPruneCallback(), {"train": DataLoader(Stream(), 16)}, "training data is an IterableDataset.*: pass `held"),
        (
            AutoPruneCallback(held_out=0.5, redraw_held_out=False),
            {"train": DataLoader(Stream(), 16)},
            r"training data is an IterableDataset.*: pass `held_out=DataLoader\(...\)`",
        ),
        (
            AutoPruneCallback(),
            {"train": loader(batch=1)},
            "`held_out=0.25` of a training batch of 1 sample leaves one side empty: use a larger batch",
        ),
        (
            AutoPruneCallback(held_out=0.001, redraw_held_out=False),
            {},
            "`held_out=0.001` of 128 training samples holds 0 out and leaves 128 to train on",
        ),
        (
            AutoPruneCallback(held_out=DataLoader(data(3), 16, drop_last=True)),
            {},
            "The held-out loader gives no batches: it is empty, or `drop_last` leaves nothing",
        ),
        (
            AutoPruneCallback(),
            {"train": [loader(), loader(rows=64)]},
            "There are 2 training loaders, whose batches differ",
        ),
        (AutoPruneCallback(held_out="val"), {}, '`held_out="val"` needs validation data, and this fit has none'),
        (
            [AutoPruneCallback(), ModelPruning("l1_unstructured", [])],
            {},
            "The Trainer also has Lightning's ModelPruning, which puts its own masks over the same weights: keep one",
        ),
        ([AutoPruneCallback(), Other()], {}, "The Trainer has two AutoPrune callbacks, which would prune the same"),
        (AutoPruneCallback(), {"epochs": -1}, "whose length is not known: set `max_steps` of the Trainer"),
        (AutoPruneCallback(target_sparsity=0.999), {}, "Keeping 0 of 256 weights is not possible"),
    ],
)
def test_what_can_not_work_is_refused_before_the_first_step(callback, options, message):
    with pytest.raises(AutoPruneError, match=message):
        fit(callback, **{"model": Forgetful(), **options})


def test_weights_that_are_offloaded_are_refused():
    gpu = ModelParallelStrategy()
    gpu.parallel_devices, gpu.cluster_environment = [torch.device("cuda:0")], LightningEnvironment()
    trainer: Any = SimpleNamespace(strategy=gpu, world_size=2)
    mesh = SimpleNamespace(size=lambda: 2)
    weight: Any = SimpleNamespace(device_mesh=mesh, placements=(Shard(0),), device=torch.device("cpu"))
    with pytest.raises(AutoPruneError, match=r"Layer 'a' is on the cpu, and the model runs on cuda: leave the `CPUOff"):
        support_for(trainer).check_weights(trainer, {"a": weight})
    weight.device = torch.device("cuda:0")
    support_for(trainer).check_weights(trainer, {"a": weight})


def test_two_callbacks_of_the_same_class_are_refused_by_lightning_itself():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AutoPruneCallback`"):
        trainer(callbacks=[AutoPruneCallback(), AutoPruneCallback()])
