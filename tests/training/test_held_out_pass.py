"""The held-out pass: the gradients that it gives, and that it leaves no trace in the training around it."""

from __future__ import annotations

import copy
import random
import re

import numpy as np
import pytest
import torch
from helpers import Net, data, fit, same
from lightning.pytorch import Callback
from torch import nn

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.tensors.write_detector import WriteDetector
from lightning_autoprune.training.held_out_pass import held_out_gradients, shielded


def take_snapshot(model: Net) -> dict:
    accuracy = model.accuracy
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "metric": {name: copy.deepcopy(getattr(accuracy, name)) for name in accuracy._defaults},
        "updates": accuracy._update_count,
        "training": [module.training for module in model.modules()],
        "keys": [sorted(module.__dict__) for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate()[1],
    }


class CallInTraining(Callback):
    """A callback that calls a function in the middle of training."""

    def __init__(self, function) -> None:
        self.function, self.result = function, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            self.result = self.function(trainer, pl_module)


def make_batch():
    return data(16, seed=7)[:]


def call_in_training(function, **options):
    callback = CallInTraining(function)
    fit(callback, epochs=1, model_options=options)
    return callback.result


def test_a_held_out_pass_leaves_no_trace():
    def check(trainer, model):
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        before, logged = take_snapshot(model), copy.deepcopy(trainer.callback_metrics)
        identities = [id(b) for b in model.buffers()]
        loss, _ = held_out_gradients(trainer, make_batch(), [model.first.weight], None, 1)
        assert loss > 0
        assert same(before, take_snapshot(model))
        assert same(logged, trainer.callback_metrics)
        assert identities == [id(b) for b in model.buffers()]
        return same(gradients, [None if p.grad is None else p.grad for p in model.parameters()])

    assert call_in_training(check, noisy=True)


def test_without_the_shield_the_same_pass_leaves_traces():
    """Shows that the snapshots can reveal a trace."""

    def check(trainer, model):
        before = take_snapshot(model)
        model.training_step(make_batch())
        after = take_snapshot(model)
        return [key for key in before if not same(before[key], after[key])]

    assert call_in_training(check, noisy=True) == ["weights", "metric", "updates", "torch"]


def test_gradients_are_taken_with_batch_statistics_and_without_dropout():
    def check(trainer, model):
        model.dropout.p = 0.5
        weights = [model.first.weight, model.last.weight]
        loss, gradients = held_out_gradients(trainer, make_batch(), weights, None, 1)
        twin = copy.deepcopy(model)
        twin.dropout.p = 0.0
        x, y = make_batch()
        expected = nn.functional.cross_entropy(twin(x), y)
        assert loss == pytest.approx(expected.item())
        return same(gradients, list(torch.autograd.grad(expected, [twin.first.weight, twin.last.weight])))

    assert call_in_training(check)


def test_a_custom_loss_function_replaces_training_step():
    def check(trainer, model):
        return held_out_gradients(trainer, make_batch(), [model.last.weight], lambda m, b: 3 * m.last.weight.sum(), 1)

    _, gradients = call_in_training(check)
    assert torch.equal(gradients[0], torch.full_like(gradients[0], 3))


def test_a_weight_that_the_loss_does_not_depend_on_has_zero_gradient():
    def check(trainer, model):
        weights = [model.first.weight, model.last.weight]
        return held_out_gradients(trainer, make_batch(), weights, lambda m, b: m.last.weight.sum(), 1)[1]

    assert (call_in_training(check)[0] == 0).all()


def test_gradients_can_be_written_to_even_if_autograd_shares_their_memory():
    def loss_fn(module, batch):
        first, second, summed = module.sums
        return (first + second).square().sum() + summed.sum()

    def check(trainer, model):
        model.sums = nn.ParameterList(torch.full((2, 3), float(i)) for i in (1, 2, 3))
        first, second, summed = held_out_gradients(trainer, make_batch(), list(model.sums), loss_fn, 1).gradients
        first.mul_(2)
        second.mul_(3)
        summed[0].add_(1)
        return first, second, summed

    first, second, summed = call_in_training(check)
    assert torch.equal(first, torch.full((2, 3), 12.0))
    assert torch.equal(second, torch.full((2, 3), 18.0))
    assert torch.equal(summed, torch.tensor([[2.0] * 3, [1.0] * 3]))


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (None, "None, not a tensor"),
        (1.0, "of type float, not a tensor"),
        (torch.zeros(3, requires_grad=True), r"of shape \(3,\), not a scalar"),
        (torch.tensor(float("nan"), requires_grad=True), "nan, not finite"),
        (torch.tensor(float("inf"), requires_grad=True), "inf, not finite"),
        (torch.tensor(1.0), "without a gradient"),
    ],
    ids=["None", "float", "vector", "nan", "inf", "no gradient"],
)
def test_a_loss_that_is_not_a_finite_scalar_is_described(loss, text):
    result = call_in_training(lambda t, m: held_out_gradients(t, make_batch(), [m.last.weight], lambda *_: loss, 1))
    assert re.match(text, result)


def test_a_dict_with_a_loss_is_accepted():
    def check(trainer, model):
        weights = [model.last.weight]
        return held_out_gradients(trainer, make_batch(), weights, lambda m, b: {"loss": m.last.weight.sum()}, 1)

    assert isinstance(call_in_training(check), tuple)


class BuffersNet(Net):
    """A model with buffers that can be replaced or changed, or that are absent or inside a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("grown", torch.zeros(2))
        self.register_buffer("absent", None)
        self.metrics = nn.ModuleList([copy.deepcopy(self.accuracy)])


def test_changed_and_replaced_buffers_are_restored():
    model = BuffersNet()
    replaced = model.replaced
    with shielded(model, 0):
        model.replaced = torch.ones(3)
        model.grown += 5
        model.metrics[0].update(torch.eye(4), torch.arange(4))
    assert model.replaced is replaced
    assert torch.equal(replaced, torch.zeros(2))
    assert torch.equal(model.grown, torch.zeros(2))
    assert model.metrics[0]._update_count == 0


def test_buffers_that_cannot_be_written_to_cause_no_error():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen += 1
            return x

    model = Net()
    model.register_buffer("expanded", torch.ones(1).expand(12))
    with torch.inference_mode():
        model.register_buffer("inferred", torch.ones(3))
    model.scripted = torch.jit.script(Counter())
    with shielded(model, 0):
        model.scripted(torch.ones(2))
    assert model.scripted.seen == 0
    assert model.expanded.stride() == (0,)


def test_everything_is_restored_after_an_error():
    model = Net(noisy=True)
    before = take_snapshot(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), shielded(model, 0):
        model.training_step((torch.randn(4, 12), torch.arange(4)))[model(torch.randn(4, 99))]
    assert same(before, take_snapshot(model))


def test_additional_tensors_are_restored_on_request():
    model = Net()
    model.last.requires_grad_(False)
    detector = WriteDetector(model.parameters())
    with torch.no_grad():
        model.last.weight += 1
    (modified,) = detector.modified()
    assert modified is model.last.weight
    value = modified.clone()
    with shielded(model, 0, preserved=[modified]), torch.no_grad():
        model.last.weight.zero_()
    assert torch.equal(model.last.weight, value)


def test_a_training_step_that_writes_to_trained_weights_is_warned_about():
    class ClampingNet(Net):
        def training_step(self, batch):
            with torch.no_grad():
                self.last.weight.clamp_(-1, 1)
            return super().training_step(batch)

    with pytest.warns(UserWarning, match="writes to weights that are trained, and did so in the held-out pass too"):
        fit(AutoPruneCallback(target_sparsity=0.5), model=ClampingNet(), epochs=1)


def test_a_training_step_that_writes_to_trained_weights_through_data_is_warned_about():
    class ClampingNet(Net):
        def training_step(self, batch):
            self.last.weight.data.clamp_(-0.1, 0.1)
            self.last.weight.data.mul_(0.99)
            return super().training_step(batch)

    with pytest.warns(UserWarning, match="writes to weights that are trained, and did so in the held-out pass too"):
        fit(AutoPruneCallback(target_sparsity=0.5), model=ClampingNet(), epochs=1)


JOINS = {
    "concatenated": lambda a, b: torch.cat([a, b], 1),
    "stacked": lambda a, b: torch.stack([a, b], -1),
    "added": lambda a, b: a + b,
    "summed": lambda a, b: torch.cat([a.sum(1), b.sum(1)]),
}


class JoinedWeights(Net):
    """A model with two weights whose gradients are, as autograd makes them, views, expanded, or one tensor."""

    def __init__(self, name):
        super().__init__()
        self.a, self.b, self.join = nn.Linear(2, 10, bias=False), nn.Linear(2, 10, bias=False), JOINS[name]

    def training_step(self, batch):
        joined = self.join(self.a.weight, self.b.weight)
        return super().training_step(batch) + (joined * torch.arange(joined.numel()).view_as(joined)).mean()


@pytest.mark.parametrize("name", JOINS)
def test_gradients_are_dense_tensors_of_their_own_which_can_be_written_to(name):
    def check(trainer, model):
        weights = [model.a.weight, model.b.weight]
        first, second = held_out_gradients(trainer, make_batch(), weights, None, 1).gradients
        before = second.clone()
        assert first.is_contiguous()
        assert second.is_contiguous()
        first.mul_(3)
        assert first.any()
        assert torch.equal(second, before)
        return True

    callback = CallInTraining(check)
    fit(callback, model=JoinedWeights(name), epochs=1)
    assert callback.result
