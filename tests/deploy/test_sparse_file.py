from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from helpers import sparse
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_autoprune import AutoPruneError
from lightning_autoprune.deploy.sparse_file import load_sparse, load_sparse_into, save_sparse, sparse_metadata

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
SMALL = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
WHOLE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64]


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


@pytest.mark.parametrize("density", [0.0, 0.003, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [*FLOATS, *SMALL, *WHOLE], ids=str)
def test_every_dtype_is_restored_exactly(dtype, density, path):
    values = (100 * sparse(40, 30, density=density)).abs().to(dtype)
    save_sparse({"a": values}, path)
    back = load_sparse(path)["a"]
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))


def test_unusual_shapes_names_and_strides_are_restored(path):
    state = {
        "": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "ä/b c.weight": sparse(3, 4, 5),
        "transposed": sparse(20, 30).T,
        "strided": sparse(64, 64)[::2, ::3],
        "zeros": torch.zeros(1000),
        "count": torch.tensor(0),
    }
    save_sparse(state, path)
    back = load_sparse(path)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_special_values_keep_their_bits_and_negative_zeros_become_zeros(path):
    values = torch.tensor([float("nan"), float("-inf"), 1e-45, -1e-45, 0.0, -0.0] + [0.0] * 100)
    save_sparse({"a": values, "zeros": torch.full((1000,), -0.0)}, path)
    back = load_sparse(path)
    assert same_bits(back["a"][:5], values[:5])
    assert same_bits(back["a"][5:], torch.zeros(101))
    assert same_bits(back["zeros"], torch.zeros(1000))
    assert os.path.getsize(path) < 700


def test_denormals_keep_their_bits_if_the_processor_flushes_them(path):
    halves = {dtype: torch.finfo(dtype).smallest_normal / 2 for dtype in FLOATS}
    state = {str(dtype): torch.tensor([x, -x] + [0.0, -0.0] * 50, dtype=dtype) for dtype, x in halves.items()}
    state["complex imaginary"] = torch.complex(torch.zeros(102), state["torch.float32"])
    state["integers"] = torch.tensor([-(2**63)] + [0] * 100)
    assert all(tensor.count_nonzero() for tensor in state.values())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        save_sparse(state, path)
        back = load_sparse(path)
    finally:
        torch.set_flush_denormal(False)
    for name, tensor in state.items():
        assert torch.equal(back[name].view(torch.uint8), (tensor + 0).view(torch.uint8))  # -0.0 + 0 is 0.0


def test_only_kept_values_take_space(path):
    sizes = []
    for density in (0.01, 0.02):
        weight = sparse(1000, 1000, density=density)
        save_sparse({"a": weight}, path)
        sizes.append(os.path.getsize(path))
        assert sizes[-1] < 5.3 * int(weight.count_nonzero()) + 600  # 4 bytes per value, less than 11 bits per position
    assert sizes[1] > 1.8 * sizes[0]


def test_tied_weights_are_stored_once_and_restored_as_tied(path):
    model = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))
    save_sparse(model, path)
    single = os.path.getsize(path)
    model[1].weight = model[0].weight
    save_sparse(model, path)
    assert os.path.getsize(path) < 0.6 * single
    back = load_sparse(path)
    assert back["1.weight"] is back["0.weight"]
    assert torch.equal(back["0.weight"], model[0].weight)
    load_sparse_into(nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False)), path)


def test_different_views_of_one_storage_are_stored_separately(path):
    whole = sparse(4, 50, density=0.5)
    state = {"whole": whole, "row": whole[0], "column": whole[:, 0], "flat": whole.view(-1)}
    save_sparse(state, path)
    assert all(torch.equal(value, state[name]) for name, value in load_sparse(path).items())


def test_a_file_is_loaded_into_a_model_of_another_dtype_in_place(path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model[3].weight.data.copy_(sparse(2, 16, density=0.2))
    save_sparse(model, path)
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()
    weight = other[3].weight
    load_sparse_into(other, path)
    assert other[3].weight is weight
    assert all(
        torch.equal(value.double(), other.state_dict()[name].double()) for name, value in load_sparse(path).items()
    )


def test_a_model_of_another_architecture_is_refused_with_every_key_and_left_as_it_was(path):
    save_sparse(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), path)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(5, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AutoPruneError) as error:
        load_sparse_into(model, path)
    for part in (
        "has another architecture than Sequential: '1.weight' is missing in the file; '1.bias' is missing in the",
        "'2.weight' is not in the model",
        "Build the model that was saved",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(AutoPruneError, match=r"'0.weight' has shape \(3, 4\) in the file and \(4, 3\) in the model"):
        load_sparse_into(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(3, 2)), path)


def test_metadata_has_version_sparsity_and_metrics(path):
    import lightning_autoprune

    weight = torch.zeros(10, 10)
    weight[0, :5] = 1
    save_sparse({"a": weight, "b": torch.ones(3)}, path, metrics={"val_error": 0.25, "step": 7})
    assert sparse_metadata(path) == {
        "version": lightning_autoprune.__version__,
        "sparsity": {"a": 0.95},
        "metrics": {"val_error": 0.25, "step": 7.0},
    }


def test_metadata_has_the_sparsity_of_tied_tensors_and_of_tensors_stored_with_zeros(path):
    weight, codes = torch.zeros(10, 10), torch.arange(1, 101, dtype=torch.int8)
    weight[0], codes[:3] = 1, 0
    save_sparse({"a": weight, "": codes, "tied": weight, "tied codes": codes, "dense": torch.ones(3)}, path)
    assert sparse_metadata(path)["sparsity"] == pytest.approx({"a": 0.9, "": 0.03, "tied": 0.9, "tied codes": 0.03})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "'a' is a int, not a tensor: leave it out and store it elsewhere"),
        (torch.ones(2, 2).to_sparse(), "'a' is of layout torch.sparse_coo, dtype torch.float32; only dense tensors"),
        (torch.ones(2, device="meta"), "'a' is on the meta device; only dense tensors with values"),
        (torch.ones([1] * 65), "'a' has 65 dimensions; at most 64 can be stored: reshape it first"),
        (nn.UninitializedParameter(), "'a' is lazy and has no shape yet: run one batch through the model first"),
    ],
)
def test_values_that_are_not_dense_tensors_are_refused_by_name(value, message, path):
    with pytest.raises(AutoPruneError, match=message):
        save_sparse({"a": value}, path)
    assert not path.exists()


def test_a_lazy_model_is_neither_saved_nor_loaded_into(path):
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    message = "'1.weight' is lazy and has no shape yet: run one batch through the model first"
    with pytest.raises(AutoPruneError, match=message):
        save_sparse(model, path)
    assert not path.exists()
    save_sparse(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), path)
    with pytest.raises(AutoPruneError, match=message):
        load_sparse_into(model, path)


def test_a_failed_save_leaves_only_the_old_file(path, tmp_path, monkeypatch):
    save_sparse({"a": torch.ones(3)}, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_sparse({"a": torch.zeros(3)}, path)
    assert torch.equal(load_sparse(path)["a"], torch.ones(3))
    assert os.listdir(tmp_path) == [path.name]


def test_a_missing_file_raises_an_oserror_with_its_name(path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_sparse(path)


def test_conjugate_views_keep_their_values(path):
    x = torch.randn(20, dtype=torch.complex64)
    save_sparse({"a": x, "b": x.conj(), "c": x.conj().imag}, path)
    back = load_sparse(path)
    assert torch.equal(back["b"], x.conj().resolve_conj())
    assert torch.equal(back["c"], -x.imag)


@pytest.mark.parametrize("size", [1000, 100_000])  # torch reuses the memory of small and of large tensors
@pytest.mark.parametrize("lazy", [torch.conj, lambda x: x.conj().imag], ids=["conjugate", "negative"])
def test_lazily_conjugated_or_negated_tensors_are_not_mistaken_for_tied(lazy, size, path):
    state = {str(i): lazy(torch.full((size,), complex(i, i + 1))) for i in range(10)}
    save_sparse({**state, "tied": state["3"]}, path)
    back = load_sparse(path)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert back["tied"] is back["3"]


@pytest.mark.parametrize("size", [1000, 100_000])
def test_tensors_that_are_created_on_access_are_not_mistaken_for_tied(size, path):
    class CreatedOnAccess(dict):
        def items(self):
            return ((name, torch.full((size,), value)) for name, value in super().items())

    save_sparse(CreatedOnAccess({str(i): float(i) for i in range(10)}), path)
    back = load_sparse(path)
    assert [value.unique().tolist() for value in back.values()] == [[i] for i in range(10)]


def test_a_missing_folder_raises_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_sparse({"a": torch.ones(2)}, tmp_path / "no" / "a.safetensors")


def test_a_highly_compressed_file_of_zeros_can_be_loaded(path):
    save_sparse({"a": torch.zeros(5_000_000)}, path)
    assert load_sparse(path)["a"].count_nonzero() == 0


def test_values_at_unaligned_offsets_are_restored():
    """A tensor of one entry needs no reordering of its bytes, which may start at any offset."""
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.tensor(7), "c": torch.tensor([0.5]), "d": torch.ones(5)}
    save_sparse(tensors, "f.safetensors")
    back = load_sparse("f.safetensors")
    assert all(same_bits(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("state", "metrics", "name"), [({2: torch.ones(3), 10: torch.ones(3)}, None, "2"), ({}, {"a": 0.5, 7: 1.0}, "7")]
)
def test_names_that_are_not_strings_are_refused(state, metrics, name, path):
    message = f"The name {name} is of the type int; names of tensors and metrics must be strings: '{name}'"
    with pytest.raises(AutoPruneError, match=message):
        save_sparse(state, path, metrics)
    assert not path.exists()


def test_a_sharded_tensor_is_refused_and_its_full_tensor_is_saved(path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(sparse(8, 6), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(AutoPruneError, match=r"'a' is sharded, .* save the result of `full_tensor\(\)`"):
            save_sparse({"a": weight}, path)
        save_sparse({"a": weight.full_tensor()}, path)
    finally:
        dist.destroy_process_group()
    assert torch.equal(load_sparse(path)["a"], sparse(8, 6))


class WithState(nn.Linear):
    """A layer with an extra state, as TransformerEngine's have one."""

    def __init__(self, state):
        super().__init__(3, 2)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_an_extra_state_that_is_no_tensor_is_left_out_with_a_warning_and_stays_in_the_model(as_state_dict, path):
    model, other = (nn.Sequential(WithState(state), nn.Linear(2, 2)) for state in ({"version": 3}, {"version": 4}))
    with pytest.warns(UserWarning, match=r"A sparse file has tensors only. Left out are '0._extra_state': `load_spa"):
        save_sparse(model.state_dict() if as_state_dict else model, path)
    load_sparse_into(other, path)
    assert other[0].state == {"version": 4}
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[1].weight, model[1].weight)


def test_an_extra_state_that_is_a_tensor_is_stored_and_one_without_content_is_no_matter(path, recwarn):
    model, other = (nn.Sequential(WithState(torch.full((3,), i)), WithState(None)) for i in range(2))
    save_sparse(model, path)
    load_sparse_into(other, path)
    assert torch.equal(other[0].state, torch.zeros(3))
    assert not len(recwarn)


def test_a_tensor_that_is_missing_in_the_file_is_an_error_beside_an_extra_state(path):
    save_sparse({"0.weight": torch.eye(3)}, path)
    with pytest.raises(AutoPruneError, match=r"'0\.bias' is missing in the file; '0\.weight' has shape"):
        load_sparse_into(nn.Sequential(WithState({"version": 3})), path)


def test_a_state_of_another_kind_in_a_state_dict_is_refused_by_name(path):
    with pytest.raises(AutoPruneError, match="'a' is a dict, not a tensor: leave it out and store it elsewhere"):
        save_sparse({"a": {"version": 3}}, path)
