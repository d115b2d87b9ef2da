"""A resumed run ends as if it had never stopped; a checkpoint that does not fit is refused."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from helpers import Net, Resumable, csv_logger, data, fit, flat, loader, same, saving
from lightning.pytorch.callbacks import Callback
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_autoprune import AutoPruneCallback, AutoPruneError, sparsity

SOURCES = {
    "redrawn": {"held_out": 0.5},
    "train": {"held_out": "train"},
    "val": {"held_out": "val"},
    "loader": {"held_out": loader(seed=9, shuffle=True)},
    "fixed": {"held_out": 0.25, "redraw_held_out": False},
}


def run(folder: str, callback, optimizer: str, ckpt_path=None, train=None, **options):
    """Fit six epochs of eight steps, from the start or from a checkpoint; return the final state and log the curves."""
    callbacks = [saving(f"{folder}-checkpoints", **options), *([callback] if callback else [])]
    model, t = fit(
        callbacks,
        model=Net(optimizer=optimizer),
        train=train or Resumable(),
        val=loader(seed=3),
        epochs=6,
        enable_checkpointing=True,
        logger=csv_logger(Path(folder)),
        ckpt_path=ckpt_path,
    )
    return {
        "weights": dict(model.state_dict()),
        "optimizer": t.optimizers[0].state_dict(),
        "callback": callback.state_dict() if callback else None,
        "global_step": t.global_step,
    }


def curves(folder: str, after: int) -> list[dict[str, str]]:
    """Return the rows logged from a step on, without means over an epoch: resuming, Lightning loses its first half."""
    with (Path(folder) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) >= after]
    return [{k: v for k, v in row.items() if v and k != "train_accuracy_epoch"} for row in rows]


def check_resumed(callback, step: int, optimizer: str = "adam", train=None, **options) -> None:
    """Assert that a run resumed from a step ends like one that never stopped."""
    path = f"whole-checkpoints/step={step}.ckpt"
    whole = run("whole", callback(), optimizer, train=train and train(), **options)
    resumed = run("resumed", callback(), optimizer, path, train and train(), **options)
    for end in filter(None, (whole["callback"], resumed["callback"])):  # Lightning may repeat that step's validation
        history = end["report"]["history"]
        history["points"] = [point for point in history["points"] if point[0] > step]
    assert same(whole, resumed)
    assert curves("whole", after=step) == curves("resumed", after=step)
    assert len(curves("resumed", after=step)) > 2


# 48 steps: dense until 12, pruning until 31
@pytest.mark.parametrize("step", [3, 6, 8, 11, 12, 19, 24, 31, 32, 43])
@pytest.mark.parametrize("source", ["redrawn", "train", "val", "loader"])
def test_a_run_resumed_at_any_step_is_bit_equal_to_one_that_never_stopped(source, step):
    check_resumed(lambda: AutoPruneCallback(target_sparsity=0.8, **SOURCES[source]), step, every_n_train_steps=1)


@pytest.mark.parametrize("step", [3, 19])
def test_the_same_run_without_the_callback_resumes_bit_equal(step):
    """If this fails, Lightning does not resume exactly, and no other test here can pass."""
    check_resumed(lambda: None, step, every_n_train_steps=1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_sparsity": 0.9, "estimator": "softplus", "mask_every_n_steps": 3},
        {"target_sparsity": 0.5, "pull": 0.1, "finetune": 0.1},
    ],
)
def test_other_optimizers_and_settings_resume_bit_equal(optimizer, options):
    check_resumed(lambda: AutoPruneCallback(**options), 19, optimizer, every_n_train_steps=1)


@pytest.mark.parametrize("step", [8, 24, 40])
def test_a_fixed_split_resumes_bit_equal_from_the_end_of_an_epoch(step):
    step = step * 6 // 8  # a quarter of the samples is held out, so an epoch has six steps
    check_resumed(lambda: AutoPruneCallback(target_sparsity=0.8, **SOURCES["fixed"]), step, train=loader)


@pytest.mark.parametrize(("source", "step"), [("redrawn", 16), ("fixed", 12), ("fixed", 30)])
def test_loaders_with_worker_processes_resume_bit_equal(source, step):
    def train():
        return DataLoader(data(), 16, num_workers=2, persistent_workers=True)

    check_resumed(lambda: AutoPruneCallback(target_sparsity=0.8, **SOURCES[source]), step, train=train)


def test_a_checkpoint_of_an_interrupted_run_resumes_bit_equal():
    class Fail(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 19:
                raise RuntimeError("power cut")

        def on_exception(self, trainer, *_):
            trainer.save_checkpoint("interrupted.ckpt")

    def callback():
        return AutoPruneCallback(target_sparsity=0.8)

    whole = run("whole", callback(), "adam")
    with pytest.raises(RuntimeError, match="power cut"):
        fit([callback(), Fail()], train=Resumable(), val=loader(seed=3), epochs=6)
    state = torch.load("interrupted.ckpt", weights_only=True)
    assert state["callbacks"]["AutoPruneCallback"]["pruner"]["step"] == 19
    resumed = callback()
    model, _ = fit(resumed, train=Resumable(), val=loader(seed=3), epochs=6, ckpt_path="interrupted.ckpt")
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)
    assert whole["global_step"] == 48


def test_a_run_resumed_twice_is_bit_equal():
    def callback():
        return AutoPruneCallback(target_sparsity=0.8)

    whole = run("whole", callback(), "adam", every_n_train_steps=1)
    run("once", callback(), "adam", ckpt_path="whole-checkpoints/step=10.ckpt", every_n_train_steps=1)
    resumed = run("twice", callback(), "adam", ckpt_path="once-checkpoints/step=25.ckpt", every_n_train_steps=1)
    assert same(whole, resumed)


def test_training_further_with_final_masks_keeps_them():
    callback = AutoPruneCallback(target_sparsity=0.8)
    model, t = fit(callback)
    t.save_checkpoint("done.ckpt")
    resumed = AutoPruneCallback(target_sparsity=0.8)
    longer, _ = fit(resumed, epochs=8, ckpt_path="done.ckpt")
    assert same(resumed._run.pruner.masks(), callback._run.pruner.masks())
    assert not torch.equal(flat(model), flat(longer))


def test_a_run_with_final_masks_resumes_on_batches_too_small_to_split():
    _, t = fit(AutoPruneCallback(target_sparsity=0.8))
    t.save_checkpoint("done.ckpt")
    resumed = AutoPruneCallback(target_sparsity=0.8, held_out=0.01)
    fit(resumed, epochs=6, ckpt_path="done.ckpt")
    assert resumed.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_checkpoint_of_a_run_without_pruning_can_be_resumed_with_pruning():
    _, t = fit(epochs=2)
    t.save_checkpoint("dense.ckpt")
    callback = AutoPruneCallback(target_sparsity=0.8)
    message = (
        "This fit begins after 16 of 48 steps without a pruning state. Pruning begins after 12 steps and ends after 31,"
        " so 15 steps are left for it. For all of them, start a new fit from the weights alone, without `ckpt_path`."
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        model, _ = fit(callback, epochs=6, ckpt_path="dense.ckpt")
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_layers_in_another_order_resume_with_their_own_masks():
    class Two(Net):
        def __init__(self, order=("q", "k"), **options):
            super().__init__(**options)
            for name in order:
                setattr(self, name, torch.nn.Linear(12, 12))

        def forward(self, x):
            return super().forward(x + self.q(x) + self.k(2 * x))

    class Masks(Callback):
        def on_train_start(self, trainer, pl_module):
            self.masks = {name: getattr(pl_module, name).weight != 0 for name in ("q", "k")}

    callback, masks = AutoPruneCallback(target_sparsity=0.8), Masks()
    model, t = fit(callback, model=Two(optimizer="sgd"))
    t.save_checkpoint("one.ckpt")
    fit([callback, masks], model=Two(("k", "q"), optimizer="sgd"), epochs=6, ckpt_path="one.ckpt")
    assert same(masks.masks, {name: getattr(model, name).weight != 0 for name in ("q", "k")})


def test_a_disabled_callback_does_not_carry_the_pruning_state_on():
    _, t = fit(AutoPruneCallback(target_sparsity=0.8))
    t.save_checkpoint("one.ckpt")
    model, t = fit(AutoPruneCallback(target_sparsity=0.8, enabled=False), epochs=6, ckpt_path="one.ckpt")
    t.save_checkpoint("two.ckpt")
    assert sparsity(model) == 0
    assert torch.load("two.ckpt", weights_only=True)["callbacks"].get("AutoPruneCallback", {}) == {}


def test_a_second_fit_without_any_step_keeps_the_state():
    callback = AutoPruneCallback(target_sparsity=0.8)
    model, t = fit(callback)
    before = callback.state_dict()
    t.fit(model, loader())
    assert same(callback.state_dict(), before)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert len(callback.layers()) == 2


def test_a_checkpoint_of_other_layers_is_refused_and_the_error_names_them():
    _, t = fit(AutoPruneCallback(target_sparsity=0.8))
    t.save_checkpoint("one.ckpt")
    message = "layer 'last' of the checkpoint is missing.*Build the same model with the same `include` and `exclude`"
    with pytest.raises(AutoPruneError, match=message):
        fit(AutoPruneCallback(target_sparsity=0.8, exclude=["last"]), epochs=8, ckpt_path="one.ckpt")


def test_a_checkpoint_of_the_dense_phase_is_refused_for_other_layers():
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.should_stop = True

    _, t = fit([AutoPruneCallback(warmup=0.5), Stop()])
    t.save_checkpoint("one.ckpt")
    with pytest.raises(AutoPruneError, match="is for other layers: 'first', 'last' there, and 'first' here"):
        fit(AutoPruneCallback(warmup=0.5, exclude=["last"]), ckpt_path="one.ckpt")


def test_a_fixed_split_of_other_data_is_refused():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 12

    options = {"held_out": 0.25, "redraw_held_out": False}
    _, t = fit([AutoPruneCallback(**options), Stop()])
    t.save_checkpoint("one.ckpt")
    message = "held-out split is of 128 training samples, and here there are 64: resume with the same training data"
    with pytest.raises(AutoPruneError, match=message):
        fit(AutoPruneCallback(**options), train=loader(rows=64), epochs=8, ckpt_path="one.ckpt")


@pytest.mark.parametrize("source", ["redrawn", "train", "loader", "fixed"])
def test_a_run_that_was_stopped_and_then_saved_resumes_bit_equal(source):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    def callback():
        return AutoPruneCallback(target_sparsity=0.8, **SOURCES[source])

    model, _ = fit(whole := callback(), epochs=6)
    _, t = fit([callback(), Stop()], epochs=6)
    t.save_checkpoint("stopped.ckpt")
    other, _ = fit(resumed := callback(), epochs=6, ckpt_path="stopped.ckpt")
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("owner", ["loader", "sampler", "batch sampler"])
def test_a_held_out_loader_with_its_own_generator_resumes_bit_equal(owner):
    def held_out():
        samples, generator = data(seed=9), torch.Generator().manual_seed(3)
        if owner == "loader":
            return DataLoader(samples, 16, shuffle=True, generator=generator)
        sampler = RandomSampler(samples, generator=generator)
        if owner == "sampler":
            return DataLoader(samples, 16, sampler=sampler)
        return DataLoader(samples, batch_sampler=BatchSampler(sampler, 16, drop_last=True))

    check_resumed(lambda: AutoPruneCallback(target_sparsity=0.8, held_out=held_out()), 21, every_n_train_steps=1)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_lower_precision_prunes_and_resumes_bit_equal(precision):
    def run(ckpt_path=None):
        callback = AutoPruneCallback(target_sparsity=0.8)
        checkpoint = saving("bf16")
        model, _ = fit(
            [callback, checkpoint],
            train=Resumable(),
            epochs=6,
            precision=precision,
            enable_checkpointing=True,
            ckpt_path=ckpt_path,
        )
        return dict(model.state_dict()), callback.state_dict()

    whole = run()
    assert same(whole, run("bf16/step=16.ckpt"))
    zeros = sum(int((whole[0][f"{name}.weight"] == 0).sum()) for name in ("first", "last"))
    assert zeros == pytest.approx(0.8 * 256, abs=1)


def test_a_checkpoint_saved_while_resuming_keeps_the_state():
    class Early(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint("early.ckpt")

    _, t = fit(AutoPruneCallback(target_sparsity=0.8))
    t.save_checkpoint("one.ckpt")
    fit([Early(), AutoPruneCallback(target_sparsity=0.8)], epochs=8, ckpt_path="one.ckpt")
    states = [torch.load(f, weights_only=True)["callbacks"]["AutoPruneCallback"] for f in ("one.ckpt", "early.ckpt")]
    assert same(*states)


def test_a_loaded_state_that_was_not_used_does_not_reach_the_next_fit():
    _, t = fit(AutoPruneCallback(target_sparsity=0.8))
    t.save_checkpoint("done.ckpt")
    callback = AutoPruneCallback(target_sparsity=0.5)
    fit(callback, ckpt_path="done.ckpt")  # nothing is left to train
    model, _ = fit(callback)
    assert sparsity(model) == 0.5


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (
            "redrawn",
            {"held_out": "train"},
            'held out 0.5 of each batch, seed 0; this callback holds out "train". Resume',
        ),
        ("train", {"held_out": 0.25}, 'held out "train"; this callback holds out 0.25 of each batch, seed 0'),
        (
            "fixed",
            {**SOURCES["fixed"], "seed": 1},
            "whole run, seed 0; this callback holds out 0.25 of the training set",
        ),
    ],
)
def test_resuming_with_other_held_out_data_is_refused(then, now, message):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 12

    _, t = fit([AutoPruneCallback(**SOURCES[then]), Stop()])
    t.save_checkpoint("one.ckpt")
    with pytest.raises(AutoPruneError, match=re.escape(message)):
        fit(AutoPruneCallback(**now), ckpt_path="one.ckpt")
