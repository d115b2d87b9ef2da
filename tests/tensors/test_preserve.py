"""Tensors and buffers that a block may write to are restored after it."""

from __future__ import annotations

from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from lightning_autoprune.tensors.preserve import preserve_attributes, preserve_buffers, preserve_values


def test_buffers_are_restored_after_an_error_as_the_same_tensors_with_the_same_values():
    module = nn.BatchNorm1d(2)
    mean = module.running_mean

    @preserve_buffers(module)
    def fail():
        module.running_mean = torch.ones(3)
        module.running_var.data.add_(5)
        mean.add_(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert module.running_mean is mean
    assert torch.equal(mean, torch.zeros(2))
    assert torch.equal(module.running_var, torch.ones(2))


def test_tensors_that_can_not_be_written_to_are_left_out():
    with torch.inference_mode():
        inferred = torch.ones(3)
    expanded = torch.ones(1).expand(4)
    with preserve_values([inferred, expanded, torch.ones(2).to_sparse()]):
        pass
    assert expanded.stride() == (0,)


def test_a_backward_pass_that_was_pending_before_the_block_can_still_run():
    module = nn.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    pending = module(x).square().sum()
    with preserve_buffers(module):
        module(torch.randn(4, 3))
    pending.backward()  # it reads the running statistics, which must not count as changed
    assert x.grad is not None


# Attributes of Python objects


class Thing:
    def __init__(self) -> None:
        self.count, self.name = 1, "a"
        self.losses, self.by_name, self.seen, self.last = [0.5], {"a": [1]}, {1, 2}, deque([1, 2], maxlen=2)
        self.ordered, self.tensor = OrderedDict(b=1, a=2), torch.zeros(2)


def change(thing: Thing) -> None:
    thing.count += 1
    thing.new = 3
    del thing.name
    thing.losses.append(1.0)
    thing.by_name["b"] = []
    del thing.by_name["a"]
    thing.seen.discard(1)
    thing.last.append(3)
    thing.ordered.move_to_end("b")
    thing.tensor = torch.ones(3)


def test_attributes_and_the_items_of_containers_are_restored_after_an_error():
    thing, plain = Thing(), Thing()
    before = dict(vars(thing))

    @preserve_attributes([thing])
    def fail():
        change(thing)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    after = vars(thing)
    assert after.keys() == before.keys()
    assert all(after[name] is value for name, value in before.items())  # the same objects, to which others may refer
    del thing.tensor, plain.tensor
    assert vars(thing) == vars(plain)
    assert list(thing.ordered) == ["b", "a"]


def test_the_values_of_tensors_and_nested_containers_stay_as_they_are_by_then():
    thing = Thing()
    with preserve_attributes([thing]):
        thing.tensor.add_(1)
        thing.by_name["a"].append(2)
    assert thing.tensor.tolist() == [1, 1]
    assert thing.by_name == {"a": [1, 2]}


def test_submodules_and_parameters_that_were_replaced_come_back():
    module = nn.Sequential(nn.Linear(2, 2))
    layer, weight = module[0], module[0].weight
    with preserve_attributes(module.modules()):
        module[0].weight = nn.Parameter(torch.zeros(2, 2))
        module[0] = nn.Identity()
        module.more = nn.Linear(1, 1)
    assert (module[0], module[0].weight) == (layer, weight)
    assert list(dict(module.named_modules())) == ["", "0"]
