"""Nothing that can't be pickled hangs on the user's objects, so that workers may be started anew at any time."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import Net, data, fit, loader
from lightning.pytorch import Callback, Trainer
from manual_models import ManualNet
from processes import start
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback

HOOKS = (
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
)


class TestedNet(Net):
    def test_step(self, batch):
        return super().validation_step(batch)


class Pickler(Callback):
    """Pickles and copies the Trainer in every hook."""

    def __init__(self) -> None:
        self.pickled: set[str] = set()
        for hook in HOOKS:
            setattr(self, hook, _Check(hook))

    def __reduce__(self):
        return Callback, ()


class _Check:
    def __init__(self, hook: str) -> None:
        self.hook = hook

    def __call__(self, trainer: Trainer, pl_module, *args, **kwargs) -> None:
        pickler = next(callback for callback in trainer.callbacks if isinstance(callback, Pickler))
        pickler.pickled.add(self.hook)
        clone = pickle.loads(pickle.dumps(trainer))
        assert type(clone.strategy.batch_to_device).__name__ == "method"
        callback, kept = (next(c for c in t.callbacks if isinstance(c, AutoPruneCallback)) for t in (clone, trainer))
        assert (callback.enabled, kept.enabled) == (False, True)
        assert not copy.deepcopy(kept).enabled
        assert type(clone.train_dataloader) is type(trainer.train_dataloader)


SOURCES = {
    "default": {},
    "fraction": {"held_out": 0.5},
    "train": {"held_out": "train"},
    "val": {"held_out": "val"},
    "fixed": {"held_out": 0.25, "redraw_held_out": False},
    "loader": {"held_out": DataLoader(data(16), 4)},
    "local function": {"loss_fn": lambda module, batch: module.training_step(batch)},
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_trainer_can_be_pickled_in_every_hook(name):
    pickler = Pickler()
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.3, **SOURCES[name])
    fit([callback, pickler], val=loader(32, seed=3), train=loader(64), epochs=3)
    assert pickler.pickled == set(HOOKS)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "train"),
    [(Net, DataLoader(list(loader(64)), batch_size=None)), (ManualNet, loader(64))],
    ids=["ready batches", "manual"],
)
def test_the_trainer_can_be_pickled_if_batches_are_split_by_rows_or_not_at_all(kind, train):
    fit([AutoPruneCallback(warmup=0.3), pickler := Pickler()], model=kind(), train=train, val=loader(32), epochs=3)
    assert len(pickler.pickled) >= len(HOOKS) - 1  # manual optimization has one hook less


def test_a_callback_is_itself_again_once_a_fit_is_over():
    callback = AutoPruneCallback(target_sparsity=0.8)
    model, _ = fit(callback)
    assert pickle.loads(pickle.dumps(AutoPruneCallback(0.7))).settings.target_sparsity == 0.7
    assert callback.enabled
    assert torch.count_nonzero(model.first.weight) > 0
    assert copy.copy(callback).enabled


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_started_anew_load_training_and_held_out_batches(method):
    process = start("spawned_workers_run.py", [method])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert "sparsity 0.5" in output


def test_a_callback_with_a_local_function_can_be_pickled_while_the_trainer_tests():
    class Tests(Callback):
        def on_test_start(self, trainer, pl_module):
            assert not pickle.loads(pickle.dumps(trainer.callbacks[0])).enabled

    callback = AutoPruneCallback(target_sparsity=0.8, loss_fn=lambda module, batch: module.training_step(batch))
    model, t = fit([callback, Tests()], model=TestedNet())
    t.test(model, loader(), verbose=False)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(callback)
