"""Checkpoints of every kind are read, and anything else is refused with a clear message."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from helpers import Net, csv_logger, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from lightning_autoprune import AutoPruneCallback, AutoPruneError, save_sparse
from lightning_autoprune.reporting.checkpoint_reader import read_checkpoint
from lightning_autoprune.reporting.layer_table import format_layer_table, sum_layers
from lightning_autoprune.reporting.run_history import RunHistory


class Example(Net):
    example_input_array = torch.zeros(1, 12)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A run with a checkpoint per epoch, in the phases dense, pruning, frozen, frozen, frozen."""
    folder = tmp_path_factory.mktemp("run")
    callback = AutoPruneCallback(target_sparsity=0.8)
    saving = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", monitor="val_loss")
    fit(
        [callback, saving],
        model=Example(),
        val=loader(seed=3),
        enable_checkpointing=True,
        logger=csv_logger(folder),
        epochs=5,
    )
    return folder, callback


@pytest.mark.parametrize(("epoch", "phase"), [(0, "dense"), (1, "pruning"), (4, "frozen")])
def test_a_checkpoint_has_its_phase_layers_and_history(pruned, epoch, phase):
    folder, callback = pruned
    saved = read_checkpoint(folder / f"epoch={epoch}.ckpt")
    assert (saved.phase, saved.epoch, saved.step) == (phase, epoch, 8 * (epoch + 1))
    state = torch.load(saved.path, weights_only=True)["state_dict"]
    assert list(saved.weights) == ["first", "last"]
    assert torch.equal(saved.weights["first"], state["first.weight"])
    first, last = saved.layers()
    assert first.kept == int(state["first.weight"].count_nonzero())
    assert (first.flops, last.flops) == (2 * 192, 2 * 64)
    assert (first.revived is None) == (phase == "dense")
    assert len(saved.history.points) == epoch + (phase != "dense") or phase == "dense"
    if phase == "frozen":
        assert saved.layers() == callback.layers()
        assert saved.history.curves["all"][-1][1] == pytest.approx(callback.sparsity)
        assert [point[0] for point in saved.history.points] == [7, 15, 23, 31, 39]
        figures = saved.as_dict()
        assert figures["sparsity"] == pytest.approx(0.8, abs=0.01)
        assert figures["compression"] == pytest.approx(5, abs=0.1)
        assert figures["path"][-1]["sparsity"] == callback.sparsity


def test_zeros_are_counted_without_a_pruning_state(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))
    model[0].weight.data[0] = 0
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save(model.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_sparse(model, tmp_path / "sparse.safetensors")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for path in tmp_path.iterdir():
        saved = read_checkpoint(path)
        assert saved.phase is None
        assert [(row.name, row.kept, row.weights) for row in saved.layers()] == [("0", 4, 8)]
        assert saved.history.curves == {}


def test_a_model_without_nonzero_weights_has_no_compression(tmp_path):
    torch.save({"a": torch.zeros(2, 2)}, tmp_path / "zeros.pt")
    assert read_checkpoint(tmp_path / "zeros.pt").as_dict()["compression"] is None


# Files that can't be read


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        read_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02", b"PK\x03\x04 and no more", bytes(range(256)) * 9])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(
        AutoPruneError, match=r"other.ckpt is not a checkpoint, or not a complete one: \w+Error.*\. Give a"
    ):
        read_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(pruned, tmp_path):
    whole = (pruned[0] / "epoch=1.ckpt").read_bytes()
    for share in (0.01, 0.3, 0.6, 0.9, 0.999):
        path = tmp_path / "cut.ckpt"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(AutoPruneError, match=r"cut.ckpt is not a checkpoint, or not a complete one"):
            read_checkpoint(path)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    save_sparse({"a": torch.eye(30)}, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-5])
    with pytest.raises(AutoPruneError, match="cut is not a valid sparse file"):
        read_checkpoint(tmp_path / "cut")


class OpensFile:
    """An object whose pickle opens a file when it is loaded."""

    def __reduce__(self):
        return (open, ("touched", "w"))


def test_a_checkpoint_with_code_is_refused_and_nothing_runs(tmp_path):
    torch.save({"state_dict": {"a": torch.eye(2)}, "hyper_parameters": OpensFile()}, tmp_path / "hostile.ckpt")
    with pytest.raises(AutoPruneError, match=r"holds a Python object \(\S*open\).*save_weights_only=True"):
        read_checkpoint(tmp_path / "hostile.ckpt")
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list, not a state dict or a checkpoint"),
        ({"a": 1}, "holds no tensors by name, so it is not a checkpoint of a model"),
        ({"state_dict": 3}, "holds no tensors by name"),
    ],
)
def test_other_objects_saved_by_torch_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "things.pt")
    with pytest.raises(AutoPruneError, match=message):
        read_checkpoint(tmp_path / "things.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"pruner": {}},
        {"pruner": {"auxiliary": 3}},
        {"report": None},
        {"report": {"history": {**RunHistory(["gone"]).state_dict()}}},
        {"flops": {"first": "many"}},
    ],
    ids=str,
)
def test_an_invalid_pruning_state_is_refused(pruned, tmp_path, change):
    checkpoint = torch.load(pruned[0] / "epoch=1.ckpt", weights_only=True)
    checkpoint["callbacks"]["AutoPruneCallback"].update(change)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(AutoPruneError, match=r"state in \S*changed.ckpt can't be read \(\w+Error.*the file was"):
        read_checkpoint(tmp_path / "changed.ckpt")


def test_corrupted_checkpoints_are_read_or_refused_with_a_message(pruned, tmp_path):
    whole, rng = (pruned[0] / "epoch=4.ckpt").read_bytes(), random.Random(0)
    path, refused = tmp_path / "corrupted.ckpt", 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            read_checkpoint(path).as_dict()
        except AutoPruneError:
            refused += 1
    assert refused > 10


def test_weights_of_any_layout_and_dtype_are_counted_and_kept_exactly(tmp_path):
    kinds = [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.complex64]
    state = {str(dtype): torch.eye(4).to(dtype) for dtype in kinds} | {"sparse": torch.eye(4).to_sparse()}
    torch.save(state, tmp_path / "kinds.pt")
    saved = read_checkpoint(tmp_path / "kinds.pt")
    assert [row.kept for row in saved.layers()] == [4] * 5
    assert saved.state["torch.float8_e4m3fn"].dtype == torch.float8_e4m3fn
    assert torch.equal(saved.state["sparse"], torch.eye(4))


def test_weights_without_values_are_refused_by_name(tmp_path):
    torch.save({"a": torch.eye(2), "b": torch.zeros(3, 3, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(AutoPruneError, match=r"'b' in \S*meta.pt is on the meta device, without values: save"):
        read_checkpoint(tmp_path / "meta.pt")


def test_a_file_with_only_biases_has_no_weights(tmp_path):
    torch.save({"a.bias": torch.zeros(4)}, tmp_path / "biases.pt")
    saved = read_checkpoint(tmp_path / "biases.pt")
    assert saved.describe() == "It has no weights: no tensor has two or more dimensions."
    assert format_layer_table([sum_layers(saved.layers())])[1] == [["all", "", "0", "0", "0.00%"]]


def anonymous_memory() -> int:
    """Return this process's memory that is not mapped from a file, in MiB."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) >> 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux has /proc")
def test_a_huge_file_is_mapped_instead_of_read(tmp_path):
    path = tmp_path / "huge.pt"
    torch.save({f"layer{i}.weight": torch.zeros(4096, 4096) for i in range(3)}, path)  # 192 MiB
    before = anonymous_memory()
    saved = read_checkpoint(path)
    assert saved.as_dict()["sparsity"] == 1
    assert anonymous_memory() - before < 96
