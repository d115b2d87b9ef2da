"""Two real processes under DDP (gloo): every fit of ``ddp_run`` runs once, and the tests read its results."""

from __future__ import annotations

import json

import ddp_run
import pytest
import torch
from helpers import rows, same
from processes import finish, results, run_on_two_ranks, start
from wandb_file import read_models

PRUNED = [name for name in ddp_run.RUNS if name not in ("fixed", "averaging", "not wrapped", "unfrozen")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_on_two_ranks("ddp_run.py", folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return results(folder)


@pytest.mark.parametrize("name", PRUNED)
def test_masks_at_every_step_and_final_weights_have_the_same_bits_on_both_ranks(ranks, name):
    (one, _), (two, _) = (found[name] for found in ranks)
    assert same(one["masks"], two["masks"])
    buffers = ("running", "num_batches", "accuracy")  # after the last step DDP does not synchronize these
    weights = [{k: v for k, v in found["state"].items() if not any(b in k for b in buffers)} for found in (one, two)]
    assert same(*weights)
    assert len(one["masks"]) > 10
    assert not same(one["masks"][-1], one["masks"][0])


@pytest.mark.parametrize("name", [name for name in PRUNED if name != "neurons"])
def test_the_target_is_met(ranks, name):
    assert ranks[1][name][0]["sparsity"] == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train", {"held": "train"}),
        ("loader", {"held": ddp_run.held_out()}),
        ("both", {"held": ddp_run.held_out(), "train_gradients": True}),
    ],
)
def test_two_ranks_match_one_process_that_gets_the_union_of_their_batches(ranks, tmp_path, name, options):
    alone, two = ddp_run.union(tmp_path, 1, **options), ranks[0][name][0]
    assert same(alone["masks"], two["masks"])
    for key, value in alone["state"].items():
        torch.testing.assert_close(two["state"][key], value)
    assert bool(alone["losses"]) == (name != "train")
    assert two["losses"] == pytest.approx(alone["losses"])


def test_only_rank_zero_logs(ranks, folder):
    logged = rows(folder / "logs")
    assert len(logged) > 5
    assert len({row["step"] for row in logged}) == len(logged)
    assert logged[-1]["autoprune/sparsity"] == ranks[1]["redrawn"][0]["sparsity"]


def test_rank_zero_logs_the_pruned_model_without_a_deadlock(ranks, folder):
    [artifact] = read_models(folder / "wandb")
    assert json.loads(artifact.metadata)["sparsity"] == ranks[1]["logged"][0]["sparsity"]
    saved = torch.load(artifact.manifest.contents[0].local_path, weights_only=True)
    assert saved["ranks"] == ddp_run.RANKS
    assert same(dict(saved["state_dict"]), dict(ranks[0]["logged"][0]["state"]))


def test_a_held_out_loss_that_is_not_finite_on_one_rank_skips_the_step_on_both(ranks):
    texts = [" ".join(found["not finite"][1]) for found in ranks]
    assert "the held-out loss is bad on another rank: no auxiliary step is taken, and training goes on." in texts[0]
    assert "the held-out loss is bad on another rank" in " ".join(ranks[0]["gathering"][1])


def test_resuming_on_two_ranks_gives_the_same_bits(ranks):
    whole, half = (ranks[0][name][0] for name in ("whole", "half"))
    assert same(whole["masks"][24:], half["masks"])
    assert same(whole["state"], half["state"])


def test_a_run_on_two_ranks_resumes_on_one(ranks, folder, tmp_path):
    resumed = ddp_run.resumed(tmp_path, 1, folder / "saved" / "epoch=2.ckpt")
    assert resumed["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert len(resumed["masks"]) == len(ranks[0]["half"][0]["masks"])


def test_settings_that_do_not_work_with_several_ranks_are_refused(ranks):
    assert ranks[0]["fixed"][0] == (
        "AutoPruneError: A fixed part of the training set can't be held out on 2 ranks, since each rank draws its own"
        " samples: use `redraw_held_out=True` or a DataLoader."
    )
    assert ranks[0]["averaging"][0] == (
        "AutoPruneError: DDPStrategy has a `model_averaging_period`: between two averages the weights of the ranks"
        " differ, and so would their masks. Leave it out."
    )
    assert ranks[0]["not wrapped"][0].startswith(
        "AutoPruneError: UnwrappedDDP does not wrap the model in DistributedDataParallel, so the gradients of the ranks"
    )


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_ranks_that_lightning_starts_by_itself_prune_to_the_target(tmp_path, strategy):
    finish([start("ddp_run.py", [str(tmp_path), strategy])])
    result = torch.load(tmp_path / f"{strategy}.pt", weights_only=False)
    assert result["metrics"]["autoprune/sparsity"] == pytest.approx(0.7, abs=0.01)
    weights = [result["state"][f"{name}.weight"] for name in ("first", "last")]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(0.7, abs=0.01)


def test_a_unfrozen_layer_stays_dense_because_ddp_does_not_share_its_gradients(ranks):
    (one, texts), (two, _) = (found["unfrozen"] for found in ranks)
    assert (
        "DDP does not share the gradients of parameters that were frozen, or not in the model, when fitting started."
        in " ".join(texts)
    )
    assert same(one["masks"], two["masks"])
    assert one["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert (one["state"]["backbone.weight"] != 0).all()
