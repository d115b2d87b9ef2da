"""Two real processes with sharded weights (FSDP2, gloo): every fit of ``fsdp_run`` runs once, and is read here."""

from __future__ import annotations

import fsdp_run
import pytest
import torch
from helpers import rows, same
from processes import results, run_on_two_ranks

REFUSED = ("neurons", "tensor parallel", "replicated", "not sharded", "fixed", "artifact", "averages")
PRUNED = [name for name in fsdp_run.RUNS if name not in (*REFUSED, "round trips", "uneven")]
WEIGHTS = ("first.weight", "last.weight", "one.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    fsdp_run.resumed(folder / "alone", 1, None, file=True)  # one of the runs resumes from it
    run_on_two_ranks("fsdp_run.py", folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return results(folder)


@pytest.mark.parametrize("name", PRUNED)
def test_masks_and_weights_have_the_same_bits_on_both_ranks(ranks, name):
    one, two = (found[name][0] for found in ranks)
    assert same(one["masks"], two["masks"])
    assert all(same(one["state"][key], two["state"][key]) for key in WEIGHTS)
    assert len(one["masks"]) > 5


@pytest.mark.parametrize("name", PRUNED)
def test_the_target_is_met_exactly_with_true_zeros(ranks, name):
    found = ranks[1][name][0]
    weights = [found["state"][key] for key in WEIGHTS]
    if name != "stopped":
        kept = round((0.25 if name == "floors" else 0.3) * sum(weight.numel() for weight in weights))
        assert sum(int(weight.count_nonzero()) for weight in weights) == kept
    assert same(torch.cat([weight.flatten() != 0 for weight in weights]), found["masks"][-1])
    assert all(int(weight.count_nonzero()) > 0 for weight in weights)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train", {"held": "train"}),
        ("loader", {"held": fsdp_run.held_out()}),  # batches of 11: six samples for one rank, five for the other
        ("both", {"held": fsdp_run.held_out(), "train_gradients": True}),
        ("floors", {"held": "train", **fsdp_run.FLOORS}),
    ],
)
def test_two_ranks_match_one_process_that_gets_the_union_of_their_batches(ranks, tmp_path, name, options):
    alone, two = fsdp_run.union(tmp_path, 1, fit=fsdp_run.double, **options), ranks[0][name][0]
    assert same(alone["masks"], two["masks"])
    for key, value in alone["state"].items():
        torch.testing.assert_close(two["state"][key], value)
    assert bool(alone["losses"]) == (options["held"] != "train")
    assert two["losses"] == pytest.approx(alone["losses"])


def test_shards_of_different_sizes_give_the_same_counts_on_both_ranks(ranks):
    one, two = (found["uneven"][0] for found in ranks)
    assert same(one["masks"], two["masks"])
    weights = [value for key, value in one["state"].items() if key.endswith("weight") and value.dim() == 2]
    assert len(weights) == 5
    assert sum(int(weight.count_nonzero()) for weight in weights) == round(0.3 * sum(w.numel() for w in weights))
    assert all(int(weight.count_nonzero()) >= 0.2 * weight.numel() for weight in weights)
    assert one["sparsity"] == two["sparsity"] == pytest.approx(0.7, abs=0.0001)


def test_the_held_out_pass_does_not_change_the_gradients(ranks):
    found = ranks[0]["traces"][0]
    assert found["unchanged"] == [True] * len(found["masks"])
    assert found["complete"] == len(found["masks"])


def test_no_stale_weights_remain_after_a_held_out_loss_that_is_not_finite(ranks):
    assert same(ranks[0]["after a pass"][0], ranks[0]["without a pass"][0])
    assert "the held-out loss is bad on another rank" in " ".join(ranks[0]["not finite"][1])


def test_sharding_and_gathering_restores_whole_tensors(ranks):
    assert [found["round trips"][0] for found in ranks] == [[True] * 12] * 2


@pytest.mark.parametrize(
    ("whole", "rest"), [("whole", "half"), ("whole", "frozen"), ("whole, in parts", "half, in parts")]
)
def test_resuming_gives_the_same_bits(ranks, whole, rest):
    whole, rest = (ranks[0][name][0] for name in (whole, rest))
    assert same(whole["masks"][-len(rest["masks"]) :], rest["masks"])
    # each rank has its own running statistics, and those of one rank are saved
    keys = [key for key in whole["state"] if "running" not in key]
    assert same([whole["state"][key] for key in keys], [rest["state"][key] for key in keys])


def test_a_sharded_run_resumes_in_one_process(ranks, folder, tmp_path):
    resumed = fsdp_run.resumed(tmp_path, 1, folder / "file" / "epoch=2.ckpt", file=True)
    assert resumed["sparsity"] == ranks[0]["half"][0]["sparsity"]
    assert len(resumed["masks"]) == len(ranks[0]["half"][0]["masks"]) == len(ranks[0]["from one"][0]["masks"])


def test_a_checkpoint_in_one_file_has_whole_plain_tensors_with_the_zeros(ranks, folder):
    saved = torch.load(folder / "file" / "epoch=4.ckpt", weights_only=False)
    assert all(type(value) is torch.Tensor for value in saved["state_dict"].values())
    assert same([saved["state_dict"][key] for key in WEIGHTS], [ranks[0]["whole"][0]["state"][key] for key in WEIGHTS])


def test_training_that_ends_early_leaves_the_pruned_weights_pruned(ranks, folder):
    found, logged = ranks[0]["stopped"][0], rows(folder / "stopped")
    assert 0 < logged[-1]["autoprune/sparsity"] == found["sparsity"] < 0.69


def test_rank_zero_logs_values_of_whole_layers(ranks, folder):
    logged, found = rows(folder / "logs"), ranks[0]["redrawn"][0]
    assert logged[-1]["autoprune/sparsity"] == found["sparsity"]
    assert sum(row["autoprune/pruned"] - row["autoprune/revived"] for row in logged) == sum(
        int((found["state"][key] == 0).sum()) for key in WEIGHTS
    )
    table = (folder / "logs" / "autoprune_layers.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[3]) for line in table] == [int(found["state"][key].count_nonzero()) for key in WEIGHTS]
    assert ranks[0]["example"][0]["metrics"]["autoprune/flops"] == pytest.approx(1 - found["sparsity"])


def test_settings_that_do_not_work_with_sharded_weights_are_refused(ranks):
    texts = {name: ranks[0][name][0] for name in REFUSED}
    assert texts == {name: ranks[1][name][0] for name in REFUSED}
    yet = "does not work with weights that are sharded (ModelParallelStrategy) yet: leave it out, or use"
    assert texts == {
        "neurons": f'AutoPruneError: `granularity="neuron"` {yet} `strategy="ddp"`.',
        "artifact": f'AutoPruneError: `log_artifact=True` {yet} `strategy="ddp"`.',
        "averages": f'AutoPruneError: EMAWeightAveraging {yet} `strategy="ddp"`.',
        "tensor parallel": "AutoPruneError: `tensor_parallel_size` of ModelParallelStrategy is 2, and only"
        " weights that are sharded over data-parallel ranks can be pruned: use `data_parallel_size=2,"
        " tensor_parallel_size=1`.",
        "replicated": "AutoPruneError: Layer 'first' is not sharded over all 2 ranks, but laid out as (Replicate(),"
        ' Shard(dim=0)) over 2: call `fully_shard` with `mesh=self.device_mesh["data_parallel"]`.',
        "not sharded": "AutoPruneError: Layer 'last' is not sharded, so its weights would differ between the ranks:"
        " apply `fully_shard` to it or to a module around it in `configure_model`, or exclude the layer.",
        "fixed": "AutoPruneError: A fixed part of the training set can't be held out on 2 ranks, since each rank draws"
        " its own samples: use `redraw_held_out=True` or a DataLoader.",
    }
