"""Weights that the user's code replaces while a run is under way."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import CLASSES, FEATURES, Net, Resumable, csv_logger, data, fit, flat, rows
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from manual_models import ManualNet
from torch import nn
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback, AutoPruneError, sparsity

DENSE, PRUNING, FINAL = 0, 4, 8  # an epoch of each phase, in a run of 10 epochs
HOOKS = [
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_epoch_end",
    "on_train_epoch_end",
]


class PlainNet(Net):
    """A model whose classes are not counted by a metric."""

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def changing(change, epoch, hook="on_train_epoch_start", base=PlainNet, new_optimizer=True):
    """Return a model that calls a function on itself once, in a hook of an epoch, and makes a new optimizer."""

    class ChangingNet(base):
        changed = False

        def change_once(self, *_):
            if not self.changed and self.current_epoch == epoch and not self.trainer.sanity_checking:
                self.changed = True
                change(self)
                if new_optimizer:
                    self.trainer.optimizers = [self.configure_optimizers()]

    setattr(ChangingNet, hook, ChangingNet.change_once)
    torch.manual_seed(0)
    return ChangingNet()


def reassign(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def copy_layer(model):
    model.first = copy.deepcopy(model.first)


def set_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def new_values(model):
    model.first.weight = nn.Parameter(torch.randn(16, FEATURES))


def widen(model):
    model.last = nn.Linear(16, CLASSES + 2)


def widen_data(model):
    model.last.weight.data = torch.randn(CLASSES + 2, 16)
    model.last.bias.data = torch.randn(CLASSES + 2)


def widen_all(model):
    model.first, model.norm, model.last = nn.Linear(FEATURES, 24), nn.BatchNorm1d(24), nn.Linear(24, CLASSES)


def compile_layer(model):
    model.first = torch.compile(model.first, backend="eager")


def swap_modules(model):
    model.first, model.last = nn.Sequential(model.first), nn.Sequential(model.last)


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model.last)


def spectral(model):
    nn.utils.parametrizations.spectral_norm(model.last)


def remove(model):
    model.last = nn.Identity()  # the loss then takes 16 classes


def run(model, epochs=10, **options):
    callback = AutoPruneCallback(target_sparsity=0.8, layer_floor=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, trainer = fit([callback, *options.pop("callbacks", [])], model, epochs=epochs, **options)
    texts = [str(w.message) for w in caught if "The weight of layer" in str(w.message)]
    return callback, trainer, texts


@pytest.mark.parametrize(
    ("change", "epoch"),
    [
        *((reassign, epoch) for epoch in (DENSE, PRUNING, FINAL, 9)),
        *((change, PRUNING) for change in (copy_layer, set_data, new_values, compile_layer, swap_modules)),
        (new_values, FINAL),
    ],
)
def test_weights_of_the_same_shape_stay_pruned(change, epoch):
    callback, _, texts = run(model := changing(change, epoch))
    assert not texts
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)
    assert list(callback.layer_sparsity()) == ["first", "last"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_replacement_in_the_last_epoch_is_noticed_wherever_it_happens(hook):
    loader = DataLoader(data(), 16)
    callback, _, _ = run(model := changing(new_values, 9, hook), val=loader)
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_weights_that_are_loaded_after_the_last_step_are_pruned():
    callback, _, _ = run(model := changing(new_values, 9, "on_train_end", new_optimizer=False))
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_goes_on_bit_by_bit_with_new_parameters(optimizer):
    """The gradients of a run do not depend on which objects hold the weights."""

    def assign(model):
        optimizer = model.trainer.optimizers[0]
        old = list(model.parameters())
        reassign(model)
        new = dict(zip(old, model.parameters(), strict=True))
        optimizer.param_groups[0]["params"] = list(new.values())
        for parameter in old:
            if parameter in optimizer.state:
                optimizer.state[new[parameter]] = optimizer.state.pop(parameter)

    class OptimizedNet(PlainNet):
        def __init__(self):
            super().__init__(optimizer=optimizer, noisy=True)

    torch.manual_seed(0)
    plain, _, _ = run(plain_model := OptimizedNet())
    callback, _, _ = run(model := changing(assign, PRUNING, base=OptimizedNet, new_optimizer=False))
    assert torch.equal(flat(model), flat(plain_model))
    assert callback.curves == plain.curves


@pytest.mark.parametrize("change", [widen, widen_data])
@pytest.mark.parametrize("epoch", [DENSE, PRUNING])
def test_a_layer_of_another_shape_is_pruned_anew(change, epoch, tmp_path):
    callback, _, texts = run(model := changing(change, epoch), logger=csv_logger(tmp_path))
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)
    assert sparsity(model.last.weight) == callback.layer_sparsity()["last"] > 0.3
    assert [layer.shape for layer in callback.layers()] == [(16, FEATURES), (CLASSES + 2, 16)]
    expected = (
        "The weight of layer 'last' has been replaced by one of shape (6, 16), and the masks have (4, 16). It starts"
        " dense, and is pruned anew if an optimizer trains it."
    )
    assert texts == ([] if epoch == DENSE else [expected])
    assert rows(tmp_path)[-1]["autoprune/sparsity"] == callback.sparsity


@pytest.mark.parametrize("epoch", [DENSE, PRUNING])
def test_a_run_whose_layers_were_all_replaced_prunes_the_new_ones(epoch):
    callback, _, texts = run(model := changing(widen_all, epoch))
    assert len(texts) == (2 if epoch == PRUNING else 0)
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_a_layer_of_another_shape_without_an_optimizer_stays_dense():
    callback, _, texts = run(model := changing(widen, PRUNING, new_optimizer=False))
    assert len(texts) == 1
    assert callback.sparsity == sparsity(model.first.weight) == pytest.approx(0.8, abs=0.01)
    assert sparsity(model.last.weight) == 0
    assert list(callback.layer_sparsity()) == list(callback.curves)[:-1] == ["first"]


@pytest.mark.parametrize("change", [widen, widen_data])
def test_a_layer_of_another_shape_stays_dense_once_masks_are_final(change):
    callback, _, texts = run(model := changing(change, FINAL))
    assert texts == [
        "The weight of layer 'last' has been replaced by one of shape (6, 16), and the masks have (4, 16). It is dense"
        " from now on, and not counted in the sparsity."
    ]
    assert callback.sparsity == sparsity(model.first.weight)
    assert sparsity(model.last.weight) == 0
    assert list(callback.layer_sparsity()) == [layer.name for layer in callback.layers()] == ["first"]


@pytest.mark.parametrize(
    ("change", "epoch"),
    [*((parametrize, epoch) for epoch in (DENSE, PRUNING, FINAL)), (spectral, PRUNING), (remove, PRUNING), (remove, 9)],
)
def test_a_layer_that_is_gone_is_not_counted(change, epoch):
    callback, _, texts = run(model := changing(change, epoch))
    assert texts == [
        "The weight of layer 'last' is not a parameter of its own any more: it was removed, shares another layer's, or"
        " is computed now. It is dense from now on, and not counted in the sparsity."
    ]
    assert list(callback.layer_sparsity()) == ["first"]
    assert callback.sparsity == sparsity(model.first.weight) == pytest.approx(0.8, abs=0.1)


def test_a_run_without_any_layer_left_reports_no_sparsity():
    def remove_all(model):
        model.first, model.last = nn.LazyBatchNorm1d(), nn.LazyBatchNorm1d()  # neither is prunable

        def forward(x):
            return model.last(model.first(x))

        model.forward = forward
        model(torch.randn(4, FEATURES))
        model.norm = nn.Identity()

    class BareNet(PlainNet):
        def training_step(self, batch):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    for epoch in (DENSE, PRUNING, FINAL):
        callback, _, texts = run(changing(remove_all, epoch))
        assert len(texts) == 2
        assert callback.sparsity == 0
        assert callback.layers() == []


def test_two_layers_that_share_a_weight_from_now_on_count_once():
    class SquareNet(PlainNet):
        def __init__(self):
            super().__init__(hidden=FEATURES)
            self.more = nn.Linear(FEATURES, FEATURES)

        def forward(self, x):
            return super().forward(self.more(x))

    def tie(model):
        model.more.weight = model.first.weight

    callback, _, texts = run(model := changing(tie, PRUNING, base=SquareNet))
    assert len(texts) == 1
    assert "layer 'more'" in texts[0]
    assert callback.sparsity == sparsity(model)


@pytest.mark.parametrize("epoch", [DENSE, PRUNING, FINAL])
def test_weights_may_change_their_dtype(epoch):
    class CastNet(PlainNet):
        def forward(self, x):
            return super().forward(x.to(self.first.weight.dtype))

    callback, trainer, texts = run(model := changing(lambda model: model.double(), epoch, base=CastNet))
    assert not texts
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)
    assert model.first.weight.dtype == torch.float64
    trainer.save_checkpoint("double.ckpt")


def test_a_replacement_is_followed_with_manual_optimization():
    callback = AutoPruneCallback(target_sparsity=0.8, held_out="train")
    fit(callback, model := changing(reassign, PRUNING, base=ManualNet), epochs=10)
    assert callback.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("epoch", [PRUNING, FINAL])
def test_neurons_go_on_with_new_parameters_and_refuse_other_shapes_before_masks_are_final(epoch):
    class ExampleNet(PlainNet):
        def __init__(self):
            super().__init__(hidden=32)
            self.example_input_array = torch.zeros(2, FEATURES)

    def wider_output(model):
        model.last = nn.Linear(32, CLASSES + 2)

    callback = AutoPruneCallback(target_sparsity=0.6, granularity="neuron")
    fit(callback, model := changing(reassign, epoch, base=ExampleNet), epochs=10)
    assert callback.sparsity == pytest.approx(sparsity(model), abs=0.01) == pytest.approx(0.6, abs=0.05)

    callback, model = (
        AutoPruneCallback(target_sparsity=0.6, granularity="neuron"),
        changing(wider_output, epoch, base=ExampleNet),
    )
    if epoch == PRUNING:
        with pytest.raises(AutoPruneError, match="The weights of 'last' were replaced or removed during the run"):
            fit(callback, model, epochs=10)
    else:
        with pytest.warns(UserWarning, match="layer 'last' has been replaced by one of shape"):
            fit(callback, model, epochs=10)
        assert list(callback.layer_sparsity()) == ["first"]
        assert callback.sparsity == pytest.approx(sparsity(model.first.weight), abs=0.02)


def test_a_target_that_can_not_be_met_without_a_layer_is_an_error():
    class WideNet(PlainNet):
        def __init__(self):
            super().__init__()
            self.wide = nn.Linear(FEATURES, 200)

        def forward(self, x):
            return super().forward(x) + self.wide(x).mean()

    def narrow(model):
        model.wide = nn.Linear(FEATURES, 1, bias=False).requires_grad_(False)

    callback = AutoPruneCallback(target_sparsity=0.9, layer_floor=0.1)
    with pytest.raises(AutoPruneError, match="is not possible"):
        fit(callback, changing(narrow, PRUNING, base=WideNet), epochs=10)


def test_an_average_of_the_weights_does_not_stop_the_run():
    callback, _, _ = run(
        model := changing(reassign, PRUNING, "on_train_batch_end"), callbacks=[EMAWeightAveraging(decay=0.5)]
    )
    assert callback.sparsity == sparsity(model)


@pytest.mark.parametrize("change", [reassign, widen])
def test_resuming_after_a_replacement_is_bit_exact(change, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=48, save_top_k=-1)
    options = {"epochs": 10, "enable_checkpointing": True}
    callback, _, _ = run(model := changing(change, PRUNING), train=Resumable(), callbacks=[checkpoint], **options)
    resumed_model = PlainNet()
    if change is widen:
        widen(resumed_model)
    resumed, _, _ = run(
        resumed_model,
        train=Resumable(),
        callbacks=[ModelCheckpoint(tmp_path / "more")],
        ckpt_path=tmp_path / "step=48.ckpt",
        **options,
    )
    assert torch.equal(flat(model), flat(resumed_model))
    assert resumed.layer_sparsity() == callback.layer_sparsity()


def test_operations_are_counted_anew_after_a_change_of_shape(tmp_path):
    class ExampleNet(PlainNet):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.zeros(2, FEATURES)

    callback, _, _ = run(changing(widen, PRUNING, base=ExampleNet))
    assert [layer.flops for layer in callback.layers()] == [
        2 * 2 * 16 * FEATURES,
        2 * 2 * 16 * 6,
    ]  # the example has two samples
