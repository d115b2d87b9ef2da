"""What the callback tells of a run that did not end in this process: started ranks, and restored checkpoints."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import Net, fit, loader, same, saving, trainer
from processes import finish, start

from lightning_autoprune import AutoPruneCallback, sparsity
from lightning_autoprune.training.mailbox import Mailbox


def test_after_ranks_that_lightning_started_the_callback_tells_what_the_model_has(tmp_path):
    finish([start("spawn_run.py", [str(tmp_path)])])
    told = torch.load(tmp_path / "told.pt", weights_only=False)
    for name, run in told.items():
        assert run["sparsity"] == run["of_model"], name
        assert run["layer_sparsity"] == run["layers_of_model"], name
        assert [(row.name, row.sparsity) for row in run["layers"]] == list(run["layers_of_model"].items()), name
        assert [row.shape for row in run["layers"]] == [(16, 12), (4, 16)], name
        assert run["curves"]["all"][-1][0] > 0, name
    assert told["spawned"]["sparsity"] == told["forked"]["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert told["dense"]["sparsity"] == 0
    assert 0 < told["stopped"]["sparsity"] != 0.7
    assert told["resumed"]["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert told["done"]["sparsity"] == told["resumed"]["sparsity"]


def test_a_restored_checkpoint_is_told_also_if_no_step_is_left():
    options = {"epochs": 6, "enable_checkpointing": True}
    callback = AutoPruneCallback(target_sparsity=0.8)
    model, t = fit([callback, saving(every_n_train_steps=24)], **options)
    t.save_checkpoint("done.ckpt")
    resumed = AutoPruneCallback(target_sparsity=0.8)
    done_model, done = fit(resumed, epochs=6, ckpt_path="done.ckpt")
    assert resumed.sparsity == callback.sparsity == sparsity(done_model) > 0.7
    assert resumed.layers() == callback.layers()
    assert resumed.layer_sparsity() == callback.layer_sparsity()
    assert resumed.curves == callback.curves
    done.save_checkpoint("again.ckpt")
    states = [
        torch.load(name, weights_only=False)["callbacks"]["AutoPruneCallback"] for name in ("done.ckpt", "again.ckpt")
    ]
    assert same(*states)

    t.validate(model, loader(), ckpt_path="checkpoints/step=24.ckpt", verbose=False)
    assert callback.sparsity == sparsity(model) != resumed.sparsity
    assert callback.curves["all"][-1][0] > 40  # of the whole run
    fresh = AutoPruneCallback(target_sparsity=0.8)
    trainer(callbacks=[fresh]).validate(other := Net(), loader(), ckpt_path="done.ckpt", verbose=False)
    assert fresh.sparsity == sparsity(other) == resumed.sparsity


def test_a_letter_reaches_the_mailbox_that_the_sender_is_a_copy_of():
    mailbox = Mailbox()
    others = [copy.deepcopy(mailbox), pickle.loads(pickle.dumps(mailbox)), Mailbox()]
    pickle.loads(pickle.dumps(mailbox.write_letter({"x": torch.ones(2)})))
    assert torch.equal(mailbox.content["x"], torch.ones(2))
    assert [other.content for other in others] == [None] * 3


def test_a_letter_whose_mailbox_is_gone_is_dropped():
    letter = pickle.dumps(Mailbox().write_letter({}))
    pickle.loads(letter)
