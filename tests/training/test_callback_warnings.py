"""What the callback warns about: layers that stay dense, and runs that prune badly or not at all."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.utils.checkpoint
from helpers import Net, fit, flat, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_autoprune import AutoPruneCallback, sparsity


class UnusedLayerNet(Net):
    """A model with a layer that the loss depends on in some epochs only."""

    def __init__(self, used=()):
        super().__init__()
        self.average, self.used = nn.Linear(12, 16), used
        self.example_input_array = torch.zeros(2, 12)

    def training_step(self, batch):
        loss = super().training_step(batch)
        return loss + self.average(batch[0]).square().mean() if self.current_epoch in self.used else loss


def test_layers_that_no_loss_depends_on_stay_dense_and_do_not_count_toward_the_target(tmp_path):
    callback, checkpoint = AutoPruneCallback(target_sparsity=0.6), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    with pytest.warns(UserWarning, match="No loss so far depends on 'average', so they stay dense and do not count"):
        model, _ = fit([callback, checkpoint], UnusedLayerNet(used=[2, 3]), epochs=8, enable_checkpointing=True)
    assert (model.average.weight != 0).all()
    assert list(callback.layer_sparsity()) == list(callback.curves)[:-1] == ["first", "last"]
    assert callback.sparsity == pytest.approx(0.6, abs=0.01)
    assert callback.sparsity == sparsity({name: getattr(model, name).weight for name in callback.layer_sparsity()})
    for epoch in (0, 3):  # in the dense phase, and later
        again = AutoPruneCallback(target_sparsity=0.6)
        resumed, _ = fit(again, UnusedLayerNet(used=[2, 3]), epochs=8, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert torch.equal(flat(resumed), flat(model))
        assert again.curves == callback.curves


def test_a_layer_that_was_used_before_a_checkpoint_is_used_after_resuming(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    options = {"epochs": 8, "enable_checkpointing": True}
    model, _ = fit([AutoPruneCallback(0.6), checkpoint], UnusedLayerNet(used=[0]), **options)
    assert sparsity(model) == pytest.approx(0.6, abs=0.01)
    resumed, _ = fit(AutoPruneCallback(0.6), UnusedLayerNet(used=[0]), epochs=8, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert torch.equal(flat(resumed), flat(model))


def test_unused_layers_are_pruned_with_a_warning_if_the_others_can_not_meet_the_target():
    text = "No loss so far depends on 'average', so the pressure prunes nearly all of their"
    with pytest.warns(UserWarning, match=text):
        fit(AutoPruneCallback(0.9943, layer_floor=0.0), UnusedLayerNet())  # 3 of 448 weights, but 1 of 256
    with pytest.warns(UserWarning, match=text):
        fit(AutoPruneCallback(granularity="neuron"), UnusedLayerNet())


def test_excluded_layers_that_no_loss_depends_on_are_not_warned_about():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(AutoPruneCallback(target_sparsity=0.6, exclude=["average"]), model=UnusedLayerNet())
    assert not any("No loss" in str(w.message) for w in caught)


def test_frozen_layers_stay_dense_and_are_named():
    model = Net()
    model.last.weight.requires_grad_(False)
    with pytest.warns(
        UserWarning, match=r"Layers that are not trained \(frozen, or in no optimizer\) stay dense until they are: last"
    ):
        fit(AutoPruneCallback(target_sparsity=0.8), model=model)
    assert (model.last.weight != 0).all()


def test_weights_in_no_optimizer_stay_dense_and_are_named():
    """For example, a teacher, a target network, or a backbone under a new head."""

    class Student(Net):
        def __init__(self):
            super().__init__()
            self.teacher = Net()

        def configure_optimizers(self):
            return torch.optim.Adam(self.last.parameters(), 0.01)

    callback = AutoPruneCallback(target_sparsity=0.8)
    with pytest.warns(UserWarning, match=r"stay dense until they are: first, teacher\.first, teacher\.last"):
        model, _ = fit(callback, model=Student())
    assert sparsity(model.last.weight) == pytest.approx(0.8, abs=0.01)
    assert all((w != 0).all() for w in (model.first.weight, model.teacher.first.weight, model.teacher.last.weight))


def test_a_weight_without_a_held_out_gradient_is_warned_about():
    class ReentrantCheckpointNet(Net):
        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(self.first, x.requires_grad_(), use_reentrant=True)
            return self.last(torch.relu(hidden))

    with pytest.warns(UserWarning, match=r"gave no gradient for a weight .* use `use_reentrant=False`"):
        fit(AutoPruneCallback(target_sparsity=0.5), model=ReentrantCheckpointNet())


def test_training_masks_on_the_validation_data_is_warned_about():
    with pytest.warns(UserWarning, match=r"fits the masks on the data that is reported"):
        fit(AutoPruneCallback(held_out="val"), val=loader(seed=3))


def test_a_pruning_phase_without_auxiliary_steps_is_warned_about():
    with pytest.warns(UserWarning, match="No auxiliary step was taken, so the masks follow the weights' magnitude"):
        fit(AutoPruneCallback(target_sparsity=0.5, mask_every_n_steps=100))


def test_training_that_ends_before_masks_are_final_is_warned_about():
    class StoppingNet(Net):
        def on_train_batch_end(self, *_):
            self.trainer.should_stop = self.trainer.global_step == 12

    with pytest.warns(UserWarning, match=r"ended after 12 of 32 steps, before the masks were final: sparsity is \d"):
        fit(AutoPruneCallback(target_sparsity=0.9), model=StoppingNet())
