"""Averages of the weights that other callbacks maintain are pruned like the model."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, Resumable, fit, loader, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_autoprune import AutoPruneCallback, sparsity
from lightning_autoprune.training.weight_averages import zero_pruned_weights

AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=0.5),
}


@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_is_pruned_to_the_target(tmp_path, kind, pruning_first):
    class SparsityRecorder(Callback):
        def on_train_epoch_end(self, *_):
            self.sparsity = sparsity(average._average_model)

    callback, average, recorder = AutoPruneCallback(target_sparsity=0.8), AVERAGES[kind](), SparsityRecorder()
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_last=True)
    order = [callback, average, recorder, checkpoint] if pruning_first else [average, callback, recorder, checkpoint]
    model, _ = fit(order, epochs=8, val=loader(32), enable_checkpointing=True)
    assert sparsity(model) == pytest.approx(0.8, abs=0.005)
    assert recorder.sparsity == pytest.approx(0.8, abs=0.005)
    if kind != "swa":  # SWA saves the trained weights, and their average separately
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        other = Net()
        other.load_state_dict(state)
        assert sparsity(other) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_the_model_ends_with_the_average_instead_of_the_last_weights(kind):
    class WeightRecorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weight = pl_module.first.weight.detach().clone()

    recorder = WeightRecorder()
    model, _ = fit([AutoPruneCallback(target_sparsity=0.8), AVERAGES[kind](), recorder], epochs=8)
    kept = model.first.weight != 0
    assert not same(model.first.weight[kept], recorder.weight[kept])


@pytest.mark.parametrize("epoch", [2, 6])  # during pruning, and with final masks
def test_resuming_with_an_average_is_bit_exact(tmp_path, epoch):
    def run(ckpt_path=None):
        callbacks = [
            AutoPruneCallback(target_sparsity=0.8),
            EMAWeightAveraging(decay=0.9),
            ModelCheckpoint(tmp_path / str(ckpt_path is None), "{epoch}", save_top_k=-1),
        ]
        model, _ = fit(callbacks, train=Resumable(), epochs=8, enable_checkpointing=True, ckpt_path=ckpt_path)
        return dict(model.state_dict())

    assert same(run(), run(tmp_path / "True" / f"epoch={epoch}.ckpt"))


def test_the_average_of_a_run_that_ends_early_is_pruned_like_the_model():
    class EarlyStop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 4

    callback = AutoPruneCallback(target_sparsity=0.8)
    model, _ = fit([callback, EMAWeightAveraging(decay=0.9), EarlyStop()], epochs=8)
    assert callback.sparsity > 0.5
    assert sparsity(model) == callback.sparsity


def test_the_epoch_that_swa_adds_for_batchnorm_does_not_count_as_training():
    callback = AutoPruneCallback(target_sparsity=0.8, finetune=0.1)
    fit([callback, StochasticWeightAveraging(0.01, swa_epoch_start=0.5)], epochs=6)
    assert callback._run.pruner.phases.total == 6 * 8
    assert callback._run.pruner.masks_final


def test_an_average_is_pruned_after_resuming_with_final_masks(tmp_path):
    def callbacks(folder):
        return [
            AutoPruneCallback(target_sparsity=0.8),
            EMAWeightAveraging(decay=0.9),
            ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1),
        ]

    options = {"train": Resumable(), "enable_checkpointing": True}
    fit(callbacks("long"), epochs=8, **options)
    shorter = callbacks("short")
    fit(shorter, epochs=6, ckpt_path=tmp_path / "long" / "epoch=4.ckpt", **options)
    other = Net()
    other.load_state_dict(torch.load(tmp_path / "short" / "epoch=5.ckpt", weights_only=True)["state_dict"])
    assert sparsity(other) == pytest.approx(0.8, abs=0.005)


class AveragedNet(Net):
    """A model that keeps an average of itself or of a layer, in a place that ``where`` names."""

    def __init__(self, where):
        super().__init__()
        source = self.first if where == "of a layer" else self
        average = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.pairs = [(average, source if source is not self else None)]
        if where != "in a list":
            self.average = average

    def on_train_batch_end(self, *_):
        [(average, source)] = self.pairs
        average.update_parameters(source or self)


class AveragingCallback(Callback):
    def setup(self, trainer, pl_module, stage):
        self.kept = {"average": [AveragedModel(pl_module)]}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.kept["average"][0].update_parameters(pl_module)


@pytest.mark.parametrize("where", ["in a list", "of a layer"])
@pytest.mark.parametrize("resumed", [False, True])
def test_an_averaged_model_of_the_module_is_pruned(tmp_path, where, resumed):
    callback = AutoPruneCallback(target_sparsity=0.8)
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    model = AveragedNet(where)
    fit([callback, checkpoint], model, epochs=8, enable_checkpointing=True)
    if resumed:
        callback, model = AutoPruneCallback(target_sparsity=0.8), AveragedNet(where)
        fit([callback], model, epochs=8, ckpt_path=tmp_path / "epoch=5.ckpt")
    average = model.pairs[0][0].module
    if where == "of a layer":
        assert torch.equal(average.weight == 0, model.first.weight == 0)
    else:
        assert sparsity({"first": average.first.weight, "last": average.last.weight}) == callback.sparsity
        assert not torch.equal(average.first.weight, model.first.weight)


def test_an_averaged_model_of_a_callback_is_pruned():
    callback, averaging = AutoPruneCallback(target_sparsity=0.8), AveragingCallback()
    fit([averaging, callback], epochs=8)
    assert sparsity(averaging.kept["average"][0].module) == callback.sparsity


def test_an_averaged_model_that_may_be_of_several_layers_is_left_with_a_warning():
    class Twins(Net):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
            self.average = AveragedModel(self.one)

        def forward(self, x):
            return super().forward(x + self.one(x) + self.two(x))

    with pytest.warns(UserWarning, match="An AveragedModel of Linear may be the average of 2 parts of Twins"):
        model, _ = fit(AutoPruneCallback(target_sparsity=0.8), Twins(), epochs=8)
    assert model.average.module.weight.all()


def test_zero_pruned_weights_applies_the_mask():
    weight, mask = torch.ones(3), torch.tensor([True, False, True])
    zero_pruned_weights(weight, mask)
    assert weight.tolist() == [1, 0, 1]
