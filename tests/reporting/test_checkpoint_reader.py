"""Checkpoints of every kind are read, and anything else is refused with a clear message."""

from __future__ import annotations

import random
import re
from argparse import Namespace
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Net, csv_logger, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.parsing import AttributeDict
from safetensors.torch import save_file
from torch import nn
from torchmetrics.classification import BinaryAccuracy

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
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.25)
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


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_with_code_is_read_without_it_and_nothing_runs(tmp_path, legacy):
    content = {"state_dict": {"a": torch.eye(2)}, "hyper_parameters": OpensFile()}
    torch.save(content, tmp_path / "hostile.ckpt", _use_new_zipfile_serialization=not legacy)
    saved = read_checkpoint(tmp_path / "hostile.ckpt")
    assert torch.equal(saved.state["a"], torch.eye(2))
    assert not Path("touched").exists()


class WithHyperparameter(Example):
    def __init__(self, setting):
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:Attribute 'setting'")
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    "setting",
    [
        Path("data"),
        np.float64(0.1),
        np.arange(3),
        Namespace(lr=0.1),
        BinaryAccuracy(),
        defaultdict(list, a=[1]),
        nn.ReLU(),
        nn.functional.relu,
        partial(nn.Linear, 3),
        Counter("aab"),
        {frozenset({1}), np.int64(3)},
        AttributeDict(a=Path("b")),
    ],
    ids=lambda setting: type(setting).__name__,
)
def test_objects_among_the_hyperparameters_are_passed_over(setting, weights_only, tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="a", save_weights_only=weights_only)
    model, callback = WithHyperparameter(setting), AutoPruneCallback(target_sparsity=0.8)
    fit([callback, saving], model=model, enable_checkpointing=True, epochs=2)
    saved = read_checkpoint(tmp_path / "a.ckpt")
    assert saved.as_dict()["sparsity"] == pytest.approx(callback.sparsity)
    assert saved.phase == (None if weights_only else "frozen")
    assert all(torch.equal(saved.state[name], tensor) for name, tensor in model.state_dict().items())


class WithObjects:
    """A callback's state that is not plain, beside which the pruning state is read strictly."""


def test_a_stand_in_within_the_pruning_state_is_refused(pruned, tmp_path):
    checkpoint = torch.load(pruned[0] / "epoch=1.ckpt", weights_only=True)
    checkpoint["callbacks"]["AutoPruneCallback"]["report"] = WithObjects()
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(AutoPruneError, match=r"state in \S*changed.ckpt can't be read"):
        read_checkpoint(tmp_path / "changed.ckpt")


# Names that were changed, and other places and kinds of tensors


def rename(folder, path, change, epoch=4):
    """Save a checkpoint of the run with another state dict."""
    checkpoint = torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True)
    checkpoint["state_dict"] = change(checkpoint["state_dict"])
    torch.save(checkpoint, path)
    return read_checkpoint(path)


@pytest.mark.parametrize("epoch", [0, 1, 4])
@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"model.{key}",
        lambda key: f"_forward_module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("first.", "first._orig_mod."),
        lambda key: key.replace("first", "encoder.0"),
    ],
)
def test_layers_whose_keys_were_renamed_are_reported_by_their_names_in_the_run(pruned, tmp_path, change, epoch):
    before = read_checkpoint(pruned[0] / f"epoch={epoch}.ckpt")
    saved = rename(pruned[0], tmp_path / "a", lambda state: {change(key): x for key, x in state.items()}, epoch)
    if "encoder" in change("first"):  # only the other layer has its name, as nothing else says what this one is
        assert [row.name for row in saved.layers()] == ["last"]
        assert saved.missing == ("first",)
        return
    assert saved.layers() == before.layers()
    assert saved.missing == ()


def test_a_layer_under_two_names_is_the_one_that_has_its_zeros(pruned, tmp_path):
    def add_average(state):
        dense = {f"ema.{key}": torch.ones_like(x) for key, x in state.items()}
        return dense | {f"model.{key}": x for key, x in state.items()}

    assert rename(pruned[0], tmp_path / "a", add_average).layers() == pruned[1].layers()


def test_layers_that_are_not_in_the_file_are_named(pruned, tmp_path):
    saved = rename(pruned[0], tmp_path / "a", lambda state: {k: x for k, x in state.items() if "first" not in k})
    assert [row.name for row in saved.layers()] == ["last"]
    assert saved.describe().endswith("The masks are final. Layers of the run that are not in the file: 'first'.")
    assert saved.as_dict()["missing"] == ["first"]


def test_a_file_with_none_of_the_layers_is_reported_by_its_tensors(pruned, tmp_path):
    saved = rename(pruned[0], tmp_path / "a", lambda state: {"other.weight": torch.eye(5)})
    assert [(row.name, row.kept) for row in saved.layers()] == [("other", 5)]
    assert "None of the run's layers ('first', 'last') is in the file: the layers below are all" in saved.describe()


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        ({"model": {"a.weight": torch.eye(4)}, "epoch": 3}, "model"),
        ({"module": {"a.weight": torch.eye(4)}, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}, "module"),
        ({"rng": torch.ones(9), "model": {"a.weight": torch.eye(4)}}, "model"),
        (
            {"model_ema": {"a.weight": torch.ones(4, 4), "n": torch.ones(1)}, "model": {"a.weight": torch.eye(4)}},
            "model",
        ),
        ({"run": {"policy": {"a.weight": torch.eye(4)}}}, "run.policy"),
        ({"state_dict": {}, "model": {"a.weight": torch.eye(4)}}, "model"),
    ],
)
def test_weights_in_an_entry_of_the_file_are_read_and_the_entry_is_named(content, entry, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    saved = read_checkpoint(tmp_path / "a.pt")
    assert [(row.name, row.kept) for row in saved.layers()] == [("a", 4)]
    assert saved.entry == entry
    others = "; there are also 'model_ema'" if "model_ema" in content else ""
    assert saved.describe().endswith(f"The weights are those in the entry '{entry}'{others}.")


def test_entries_that_are_not_tensors_are_named(tmp_path):
    state = {"a.weight": torch.eye(2), "a._extra_state": {"version": 3}, "b": torch.zeros(3, 3, device="meta")}
    for content in (state, {"state_dict": {**state, "c": Path("x")}}):
        torch.save(content, tmp_path / "a.pt")
        saved = read_checkpoint(tmp_path / "a.pt")
        assert list(saved.state) == ["a.weight"]
        assert "passed over: 'a._extra_state' (of the type dict), 'b' (on the meta device, " in saved.describe()
    assert saved.left_out["c"] in ("of the type PosixPath", "of the type WindowsPath")


class Subclass(torch.Tensor):
    """A tensor of a type that only this module knows."""


def test_tensors_of_a_subclass_are_read_as_tensors(tmp_path):
    weight = torch.eye(3).as_subclass(Subclass)
    weight.note = "an attribute"
    parameter = nn.Parameter(torch.eye(3))
    parameter.note = OpensFile()
    torch.save({"a": weight, "b": parameter}, tmp_path / "a.pt")
    saved = read_checkpoint(tmp_path / "a.pt")
    assert {type(x) for x in saved.state.values()} == {torch.Tensor}
    assert [row.kept for row in saved.layers()] == [3, 3]


@pytest.mark.parametrize(("entry", "advice"), [(".metadata", "consolidate_checkpoint"), ("checkpoint", "zero_checkp")])
def test_a_folder_of_a_sharded_checkpoint_is_refused_with_the_way_to_one_file(entry, advice, tmp_path):
    (tmp_path / entry).mkdir() if entry == "checkpoint" else (tmp_path / entry).touch()
    with pytest.raises(AutoPruneError, match=f"is a folder, which .* saved. Make one file of it first.*{advice}"):
        read_checkpoint(tmp_path)


def test_a_whole_module_is_refused_with_what_to_save(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(AutoPruneError, match=r"holds Linear, not a state dict or a checkpoint: save `model.state_dict"):
        read_checkpoint(tmp_path / "model.pt")


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
        {"report": {"history": {**RunHistory(["gone"]).state_dict(), "names": 3}}},
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


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("with_object", [False, True])
def test_weights_of_any_layout_and_dtype_are_counted_and_kept_exactly(with_object, tmp_path):
    kinds = [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.uint16, torch.complex64]
    state = {str(dtype): torch.eye(4).to(dtype) for dtype in kinds} | {"sparse": torch.eye(4).to_sparse()}
    state["csr"] = torch.eye(4).to_sparse_csr()
    if with_object:
        state["object"] = Path("a")
    torch.save(state, tmp_path / "kinds.pt")
    saved = read_checkpoint(tmp_path / "kinds.pt")
    assert [row.kept for row in saved.layers()] == [4] * 7
    assert saved.state["torch.float8_e4m3fn"].dtype == torch.float8_e4m3fn
    assert torch.equal(saved.state["sparse"], torch.eye(4))


def test_a_file_without_any_values_is_refused_with_what_it_has(tmp_path):
    torch.save({"b": torch.zeros(3, 3, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(AutoPruneError, match=r"meta.pt holds no tensors .*: 'b' is on the meta device, without values"):
        read_checkpoint(tmp_path / "meta.pt")


@pytest.mark.filterwarnings("ignore")
def test_zeros_of_quantized_weights_are_counted(tmp_path):
    torch.save({"a": torch.quantize_per_tensor(torch.eye(4), 0.1, 3, torch.quint8)}, tmp_path / "a.pt")
    assert [row.kept for row in read_checkpoint(tmp_path / "a.pt").layers()] == [4]


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
