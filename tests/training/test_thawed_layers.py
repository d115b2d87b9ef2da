"""Layers that are frozen and thawed while the model trains, by finetuning callbacks and by the module itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Net, Resumable, csv_logger, fit, flat, rows
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint

from lightning_autoprune import AutoPruneCallback


class Backbone(Net):
    """A backbone that is thawed on the way."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.ReLU())

    def forward(self, x):
        return super().forward(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


NOT_YET = "Layers that are not trained .* stay dense until they are: backbone.0"


class Watching(Callback):
    """How many weights of the backbone are not 0, after each epoch."""

    def __init__(self):
        self.kept = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.kept.append(int(pl_module.backbone[0].weight.count_nonzero()))


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_backbone_is_pruned_from_when_it_is_thawed(ours_first, tmp_path):
    callback, watching = AutoPruneCallback(target_sparsity=0.8, warmup=0.1), Watching()
    callbacks = [callback, BackboneFinetuning(3, verbose=False)]
    with pytest.warns(UserWarning, match=NOT_YET):
        model, _ = fit(
            [*(callbacks if ours_first else callbacks[::-1]), watching],
            Backbone(),
            epochs=12,
            logger=csv_logger(tmp_path),
        )
    assert watching.kept[:3] == [144, 144, 144]
    assert list(callback.layer_sparsity()) == ["first", "last", "backbone.0"]  # the order of the model
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert model.backbone[0].weight.count_nonzero() < 72
    assert [s for step, s in callback.curves["backbone.0"] if step <= 24] == [0.0] * 12
    assert callback.layers()[2].weights == 144
    named = [row for row in rows(tmp_path) if "autoprune/sparsity/backbone.0" in row]
    assert named[-1]["autoprune/sparsity/backbone.0"] == callback.layer_sparsity()["backbone.0"]


def test_a_backbone_that_is_thawed_in_the_dense_phase_is_as_any_layer():
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.5, finetune=0.2)
    with pytest.warns(UserWarning, match=NOT_YET):
        model, _ = fit([callback, BackboneFinetuning(2, verbose=False)], Backbone(), epochs=10)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert model.backbone[0].weight.count_nonzero() < 72


def test_a_backbone_that_is_thawed_when_the_masks_are_final_stays_dense_and_is_named():
    callback = AutoPruneCallback(target_sparsity=0.8)
    with pytest.warns(
        UserWarning, match="Layer 'backbone.0', which has been unfrozen, stays dense. The masks are final."
    ) as caught:
        model, _ = fit([callback, BackboneFinetuning(8, verbose=False)], Backbone(), epochs=10)
    assert sum("The masks are final" in str(w.message) for w in caught) == 1
    assert set(callback.layer_sparsity()) == {"first", "last"}
    assert model.backbone[0].weight.count_nonzero() == 144


def test_a_layer_that_is_frozen_for_a_while_keeps_its_mask():
    masks = []

    class Resting(Net):
        def on_train_epoch_start(self):
            self.first.requires_grad_(self.current_epoch not in (4, 5))

        def on_train_epoch_end(self):
            masks.append(self.first.weight != 0)

    callback, model = AutoPruneCallback(target_sparsity=0.8, finetune=0.1), Resting()
    fit(callback, model, epochs=10)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(masks)]
    assert same[3:5] == [True, True]  # epochs 3 to 4 to 5
    assert not same[2]
    assert not same[5]
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


class Thawing(Backbone):
    """A backbone that is thawed by the module itself, also after a resume."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)

    def on_train_start(self):  # Lightning leaves on_train_epoch_start out where a run goes on
        self.backbone.requires_grad_(self.global_step >= 24)

    def on_train_epoch_start(self):
        self.on_train_start()


@pytest.mark.parametrize("stop", [24, 36])  # at the thaw, and later
def test_a_run_with_a_thaw_goes_on_from_a_checkpoint_with_the_same_bits(stop, tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=12, save_top_k=-1)
    options = {"epochs": 10, "enable_checkpointing": True}

    def run(callbacks, **more):
        torch.manual_seed(0)
        callback, model = AutoPruneCallback(target_sparsity=0.8, warmup=0.1), Thawing()
        model.backbone.requires_grad_(False)
        fit([callback, *callbacks], model, train=Resumable(), **options, **more)
        return flat(model), callback

    straight, callback = run([saving])
    resumed, again = run([ModelCheckpoint(tmp_path / "more")], ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert torch.equal(straight, resumed)
    assert again.curves == callback.curves


def test_a_run_with_a_finetuning_callback_goes_on_after_the_thaw(tmp_path):
    def run(epochs, **more):
        callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.1)
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        callbacks = [callback, BackboneFinetuning(2, verbose=False), saving]
        model, _ = fit(callbacks, Backbone(), epochs=epochs, enable_checkpointing=True, **more)
        return model, callback

    run(8)
    model, callback = run(8, ckpt_path=tmp_path / "epoch=3.ckpt")
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert model.backbone[0].weight.count_nonzero() < 144


class OneMore(Net):
    """A layer that is thawed after two epochs, and may be of zeros or in an optimizer of its own."""

    def __init__(self, zeros: bool = False, own: bool = False):
        super().__init__()
        self.more, self.own = torch.nn.Linear(12, 12), own
        self.more.requires_grad_(False)
        if zeros:
            torch.nn.init.zeros_(self.more.weight)

    def forward(self, x):
        return super().forward(x + self.more(x))

    def configure_optimizers(self):
        rest = [p for name, p in self.named_parameters() if not name.startswith("more")]
        groups = [rest, list(self.more.parameters())]
        if self.own:
            self.automatic_optimization = False
            return [torch.optim.SGD(group, 0.05) for group in groups]
        return torch.optim.SGD([p for group in groups for p in group], 0.05)

    def training_step(self, batch):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.own:
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
        return loss

    def on_train_epoch_start(self):
        self.more.requires_grad_(self.current_epoch >= 2)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"zeros": True}, "All weights of layer 'more' are 0"),
        ({"own": True}, "It has an optimizer of its own, which trained no prunable weight when fitting started."),
    ],
)
def test_a_layer_that_can_not_be_taken_in_stays_dense_and_the_run_goes_on(model, why, tmp_path):
    def loss(module, batch):
        return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])

    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.1, loss_fn=loss)
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    with pytest.warns(UserWarning, match=f"Layer 'more', which has been unfrozen, stays dense. {why}") as caught:
        trained, _ = fit([callback, saving], OneMore(**model), epochs=8, enable_checkpointing=True)
    assert sum("which has been unfrozen" in str(w.message) for w in caught) == 1
    assert list(callback.layer_sparsity()) == list(callback.curves)[:-1] == ["first", "last"]
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert (trained.more.weight != 0).all()
    again, resumed = AutoPruneCallback(target_sparsity=0.8, warmup=0.1, loss_fn=loss), OneMore(**model)
    resumed.more.requires_grad_(True)  # as where the module restores it
    fit(again, resumed, epochs=8, ckpt_path=tmp_path / "epoch=4.ckpt")
    assert list(again.layer_sparsity()) == ["first", "last"]
    assert torch.equal(flat(resumed), flat(trained))
