"""Averages of other callbacks that are validated in place of the weights: pruned, or warned about."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, fit, loader, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_autoprune import AutoPruneCallback, sparsity

WARNING = "Pruned weights are not 0 in this validation"


class Average(Callback):
    """An average of the weights, as a callback of a user's own keeps it."""

    def on_train_start(self, trainer, pl_module):
        self.average = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, p in pl_module.named_parameters():
            self.average[name].lerp_(p.detach(), 0.02)


class SwappedAverage(Average):
    """An average whose tensors stand in for the weights while validating."""

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            for name, p in pl_module.named_parameters():
                p.data, self.average[name] = self.average[name], p.data

    on_validation_end = on_validation_start


class CopiedAverage(Average):
    """An average whose values are copied into the weights while validating."""

    def on_validation_start(self, trainer, pl_module):
        self.backup = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        for name, p in pl_module.named_parameters():
            p.data.copy_(self.average[name])

    def on_validation_end(self, trainer, pl_module):
        for name, p in pl_module.named_parameters():
            p.data.copy_(self.backup[name])


class WatchedNet(Net):
    """Records the zeros in each validation, and those of the callback."""

    def __init__(self):
        super().__init__()
        self.zeros, self.finals = [], []

    def validation_step(self, batch):
        self.zeros.append(sparsity(self))
        self.finals.append(self.callback._run.pruner.masks_final)


def validate_with(average, pruning_first):
    torch.manual_seed(0)
    model, callback = WatchedNet(), AutoPruneCallback(target_sparsity=0.8)
    model.callback = callback
    order = [callback, average] if pruning_first else [average, callback]
    fit(order, model, val=loader(32, 32), epochs=8, num_sanity_val_steps=0)
    assert sparsity(model) == callback.sparsity == pytest.approx(0.8, abs=0.01)
    return model, callback


@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("kind", [SwappedAverage, CopiedAverage])
def test_an_average_of_a_users_own_is_validated_with_zeros_once_masks_are_final(kind, pruning_first, recwarn):
    model, _ = validate_with(kind(), pruning_first)
    assert sum(model.finals) >= 2
    for zeros, final in zip(model.zeros, model.finals, strict=True):
        assert zeros == pytest.approx(0.8, abs=0.01) or not final
    told = [str(w.message) for w in recwarn if WARNING in str(w.message)]
    if kind is CopiedAverage and not pruning_first:  # the values in the weights are pruned before each validation
        assert not told
    else:
        assert len(told) == 1
        assert f"in this validation: {kind.__name__} puts other values" in told[0]


@pytest.mark.parametrize("pruning_first", [True, False])
def test_an_average_is_left_alone_while_masks_change(pruning_first):
    class Comparison(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pruner = callback._run.pruner
            if not pruner.masks_final:
                assert same(average.average, reference.average)
                self.pruned = pruner.sparsity

    average, reference, comparison = SwappedAverage(), Average(), Comparison()
    model, callback = Net(), AutoPruneCallback(target_sparsity=0.8)
    averages = [average, reference]
    order = [callback, *averages] if pruning_first else [*averages, callback]
    with pytest.warns(UserWarning, match=WARNING):
        fit([*order, comparison], model, val=loader(32, 32), epochs=8)
    assert comparison.pruned > 0.5


@pytest.mark.parametrize("kind", [SwappedAverage, CopiedAverage])
@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.filterwarnings("ignore:Pruned weights are not 0")
def test_a_validated_average_does_not_change_the_training(kind, pruning_first):
    assert same(*(dict(validate_with(each(), pruning_first)[0].state_dict()) for each in (kind, Average)))


def test_lightnings_average_is_named_while_masks_change_and_has_zeros_afterwards():
    with pytest.warns(UserWarning, match=f"{WARNING}: EMAWeightAveraging puts") as caught:
        model, _ = validate_with(EMAWeightAveraging(decay=0.9), True)
    assert sum(WARNING in str(w.message) for w in caught) == 1
    assert model.zeros[-2:] == pytest.approx([0.8, 0.8], abs=0.01)


def test_nothing_is_told_without_an_average(recwarn):
    model, _ = validate_with(Average(), True)
    assert not [w for w in recwarn if WARNING in str(w.message)]
    assert model.zeros[-1] > 0.7
