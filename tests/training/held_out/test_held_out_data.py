"""What the default does where nothing can be held out: it says so once, and trains M on the training batches."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from helpers import Net, data, fit, held_out_loss, loader, same, saving
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from manual_models import ManualNet, TwoOptimizersNet
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, IterableDataset

from lightning_autoprune import AutoPruneCallback, AutoPruneError, layer_sparsity, sparsity
from lightning_autoprune.training.followed_metric import HELD_OUT_LOSS


class Texts(IterableDataset):
    def __iter__(self):
        return ((str(x.tolist()), y) for x, y in data())


class TextNet(Net):
    def training_step(self, batch):
        texts, y = batch
        return super().training_step((torch.tensor([list(map(float, text[1:-1].split(","))) for text in texts]), y))


class IteratorNet(Net):
    def training_step(self, dataloader_iter):
        batch, *_ = next(dataloader_iter)
        return held_out_loss(self, batch)


class SeveralNet(Net):
    def training_step(self, batch):
        return super().training_step(batch[0]) + super().training_step(batch[1])


class UnbatchedNet(Net):
    def training_step(self, batch):
        return super().training_step((batch[0].repeat(2, 1), batch[1].repeat(2)))


def texts():
    return DataLoader(Texts(), 16)


SETUPS = {
    "stream of texts": (TextNet, texts, {"max_steps": 32, "epochs": -1}, "a batch has an object of type str"),
    "manual optimization": (ManualNet, loader, {}, "ManualNet uses manual optimization, so its `training_step` takes"),
    "several optimizers": (TwoOptimizersNet, loader, {}, "TwoOptimizersNet uses manual optimization, so"),
    "dataloader_iter": (
        IteratorNet,
        loader,
        {},
        "`training_step` of IteratorNet takes a `dataloader_iter`, not a batch",
    ),
    "several loaders": (
        SeveralNet,
        lambda: [loader(), loader(seed=2)],
        {},
        "there are 2 training loaders, whose batches differ in size",
    ),
    "single samples": (
        UnbatchedNet,
        lambda: loader(batch=1, rows=64),
        {"accumulate_grad_batches": 4},
        "0.25 of a training batch of 1 sample leaves one side empty",
    ),
}


def run(kind, train, held_out=None, callbacks=(), **options):
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out)
    torch.manual_seed(0)
    model, _ = fit([callback, *callbacks], model=kind(), train=train(), **options)
    return dict(model.state_dict()), callback.state_dict(), callback


@pytest.mark.parametrize("name", SETUPS)
def test_the_default_falls_back_with_one_warning_and_the_bits_of_train(name):
    kind, train, options, reason = SETUPS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        *found, callback = run(kind, train, **options)
    [message] = [str(w.message) for w in caught if "`held_out`" in str(w.message)]
    expected = "`held_out` is not set, and nothing can be held out, so M is trained on the training batches"
    assert message.startswith(f'{expected} (`held_out="train"`): {reason}')
    *plain, _ = run(kind, train, held_out="train", **options)
    assert same(found, plain)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("name", SETUPS)
def test_an_explicit_fraction_that_can_not_be_had_is_an_error(name):
    kind, train, options, reason = SETUPS[name]
    with pytest.raises(AutoPruneError, match=r"`held_out=\"train\"`, which holds nothing out") as error:
        run(kind, train, held_out=0.25, **options)
    assert str(error.value).startswith(f"No data can be held out: {reason}")


@pytest.mark.parametrize(
    "options", [{"held_out": "val"}, {"held_out": loader()}, {"redraw_held_out": False}], ids=["val", "loader", "fixed"]
)
def test_no_other_setting_falls_back(options):
    with pytest.raises(AutoPruneError, match="ManualNet uses manual optimization"):
        fit(AutoPruneCallback(**options), model=ManualNet(), val=loader())


def test_a_run_that_fell_back_resumes_as_one_that_trains_m_on_the_training_batches(tmp_path):
    def fitted(held_out=None, **options):
        save = saving(str(tmp_path / f"saved {held_out}"), every_n_train_steps=8)
        *found, _ = run(Net, lambda: loader(batch=2, rows=16), held_out, [save], enable_checkpointing=True, **options)
        return found

    with pytest.warns(UserWarning, match="nothing can be held out"):
        whole = fitted()
    half = tmp_path / "saved None" / "step=16.ckpt"
    assert torch.load(half, weights_only=True)["callbacks"]["AutoPruneCallback"]["source"] == '"train"'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="(?!`held_out`)")
        assert same(fitted(ckpt_path=half), whole)
    assert same(fitted("train", ckpt_path=half), whole)
    with pytest.raises(AutoPruneError, match=r'run held out "train"; this callback holds out 0\.25 of'):
        fitted(0.25, ckpt_path=half)


def test_each_fit_decides_anew():
    callback = AutoPruneCallback(target_sparsity=0.8)
    with pytest.warns(UserWarning, match="nothing can be held out"):
        fit(callback, model=ManualNet())
    model, _ = fit(callback, model=Net())
    assert callback.state_dict()["source"] == "0.25 of each batch, seed 0"
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_a_monitor_of_the_held_out_loss_is_refused_when_the_default_falls_back():
    callbacks = [AutoPruneCallback(), EarlyStopping(HELD_OUT_LOSS, strict=False)]
    with pytest.raises(AutoPruneError, match=r"EarlyStopping monitors .*, which is not logged with"):
        fit(callbacks, model=ManualNet())


def test_manual_optimization_with_a_loss_function_holds_data_out():
    callback = AutoPruneCallback(target_sparsity=0.8, loss_fn=held_out_loss)
    fit(callback, model=ManualNet())
    assert callback.state_dict()["source"] == "0.25 of each batch, seed 0"
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


class Gan(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))
        self.critic = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch):
        real = batch[0]
        fake = self.generator(torch.randn(len(real), 4))
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(softplus(-self.critic(fake)).mean())
        first.step()
        second.zero_grad()
        self.manual_backward((softplus(-self.critic(real)) + softplus(self.critic(fake.detach()))).mean())
        second.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(network.parameters(), 0.003) for network in (self.generator, self.critic)]


def test_both_networks_of_a_gan_are_pruned_by_default():
    torch.manual_seed(0)
    callback = AutoPruneCallback(target_sparsity=0.8)
    with pytest.warns(UserWarning, match="Gan uses manual optimization"):
        model, _ = fit(callback, model=Gan(), epochs=8)
    assert sparsity(model) == callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert min(layer_sparsity(model).values()) > 0.2


# Errors in mid-run


def test_an_error_in_a_held_out_pass_names_it_and_the_step():
    class Fails(Net):
        def training_step(self, batch):
            if "log" in vars(self) and self.global_step == 12:  # a held-out pass replaces `log`
                raise KeyError("mask")
            return super().training_step(batch)

    message = (
        r"^At training step 12, the held-out pass \(`held_out`\) raised KeyError: 'mask'. To hold nothing out, pass"
    )
    with pytest.raises(AutoPruneError, match=message) as error:
        fit(AutoPruneCallback(warmup=0.25), model=Fails())
    assert isinstance(error.value.__cause__, KeyError)


def test_held_out_batches_of_one_sample_are_skipped_with_one_warning_if_batchnorm_takes_statistics():
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=DataLoader(data(33, seed=5), 16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callback)
    messages = [str(w.message) for w in caught if "has a single sample, of which BatchNorm can't" in str(w.message)]
    assert len(messages) == 1
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_held_out_part_of_one_sample_in_mid_run_is_skipped():
    """Batches of two samples, without BatchNorm in the first batch's trial."""

    class LateNorm(Net):
        def forward(self, x):
            self.norm.training = self.global_step > 8
            return super().forward(x)

    callback = AutoPruneCallback(target_sparsity=0.8, held_out=0.25)
    with pytest.warns(
        UserWarning, match=r"The held-out batch of training step \d+ has a single sample, of which BatchN"
    ):
        fit(callback, model=LateNorm(), train=loader(batch=3, rows=48))
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copied_callback_holds_samples_out_like_the_original(duplicate):
    callback = AutoPruneCallback(target_sparsity=0.8)
    model, _ = fit(duplicate(callback))
    original, _ = fit(callback)
    assert same(dict(model.state_dict()), dict(original.state_dict()))
