"""Layers that are frozen or unfrozen during training, by finetuning callbacks or by the module itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Net, Resumable, csv_logger, fit, flat, held_out_loss, rows
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint

from lightning_autoprune import AutoPruneCallback, sparsity


class BackboneNet(Net):
    """A model whose backbone is unfrozen during training."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.ReLU())

    def forward(self, x):
        return super().forward(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


NOT_YET = "Layers that are not trained .* stay dense until they are: backbone.0"


class BackboneRecorder(Callback):
    """A callback that counts the nonzero weights of the backbone after each epoch."""

    def __init__(self):
        self.counts = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.counts.append(int(pl_module.backbone[0].weight.count_nonzero()))


@pytest.mark.parametrize("pruning_first", [True, False])
def test_a_backbone_is_pruned_once_it_is_unfrozen(pruning_first, tmp_path):
    callback, recorder = AutoPruneCallback(target_sparsity=0.8, warmup=0.1), BackboneRecorder()
    callbacks = [callback, BackboneFinetuning(3, verbose=False)]
    with pytest.warns(UserWarning, match=NOT_YET):
        model, _ = fit(
            [*(callbacks if pruning_first else callbacks[::-1]), recorder],
            BackboneNet(),
            epochs=12,
            logger=csv_logger(tmp_path),
        )
    assert recorder.counts[:3] == [144, 144, 144]
    assert list(callback.layer_sparsity()) == ["first", "last", "backbone.0"]  # in the order of the model
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert model.backbone[0].weight.count_nonzero() < 72
    assert [s for step, s in callback.curves["backbone.0"] if step <= 24] == [0.0] * 12
    assert callback.layers()[2].weights == 144
    layer_rows = [row for row in rows(tmp_path) if "autoprune/layer_sparsity/backbone.0" in row]
    assert layer_rows[-1]["autoprune/layer_sparsity/backbone.0"] == callback.layer_sparsity()["backbone.0"]


def test_a_backbone_unfrozen_in_the_dense_phase_is_pruned_like_any_layer():
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.5, finetune=0.2)
    with pytest.warns(UserWarning, match=NOT_YET):
        model, _ = fit([callback, BackboneFinetuning(2, verbose=False)], BackboneNet(), epochs=10)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert model.backbone[0].weight.count_nonzero() < 72


def test_a_backbone_unfrozen_once_masks_are_final_stays_dense_and_is_named():
    callback = AutoPruneCallback(target_sparsity=0.8)
    with pytest.warns(
        UserWarning, match="Layer 'backbone.0', which has been unfrozen, stays dense. The masks are final."
    ) as caught:
        model, _ = fit([callback, BackboneFinetuning(8, verbose=False)], BackboneNet(), epochs=10)
    assert sum("The masks are final" in str(w.message) for w in caught) == 1
    assert set(callback.layer_sparsity()) == {"first", "last"}
    assert model.backbone[0].weight.count_nonzero() == 144


def test_masks_of_a_layer_do_not_change_while_it_is_frozen():
    masks = []

    class FreezingNet(Net):
        def on_train_epoch_start(self):
            self.first.requires_grad_(self.current_epoch not in (4, 5))

        def on_train_epoch_end(self):
            masks.append(self.first.weight != 0)

    callback, model = AutoPruneCallback(target_sparsity=0.8, finetune=0.1), FreezingNet()
    fit(callback, model, epochs=10)
    unchanged = [torch.equal(a, b) for a, b in itertools.pairwise(masks)]
    assert unchanged[3:5] == [True, True]  # from epoch 3 to 4, and from 4 to 5
    assert not unchanged[2]
    assert not unchanged[5]
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


class UnfreezingNet(BackboneNet):
    """A model that unfreezes its backbone itself, also after resuming."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)

    def on_train_start(self):  # Lightning may skip on_train_epoch_start when it resumes
        self.backbone.requires_grad_(self.global_step >= 24)

    def on_train_epoch_start(self):
        self.on_train_start()


@pytest.mark.parametrize("stop", [24, 36])  # when the backbone is unfrozen, and later
def test_resuming_after_a_layer_was_unfrozen_is_bit_exact(stop, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=12, save_top_k=-1)
    options = {"epochs": 10, "enable_checkpointing": True}

    def run(callbacks, **more):
        torch.manual_seed(0)
        callback, model = AutoPruneCallback(target_sparsity=0.8, warmup=0.1), UnfreezingNet()
        model.backbone.requires_grad_(False)
        fit([callback, *callbacks], model, train=Resumable(), **options, **more)
        return flat(model), callback

    uninterrupted, callback = run([checkpoint])
    resumed, resumed_callback = run([ModelCheckpoint(tmp_path / "more")], ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert torch.equal(uninterrupted, resumed)
    assert resumed_callback.curves == callback.curves


def test_a_run_with_a_finetuning_callback_resumes_after_unfreezing(tmp_path):
    def run(epochs, **more):
        callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.1)
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        callbacks = [callback, BackboneFinetuning(2, verbose=False), checkpoint]
        model, _ = fit(callbacks, BackboneNet(), epochs=epochs, enable_checkpointing=True, **more)
        return model, callback

    run(8)
    model, callback = run(8, ckpt_path=tmp_path / "epoch=3.ckpt")
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert model.backbone[0].weight.count_nonzero() < 144


class LateLayerNet(Net):
    """A model with a layer that is unfrozen after two epochs; it may be all zeros or have a separate optimizer."""

    def __init__(self, zeros: bool = False, separate_optimizer: bool = False):
        super().__init__()
        self.more, self.separate_optimizer = torch.nn.Linear(12, 12), separate_optimizer
        self.more.requires_grad_(False)
        if zeros:
            torch.nn.init.zeros_(self.more.weight)

    def forward(self, x):
        return super().forward(x + self.more(x))

    def configure_optimizers(self):
        rest = [p for name, p in self.named_parameters() if not name.startswith("more")]
        groups = [rest, list(self.more.parameters())]
        if self.separate_optimizer:
            self.automatic_optimization = False
            return [torch.optim.SGD(group, 0.05) for group in groups]
        return torch.optim.SGD([p for group in groups for p in group], 0.05)

    def training_step(self, batch):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.separate_optimizer:
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
        return loss

    def on_train_epoch_start(self):
        self.more.requires_grad_(self.current_epoch >= 2)


def test_an_unfrozen_layer_of_zeros_is_pruned_from_a_constant_m():
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.1)
    with pytest.warns(UserWarning, match="The weights of 'more' are all 0"):
        fit(callback, LateLayerNet(zeros=True), epochs=8)
    assert set(callback.layer_sparsity()) == {"first", "more", "last"}
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            {"separate_optimizer": True},
            "It has an optimizer of its own, which trained no prunable weight when fitting started.",
        ),
    ],
    ids=["separate optimizer"],
)
def test_an_unfrozen_layer_that_cannot_be_pruned_stays_dense_with_a_warning(model, why, tmp_path):
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.1, loss_fn=held_out_loss)
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    with pytest.warns(UserWarning, match=f"Layer 'more', which has been unfrozen, stays dense. {why}") as caught:
        trained, _ = fit([callback, checkpoint], LateLayerNet(**model), epochs=8, enable_checkpointing=True)
    assert sum("which has been unfrozen" in str(w.message) for w in caught) == 1
    assert list(callback.layer_sparsity()) == list(callback.curves)[:-1] == ["first", "last"]
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert (trained.more.weight != 0).all()
    resumed_callback, resumed_model = (
        AutoPruneCallback(target_sparsity=0.8, warmup=0.1, loss_fn=held_out_loss),
        LateLayerNet(**model),
    )
    resumed_model.more.requires_grad_(True)  # as if the module restored this itself
    fit(resumed_callback, resumed_model, epochs=8, ckpt_path=tmp_path / "epoch=4.ckpt")
    assert list(resumed_callback.layer_sparsity()) == ["first", "last"]
    assert torch.equal(flat(resumed_model), flat(trained))


class FrozenNet(Net):
    """A model of which only the normalization is trained at first, and whose other layers are unfrozen later."""

    def __init__(self, when: int | None, in_optimizer: bool = False):
        super().__init__()
        self.when, self.in_optimizer = when, in_optimizer
        self.layers.requires_grad_(False)

    @property
    def layers(self):
        return torch.nn.ModuleList([self.first, self.last])

    def configure_optimizers(self):
        parameters = self.parameters() if self.in_optimizer else self.norm.parameters()
        return torch.optim.SGD(parameters, 0.05, momentum=0.9)

    def on_train_epoch_start(self):
        if self.current_epoch == self.when:
            self.layers.requires_grad_(True)
            if not self.in_optimizer:
                self.trainer.optimizers[0].add_param_group({"params": [*self.layers.parameters()]})


@pytest.mark.parametrize("held_out", [0.25, "train"])
@pytest.mark.parametrize(("when", "in_optimizer"), [(1, False), (1, True), (5, False)])
def test_a_model_that_is_frozen_at_the_start_is_pruned_once_it_is_unfrozen(when, in_optimizer, held_out):
    callback = AutoPruneCallback(0.8, held_out=held_out)  # the dense phase ends with epoch 3, the masks are final at 8
    with pytest.warns(UserWarning, match="No optimizer trains a prunable weight when fitting starts, so pruning waits"):
        model, _ = fit(callback, FrozenNet(when, in_optimizer), epochs=12)
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)
    assert list(callback.layer_sparsity()) == ["first", "last"]


def test_a_run_in_which_no_layer_is_ever_unfrozen_stays_dense_and_says_so(tmp_path):
    callback = AutoPruneCallback(0.8, figures_every_n_epochs=1)
    with pytest.warns(
        UserWarning, match="dense phase is over, and no optimizer trains a prunable weight yet"
    ) as caught:
        model, run = fit(callback, FrozenNet(None), epochs=12, logger=csv_logger(tmp_path))
    texts = [str(warning.message) for warning in caught]
    assert any("Nothing was pruned: no optimizer trained a prunable weight" in text for text in texts)
    assert callback.sparsity == sparsity(model) == run.callback_metrics["autoprune/sparsity"] == 0
    assert callback.layers() == []


def test_layers_unfrozen_after_the_pruning_phase_of_a_frozen_model_stay_dense():
    callback = AutoPruneCallback(0.8)
    with pytest.warns(UserWarning, match="Layer 'first', which has been unfrozen, stays dense. The masks are final."):
        model, _ = fit(callback, FrozenNet(9), epochs=12)
    assert sparsity(model) == 0


@pytest.mark.parametrize(
    "stop", [8, 24, 48]
)  # while it waits, when the layers are unfrozen, and while masks are trained
def test_a_run_that_is_frozen_at_the_start_resumes_bit_exactly(stop, tmp_path):
    class ResumingNet(FrozenNet):
        def on_train_start(self):
            self.layers.requires_grad_(self.global_step >= 24)

        def on_train_epoch_start(self):
            self.on_train_start()

    def run(callbacks, **more):
        callback, model = AutoPruneCallback(0.8), ResumingNet(None, in_optimizer=True)
        fit([callback, *callbacks], model, epochs=12, enable_checkpointing=True, **more)
        return flat(model), callback

    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    uninterrupted, callback = run([checkpoint])
    resumed, resumed_callback = run([ModelCheckpoint(tmp_path / "more")], ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert torch.equal(uninterrupted, resumed)
    assert resumed_callback.curves == callback.curves


def test_a_layer_unfrozen_shortly_before_the_masks_are_final_does_not_raise_the_sparsity():
    class Recorder(Callback):
        def __init__(self):
            self.sparsities = []

        def on_train_batch_end(self, trainer, *_):
            self.sparsities.append(float(trainer.callback_metrics["autoprune/sparsity"]))

    class WideNet(BackboneNet):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Sequential(torch.nn.Linear(12, 256), torch.nn.ReLU(), torch.nn.Linear(256, 12))

    recorder, callback = Recorder(), AutoPruneCallback(0.8, initial_m="constant")
    fit([callback, recorder, BackboneFinetuning(11, verbose=False)], WideNet(), epochs=20)
    before, after = recorder.sparsities[: 11 * 8], recorder.sparsities[11 * 8 :]
    assert max(after) < max(before) + 0.1
    assert min(after) > 0.75
    assert callback.sparsity == pytest.approx(0.8, abs=0.001)


def test_memory_that_is_pruned_already_is_not_taken_in_under_another_name():
    class SharedNet(Net):
        def __init__(self):
            super().__init__()
            self.copy = torch.nn.Linear(12, 16)
            self.copy.weight.data = self.first.weight.data

        def on_train_epoch_start(self):
            self.first.requires_grad_(self.current_epoch not in (3, 4))  # then the copy is the first that is trained

    callback = AutoPruneCallback(0.8)
    model, _ = fit(callback, SharedNet(), epochs=10)
    assert list(callback.layer_sparsity()) == ["first", "last"]
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)
