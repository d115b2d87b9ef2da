from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import dataclass

import pytest
import torch
from architectures import DIFFICULT, EXACT, TwoLayers, assert_same_outputs, prune_randomly, resnet
from helpers import fit
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_autoprune import AutoPruneCallback, AutoPruneError
from lightning_autoprune.demo.networks import lenet5
from lightning_autoprune.deploy.shrink import shrink


def size(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("density", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("name", EXACT)
def test_a_shrunk_network_gives_the_same_outputs(name, density):
    make, shape = EXACT[name]
    network = prune_randomly(make(), density)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all channels that the graph shows as removable are removed
        small = shrink(network, torch.zeros(2, *shape))
    assert_same_outputs(network, small, shape)
    assert density > 0.03 or size(small) < 0.75 * size(network)


@pytest.mark.parametrize("name", DIFFICULT)
def test_outputs_stay_the_same_if_the_graph_is_wrong_or_channels_can_not_be_removed_alone(name):
    make, shape = DIFFICULT[name]
    for density in (0.1, 0.3):
        network = prune_randomly(make(), density)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = shrink(network, torch.randn(2, *shape))
        assert_same_outputs(network, small, shape)


@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=5),
    st.floats(0, 0.6),
    st.sampled_from([nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU]),
    st.booleans(),
    st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_any_pruned_mlp_gives_the_same_outputs_when_shrunk(widths, density, activation, bias, seed):
    torch.manual_seed(seed)
    layers = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside, bias=bias), activation()]
    network = prune_randomly(nn.Sequential(*layers[:-1]), density, seed)
    small = shrink(network, torch.zeros(2, widths[0]))
    assert_same_outputs(network, small, widths[:1], samples=50)
    for layer in small[:-1]:  # no dead neuron remains, except where a layer needs one
        if isinstance(layer, nn.Linear) and layer.out_features > 1:
            assert layer.weight.flatten(1).any(1).all()


def test_the_state_dict_loads_into_a_network_of_the_printed_sizes():
    small = shrink(prune_randomly(lenet5(), 0.01), torch.zeros(1, 1, 28, 28))
    a, b, c, d = small[0], small[3], small[7], small[9]
    again = lenet5()
    again[0], again[3] = nn.Conv2d(1, a.out_channels, 5), nn.Conv2d(b.in_channels, b.out_channels, 5)
    again[7], again[9] = nn.Linear(c.in_features, c.out_features), nn.Linear(d.in_features, 10)
    assert str(again) == str(small)
    again.load_state_dict(small.state_dict())
    assert_same_outputs(small, again, (1, 28, 28), samples=10)


def test_shrinking_leaves_the_model_as_it_was():
    network = prune_randomly(resnet(), 0.05)
    network[1].eval()
    network[0].weight.requires_grad_(False)
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    small = shrink(network, torch.randn(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [m.training for m in network.modules()] == modes == [m.training for m in small.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    for net in (network, small):
        assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert all(p.grad is None for p in network.parameters())


def test_the_example_may_be_a_tuple_or_keyword_arguments():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Embedding(5, 8), nn.Linear(8, 2)
            self.a.weight.data[:4] = 0

        def forward(self, x, index):
            return {"out": (self.c(torch.relu(self.a(x))) * self.b(index).sum(-1, keepdim=True), None)}

    network = TwoInputs()
    x, index = torch.randn(4, 3), torch.tensor([0, 4, 2, 2])
    for example in ((x, index), {"index": index, "x": x}):
        small = shrink(network, example)
        assert small.a.out_features == 4
        torch.testing.assert_close(small(x, index)["out"][0], network(x, index)["out"][0])


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
        self.save_hyperparameters()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_a_lightning_module_is_refused_while_it_is_pruned_and_shrunk_afterwards():
    seen = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pruner = callback._run.pruner
            if pruner.step == pruner.phases.start + 1:
                with pytest.raises(AutoPruneError) as error:
                    shrink(pl_module.net, torch.zeros(1, 4))
                seen["error"] = str(error.value)
                shrink(copy.deepcopy(pl_module.net), torch.zeros(1, 4))
            if pruner.masks_final and "small" not in seen:
                seen["small"] = shrink(pl_module, torch.zeros(1, 4))

    callback = AutoPruneCallback(target_sparsity=0.9)
    x = torch.randn(64, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1]), 16)
    model, _ = fit([callback, Watch()], model=Lit(), train=loader, epochs=5)
    assert seen["error"] == (
        "Sequential is still being pruned: shrink it when fitting has ended, or once the masks are final, or shrink a"
        " copy of it as it is now (`copy.deepcopy`)."
    )
    small = shrink(model, torch.zeros(1, 4))
    assert isinstance(small, Lit)
    assert small.net[0].out_features == seen["small"].net[0].out_features < 32
    assert_same_outputs(model, small, (4,))


def test_a_compiled_network_is_shrunk():
    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.a.weight.data[1:] = 0

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    network, x = Compiled(), torch.randn(5, 3)
    torch._dynamo.reset()
    network.compile(backend="eager")
    network(x)
    small = shrink(network, x)
    assert small.a.out_features == 1
    torch.testing.assert_close(small(x), network(x))


def test_shrink_warns_if_no_channel_is_found():
    class Detached(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.warns(UserWarning, match="No channel of Detached was found"):
        shrink(Detached(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3))


def test_a_model_may_store_tensors_with_a_graph():
    class StoresFeatures(nn.Sequential):
        def forward(self, x):
            self.features = {"first": self[0](x)}
            return self[2](self[1](self.features["first"]))

    network, x = StoresFeatures(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    network[0].weight.data[1:] = 0
    network.loss = loss = network(x).mean()
    small = shrink(network, x)
    assert (small[0].out_features, small.loss.item()) == (1, loss.item())
    torch.testing.assert_close(small(x), network(x))
    assert network.loss is loss


@dataclass
class ModelOutput:
    features: torch.Tensor


def test_channels_of_outputs_in_objects_stay():
    class Wrapped(TwoLayers):
        def forward(self, x):
            features = torch.relu(self.a(x))
            return self.b(features), ModelOutput(features)

    network, x = Wrapped(), torch.randn(2, 4)
    network.a.weight.data[2:] = 0  # dead, except that they are in the outputs
    assert shrink(network, x).a.out_features == 6


def test_layers_may_be_called_with_keywords_or_an_output_size():
    class Upsamples(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 6, 3, 2, 1), nn.ConvTranspose2d(6, 4, 3, 2, 1)
            self.c = nn.Conv2d(4, 2, 1)
            self.a.weight.data[2:] = self.a.bias.data[2:] = self.b.weight.data[:, 3:] = 0

        def forward(self, x):
            return self.c(input=torch.relu(self.b(torch.relu(self.a(x)), x.shape[-2:])))

    network, x = Upsamples(), torch.randn(2, 1, 8, 8)
    small = shrink(network, x)
    assert (small.a.out_channels, small.b.out_channels) == (2, 3)
    torch.testing.assert_close(small(x), network(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


def test_a_forward_may_refuse_random_inputs():
    class Positive(nn.Sequential):
        def forward(self, x):
            assert x.min() >= 0
            return super().forward(x)

    network, x = Positive(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(5, 3)
    network[2].weight.data[:, 1:] = 0
    small = shrink(network, x)
    assert small[0].out_features == 1
    torch.testing.assert_close(small(x), network(x))


def test_integer_columns_with_different_ranges_are_not_mixed():
    class Categories(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Embedding(100, 4), nn.Embedding(3, 4)
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)
            self.a.weight.data[3:] = 0

        def forward(self, i):
            return self.b(torch.relu(self.a(torch.cat([self.one(i[:, 0]), self.two(i[:, 1])], 1))))

    network, i = Categories(), torch.tensor([[50, 1], [70, 2], [99, 0]])
    small = shrink(network, i)
    assert small.a.out_features == 3
    torch.testing.assert_close(small(i), network(i))
    assert shrink(network, i[:1]).a.out_features in (3, 6)  # a single sample does not show which column has which range


@pytest.mark.parametrize("kind", ["-inf", "-1e9", "complex", "nan"])
def test_special_output_values_do_not_hide_a_wrong_entry(kind):
    class Hides(DIFFICULT["shuffled"][0]):
        def forward(self, x):
            y = super().forward(x)
            if kind == "complex":
                return torch.complex(y, y)
            return torch.cat([y, torch.full_like(y, float(kind))], -1)

    network = Hides()
    network.b.weight.data[:, :2] = 0
    with pytest.warns(UserWarning, match="The dead channels of 'a' stay"):
        small = shrink(network, torch.randn(2, 5))
    assert small.a.out_features == 6


def test_the_input_and_the_random_state_stay_if_the_forward_changes_them():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 2))
            self.net[0].weight.data[3:] = 0

        def forward(self, x):
            torch.rand(3)
            return self.net(x.sub_(0.5).div_(0.2))

    network, x = InPlace(), torch.randn(2, 4)
    before, state = x.clone(), torch.get_rng_state()
    small = shrink(network, x)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert small.net[0].out_features == 3
    torch.testing.assert_close(small(x.clone()), network(x.clone()))


class Offset(nn.Module):
    """Outputs that vary little for their size; optionally with hidden values centered over the channels."""

    def __init__(self, centered):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.c.bias.data.fill_(1000)
        self.a.weight.data[8:] = self.b.weight.data[:, 8:] = 0
        self.centered = centered

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(h - h.mean(1, keepdim=True) if self.centered else h)))


def test_an_output_offset_neither_hides_nor_causes_a_mismatch():
    for seed in range(5):
        torch.manual_seed(seed)
        network, x = Offset(centered=True), torch.randn(1000, 8)
        with pytest.warns(UserWarning, match="The dead channels of 'a' stay"):
            assert shrink(network, x[:4]).a.out_features == 16
        network = Offset(centered=False)
        for example in (x[:1], x[:4], torch.zeros(2, 8)):
            small = shrink(network, example)
            assert small.a.out_features == 8
            torch.testing.assert_close(small(x), network(x), rtol=0, atol=1e-3)


def test_layers_whose_dead_channels_must_stay_are_named():
    make, shape = DIFFICULT["shuffled"]
    network = make()
    network.b.weight.data[:, :2] = 0  # they read the last two neurons of a, and the graph says the first two
    with pytest.warns(UserWarning, match="The dead channels of 'a' stay: without them the outputs change"):
        shrink(network, torch.randn(2, *shape))


def test_an_example_that_does_not_run_names_the_layer_and_the_shape():
    with pytest.raises(AutoPruneError) as error:
        shrink(lenet5(), torch.zeros(1, 3, 28, 28))
    message = str(error.value)
    assert message.startswith(
        "Sequential could not be run on an example of shapes [(1, 3, 28, 28)]: layer '0' raised RuntimeError: "
    )
    assert message.endswith("Give an `example_input` on which the model runs as it is.")
