"""Optimizers without torch's hooks, which Lightning takes too, are followed like torch's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import Net, fit, held_out_loss, same, saving
from lightning.pytorch import Callback

from lightning_autoprune import AutoPruneCallback, sparsity
from lightning_autoprune.training.optimizer_hooks import hook_steps


class Wrapper:
    """What Lightning's protocol asks of an optimizer, around another one."""

    defaults: dict = {}  # noqa: RUF012
    state: dict = {}  # noqa: RUF012

    def __init__(self, inner):
        self.inner = inner

    @property
    def param_groups(self):
        return self.inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


class DerivedWrapper(Wrapper, torch.optim.Optimizer):
    """A wrapper that is an ``Optimizer`` and does not call its ``__init__``."""

    param_groups = None

    def __init__(self, inner):
        self.inner, self.param_groups = inner, inner.param_groups


class Delegate(Wrapper):
    """A wrapper that has all other attributes of the optimizer inside, its hooks too."""

    def __getattr__(self, name):
        if name == "inner":  # while it is made
            raise AttributeError(name)
        return getattr(self.inner, name)


class Slow(Wrapper):
    """A wrapper that moves the weights itself after the step of the optimizer inside, as lookahead does."""

    def __getattr__(self, name):
        if name == "inner":  # while it is made
            raise AttributeError(name)
        return getattr(self.inner, name)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = self.inner.step(closure)
        for weight in self.param_groups[0]["params"]:
            weight.add_(0.001)
        return loss


class WrappedNet(Net):
    """A model whose optimizer is wrapped; ``manual`` is None, or whether Lightning's wrapper is used."""

    def __init__(self, kind=None, manual=None):
        super().__init__()
        self.kind, self.manual = kind, manual
        self.automatic_optimization = manual is None

    def configure_optimizers(self):
        inner = torch.optim.Adam(self.parameters(), 0.01, weight_decay=0.01)
        return self.kind(inner) if self.kind else inner

    def training_step(self, batch):
        loss = super().training_step(batch)
        if self.manual is None:
            return loss
        optimizer = self.optimizers() if self.manual else self.trainer.optimizers[0]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


class Watch(Callback):
    """Comes before the callback, and records the zeros after each step, and those that the callback reports."""

    def __init__(self, callback):
        self.callback, self.zeros = callback, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.zeros.append((sparsity(pl_module), self.callback.sparsity))
        pickle.dumps(trainer.optimizers[0])


def train(kind, manual=None, **options):
    torch.manual_seed(0)
    callback = AutoPruneCallback(target_sparsity=0.8, loss_fn=held_out_loss, **options)
    watch = Watch(callback)
    model, t = fit([watch, callback], WrappedNet(kind, manual), epochs=6)
    assert all(zeros == reported for zeros, reported in watch.zeros)
    assert sparsity(model) == callback.sparsity == pytest.approx(0.8, abs=0.01)
    return dict(model.state_dict()), t


@pytest.mark.parametrize("held_out", [0.25, "train"])
@pytest.mark.parametrize("manual", [None, True, False], ids=["automatic", "manual", "bare"])
@pytest.mark.parametrize("kind", [Wrapper, DerivedWrapper, Delegate])
def test_a_wrapped_optimizer_prunes_as_the_optimizer_inside(kind, manual, held_out):
    plain, wrapped = train(None, manual, held_out=held_out), train(kind, manual, held_out=held_out)
    assert same(plain[0], wrapped[0])


def test_weights_that_a_wrapper_moves_after_the_step_inside_are_zero_when_its_step_ends():
    train(Slow)


def test_the_method_is_as_before_once_fitting_has_ended():
    _, t = train(Wrapper)
    assert "step" not in vars(t.optimizers[0])


@pytest.mark.parametrize("kind", [Wrapper, DerivedWrapper])
@pytest.mark.parametrize("epoch", [3, 5])
def test_a_run_with_a_wrapped_optimizer_resumes_bit_for_bit(tmp_path, kind, epoch):
    def run(ckpt_path=None):
        callbacks = [AutoPruneCallback(target_sparsity=0.8), saving(str(tmp_path / str(ckpt_path is None)))]
        model, _ = fit(callbacks, WrappedNet(kind), epochs=7, enable_checkpointing=True, ckpt_path=ckpt_path)
        return dict(model.state_dict())

    assert same(run(), run(tmp_path / "True" / f"step={8 * epoch}.ckpt"))


def test_copies_have_the_step_of_the_class_and_a_later_replacement_is_left_alone():
    optimizer, calls = Wrapper(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)), []
    [handle] = hook_steps(optimizer, lambda: calls.append("before"), lambda: calls.append("after"))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.step()
        assert other.step.__func__ is Wrapper.step
    assert calls == []
    optimizer.step()
    assert calls == ["before", "after"]
    hooked = optimizer.step
    optimizer.step = lambda: hooked()
    handle.remove()
    optimizer.step()
    assert calls == ["before", "after"]


def test_a_scheduler_finds_the_method_that_it_has_marked():
    optimizer = DerivedWrapper(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))
    optimizer.defaults = {"lr": 0.1}
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    [handle] = hook_steps(optimizer, None, lambda: None)
    assert optimizer.step._wrapped_by_lr_sched
    handle.remove()
    assert optimizer.step._wrapped_by_lr_sched
