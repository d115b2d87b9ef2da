from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from architectures import DIFFICULT, EXACT, UsedTwice, mobilenet, resnet
from torch import nn

from lightning_autoprune import AutoPruneError
from lightning_autoprune.demo.networks import lenet5
from lightning_autoprune.deploy.shrink import shrink
from lightning_autoprune.model.channels import find_channels, is_depthwise
from lightning_autoprune.model.removal_trial import RemovalTrial, fix_unremovable


def network_and_channels(name):
    make, shape = {**EXACT, **DIFFICULT}[name]
    network = make()
    return network, find_channels(network, torch.zeros(2, *shape))


@pytest.mark.parametrize("name", [*EXACT, *DIFFICULT])
def test_each_row_belongs_to_exactly_one_channel(name):
    network, channels = network_and_channels(name)
    rows = [(layer, i) for channel in channels for layer, indices in channel.made_by.items() for i in indices]
    assert len(rows) == len(set(rows))
    for layer, module in network.named_modules():
        made = sorted(i for name, i in rows if name == layer)
        if isinstance(module, nn.Linear) and made:
            assert made == list(range(module.out_features))


def test_a_flattened_convolution_channel_is_read_by_several_columns():
    channels = find_channels(lenet5(), torch.zeros(1, 1, 28, 28))
    assert len(channels) == 20 + 50 + 500 + 10
    second = channels[20 + 3]
    assert (second.made_by, second.read_by, second.fixed_reason) == ({"3": [3]}, {"7": list(range(48, 64))}, "")


def test_additions_tie_the_channels_of_several_layers():
    channels = find_channels(resnet(), torch.zeros(2, 3, 16, 16))
    tied = next(channel for channel in channels if "3.conv2" in channel.made_by)
    assert tied.made_by == {"3.conv2": [0], "3.shortcut.0": [0]}
    assert tied.passes == {"3.norm2": [0], "3.shortcut.1": [0]}
    assert tied.read_by == {"4.conv1": [0], "4.shortcut.0": [0]}


def test_channels_pass_through_a_depthwise_convolution():
    network = mobilenet()
    channels = find_channels(network, torch.zeros(2, 3, 16, 16))
    wide = next(channel for channel in channels if "3.layers.0" in channel.made_by)
    assert is_depthwise(network[3].layers[3])
    assert not is_depthwise(network[3].layers[0])
    assert wide.passes == {"3.layers.1": [0], "3.layers.3": [0], "3.layers.4": [0]}
    assert wide.read_by == {"3.layers.6": [0]}


def test_a_layer_used_twice_makes_and_reads_the_same_channels():
    channels = find_channels(UsedTwice(), torch.zeros(2, 5))
    assert (channels[2].made_by, channels[2].read_by) == ({"a": [2], "b": [2]}, {"b": [2], "c": [2]})


def test_a_gate_ties_the_channels_that_it_multiplies():
    _, channels = network_and_channels("gated")
    assert sorted(channels[1].made_by["a"]) == [1, 7]


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("lenet5", "9", "it is an output of the model"),
        ("encoder", "embed", "it goes through 'layers.layers.0.self_attn', a MultiheadAttention"),
        ("normalized", "0", "it goes through '1', a GroupNorm"),
        ("grouped", "0", "'2' is a grouped convolution"),
        ("tied", "a", "'a' shares or computes its weight"),
        ("attention", "down", "it is an output of the model"),
    ],
)
def test_a_fixed_channel_has_its_reason(name, layer, why):
    _, channels = network_and_channels(name)
    fixed = {channel.fixed_reason for channel in channels if layer in channel.made_by}
    assert fixed == {why}


def test_finding_channels_leaves_the_network_as_it_was():
    network = resnet()
    network[2].eval()
    network[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    find_channels(network, torch.randn(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [m.training for m in network] == [m is not network[2] for m in network]
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_channels_are_found_under_no_grad():
    with torch.no_grad():
        assert len(find_channels(lenet5(), torch.zeros(1, 1, 28, 28))) == 580


def test_a_missing_torch_pruning_is_named_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(AutoPruneError, match=r"torch-pruning: pip install 'lightning-autoprune\[shrink\]'"):
        find_channels(lenet5(), torch.zeros(1, 1, 28, 28))


def test_a_failing_layer_is_named_with_the_shape_of_the_example():
    with pytest.raises(
        AutoPruneError, match=r"could not be run on an example of shapes \[\(1, 20\)\]: layer '0' raised"
    ):
        find_channels(nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 2)), torch.zeros(1, 20))


class Recurrent(nn.Module):
    def __init__(self, kind, before, **options):
        super().__init__()
        self.before = nn.Linear(4, 6) if before else nn.Identity()
        self.layer = kind(6 if before else 4, 5, batch_first=True, **options)
        self.a, self.b = nn.LazyLinear(6), nn.Linear(6, 2)
        self(torch.zeros(1, 2, 4))

    def forward(self, x):
        return self.b(torch.relu(self.a(self.layer(torch.relu(self.before(x)))[0])))


def test_only_channels_that_a_recurrent_layer_reads_are_fixed():
    channels = find_channels(Recurrent(nn.GRU, True), torch.zeros(2, 3, 4))
    assert {c.fixed_reason for c in channels if "before" in c.made_by} == {"it is unknown which layers read 'before'"}
    assert [(c.made_by, c.read_by, c.fixed_reason) for c in channels if "a" in c.made_by][1] == (
        {"a": [1]},
        {"b": [1]},
        "",
    )
    assert len(channels) == 6 + 6 + 2


class Shifted(nn.Module):
    """The differences along a sequence, whose slices torch-pruning mistakes for slices of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 3, 1)

    def forward(self, x):
        h = self.second(self.first(x).relu())
        return self.last(h[:, :, 1:] - h[:, :, :-1])


def test_a_group_that_torch_pruning_follows_without_end_is_fixed():
    network = Shifted()
    channels = {layer: channel for channel in find_channels(network, torch.randn(2, 2, 6)) for layer in channel.made_by}
    assert channels["second"].fixed_reason == "it is unknown which layers read 'second'"
    assert not channels["first"].fixed_reason
    circular = nn.Sequential(
        nn.Conv1d(2, 2, 3), nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular"), nn.Conv1d(4, 3, 1)
    )
    assert find_channels(circular, torch.randn(2, 2, 12))


def test_all_channels_are_fixed_with_a_warning_if_the_graph_can_not_be_traced():
    network = Recurrent(nn.LSTM, False, bidirectional=True)
    with pytest.warns(UserWarning, match="All channels of Recurrent stay: its dependency graph can't be traced"):
        channels = find_channels(network, torch.zeros(2, 3, 4))
    assert [channel.made_by for channel in channels] == [
        {n: [i]} for n, rows in (("a", 6), ("b", 2)) for i in range(rows)
    ]
    assert {channel.fixed_reason for channel in channels} == {"its dependency graph can't be traced"}


def test_a_compiled_network_has_the_same_channels():
    network, x = UsedTwice(), torch.zeros(2, 5)
    found = find_channels(network, x)
    torch._dynamo.reset()
    network.compile(backend="eager")
    network(x)
    assert [channel.made_by for channel in find_channels(network, x)] == [channel.made_by for channel in found]


def test_torchscript_and_inference_mode_are_refused():
    network, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3)
    with pytest.raises(AutoPruneError, match=r"RecursiveScriptModule is TorchScript.*give the module it was made of"):
        find_channels(torch.jit.script(network), x)
    with torch.inference_mode():
        made = nn.Linear(3, 2)
        with pytest.raises(AutoPruneError, match=r"Sequential.*outside of it \(`torch.no_grad\(\)` is allowed\)"):
            find_channels(network, x)
    with pytest.raises(AutoPruneError, match="The channels of Linear are found by gradients"):
        find_channels(made, x)


class Concatenated(nn.Module):
    """Layers that read inputs concatenated with the outputs of layers, as in DenseNet."""

    def __init__(self, order):
        super().__init__()
        self.order, self.a, self.b, self.c = order, nn.Conv2d(3, 8, 1), nn.Conv2d(11, 6, 1), nn.Linear(17, 2)

    def forward(self, x):
        x = torch.cat(self.order([x, self.a(x).relu()]), 1)
        x = torch.cat(self.order([x, self.b(x).relu()]), 1)
        return self.c(x.mean((2, 3)))


@pytest.mark.parametrize(("order", "first", "second"), [(list, 3, 11), (lambda parts: parts[::-1], 0, 0)])
def test_concatenated_inputs_shift_the_columns_after_them(order, first, second):
    network, x = Concatenated(order), torch.randn(2, 3, 4, 4)
    network.a.weight.data[:4] = network.b.weight.data[:3] = 0
    channels = find_channels(network, x)
    fix_unremovable(channels, RemovalTrial(network, x))
    channel_of = {(name, i): c for c in channels for name, rows in c.made_by.items() for i in rows}
    assert channel_of["a", 1].read_by == {"b": [first + 1], "c": [1 + (3 if first else 6)]}
    assert channel_of["b", 1].read_by == {"c": [second + 1]}
    assert not any(c.fixed_reason for c in channels if "c" not in c.made_by)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = shrink(network, x)
    assert (small.a.out_channels, small.b.out_channels) == (4, 3)
    torch.testing.assert_close(small(x), network(x))


@pytest.mark.parametrize("parts", ["xxh", "hxx", "hxh", "xhx"])
def test_several_concatenated_inputs_shift_columns_or_the_channels_stay(parts):
    class Concatenates(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(sum({"x": 3, "h": 8}[part] for part in parts), 2)
            self.a.weight.data[:4] = 0

        def forward(self, x):
            tensors = {"x": x, "h": self.a(x).relu()}
            return self.b(torch.cat([tensors[part] for part in parts], -1).relu())

    network, x = Concatenates(), torch.randn(4, 3)
    separate_inputs = parts == "xhx"  # only the sum of their widths is known
    with pytest.warns(UserWarning, match="The dead channels of 'a' stay") if separate_inputs else nullcontext():
        small = shrink(network, x)
    assert small.a.out_features == (8 if separate_inputs else 4)
    torch.testing.assert_close(small(x), network(x))


def test_a_custom_autograd_function_may_be_named_like_a_concatenation():
    class MyCat(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x + y

        @staticmethod
        def backward(ctx, grad):
            return grad, grad

    class UsesMyCat(UsedTwice):
        def forward(self, x):
            return self.c(MyCat.apply(self.a(x), torch.ones(())).relu())

    assert [c.read_by for c in find_channels(UsesMyCat(), torch.zeros(2, 5)) if "a" in c.made_by][1] == {"c": [1]}
