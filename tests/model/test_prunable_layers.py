from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.model.prunable_layers import choose_weights, prunable_weights
from lightning_autoprune.model.sparsity import sparsity


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(1, 4, 3)
        self.up = nn.ConvTranspose1d(4, 4, 2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 10)


def test_only_weights_of_linear_convolution_and_attention_layers_are_found():
    names = list(prunable_weights(Mixed()))
    assert names == ["conv", "up", "attention.in_proj_weight", "attention.out_proj", "head"]


def test_the_weight_of_a_single_layer_is_named_weight():
    assert list(prunable_weights(nn.Linear(2, 2))) == ["weight"]


def test_include_and_exclude_are_patterns():
    assert list(prunable_weights(Mixed(), include=["attention.*", "head"])) == [
        "attention.in_proj_weight",
        "attention.out_proj",
        "head",
    ]
    assert list(prunable_weights(Mixed(), exclude=["attention*", "up"])) == ["conv", "head"]


def test_recurrent_layers_have_several_weights():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), "cell": nn.GRUCell(3, 4)})
    names = list(prunable_weights(model))
    assert names[:4] == ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hr_l0", "lstm.weight_ih_l0_reverse"]
    assert names[-2:] == ["cell.weight_ih", "cell.weight_hh"]
    assert len(names) == 14


def test_an_embedding_is_found_if_a_pattern_matches_it():
    assert list(prunable_weights(Mixed(), include=["embed", "head"])) == ["embed", "head"]
    assert next(iter(prunable_weights(Mixed(), include=["*"]))) == "embed"
    model = Mixed()
    model.head.weight = model.embed.weight
    assert list(prunable_weights(model, include=["embed", "head"])) == ["embed"]
    assert "head" not in prunable_weights(model, include=["conv", "head"])


def test_a_tied_weight_is_listed_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(prunable_weights(model)) == ["0"]


def test_a_weight_tied_to_an_embedding_counts_as_an_embedding():
    model = Mixed()
    model.head.weight = model.embed.weight
    assert "head" not in prunable_weights(model)


def test_a_frozen_weight_is_left_out_unless_asked_for():
    model = Mixed()
    model.conv.weight.requires_grad_(False)
    assert "conv" not in prunable_weights(model)
    assert "conv" in prunable_weights(model, trained_only=False)


def test_a_weight_without_entries_is_left_out():
    assert list(prunable_weights(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 2)))) == ["2"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nn.LayerNorm(3),
            {},
            "LayerNorm has no layer to prune: there is no linear, convolution, recurrent or attention",
        ),
        (Mixed(), {"include": ["fc*"]}, r"`include` has 'fc\*', which matches no layer; there are 'conv', 'up', 'att"),
        (Mixed(), {"exclude": ["bias"]}, "`exclude` has 'bias', which matches no layer; there are 'conv', 'up'"),
        (Mixed(), {"exclude": ["*"]}, "`include` and `exclude` leave no layer to prune; there are 'conv'"),
        (
            nn.Embedding(3, 2, sparse=True),
            {"include": ["*"]},
            "Layer 'weight' has sparse gradients, which can't be masked: make it with `sparse=False`, or",
        ),
        (nn.LazyLinear(3), {}, "Layer 'weight' is lazy and has no shape yet: run one batch through the model"),
        (weight_norm(nn.Linear(2, 2)), {}, "Layer 'weight' computes its weight by a parametrization, .* remove it"),
        (
            nn.utils.weight_norm(nn.LSTM(2, 2), "weight_hh_l0"),
            {"include": ["weight_hh_l0"]},
            "Layer 'weight_hh_l0' computes its weight_hh_l0 before each forward",
        ),
        (
            weight_norm(nn.LSTM(2, 2), "weight_hh_l0"),
            {"include": ["weight_hh_l0"]},
            "Layer 'weight_hh_l0' computes its weight_hh_l0 by a param",
        ),
        (
            nn.utils.spectral_norm(nn.GRUCell(2, 2), "weight_hh"),
            {"include": ["weight_hh"]},
            "Layer 'weight_hh' computes its weight_hh before each forward",
        ),
        (
            nn.Sequential(weight_norm(nn.Linear(2, 2)), weight_norm(nn.Conv1d(2, 2, 1)), nn.Linear(2, 2)),
            {"include": ["0", "1", "2"]},
            "Each of the layers '0', '1' computes its weight by a parametrization, so there is no weight to prune",
        ),
        (
            nn.ParameterList([torch.ones(2, 2)]),
            {"include": ["weight"]},
            "`include` has 'weight', which matches no layer; `include` can name '0'",
        ),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), {}, "Layer 'weight' computes its weight before each forward"),
        (nn.Linear(4, 0), {}, "None of the layers 'weight' has a trainable weight of its own: .* or it is empty"),
        (nn.Linear(2, 2).requires_grad_(False), {}, "None of the layers 'weight' has a trainable weight of its own"),
    ],
)
def test_models_that_can_not_be_pruned_are_refused_with_the_way_out(model, options, message):
    with pytest.raises(AutoPruneError, match=message):
        prunable_weights(model, **options)


def test_a_layer_that_can_not_be_pruned_can_be_excluded():
    model = nn.Sequential(weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert list(prunable_weights(model, exclude=["0"])) == ["1"]


def test_a_computed_weight_stays_out_unless_a_pattern_matches_it_alone():
    model = nn.Sequential(weight_norm(nn.Linear(2, 2)), nn.utils.weight_norm(nn.LSTM(2, 2), "weight_hh_l0"))
    assert list(prunable_weights(model)) == ["1.weight_ih_l0"]
    assert list(prunable_weights(model, include=["*"])) == ["1.weight_ih_l0"]
    assert list(prunable_weights(model, include=["1.weight_hh_l0_v"])) == ["1.weight_hh_l0_v"]  # what it is made of


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.mix = nn.Parameter(torch.ones(4, 4))
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.steps = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.counts = nn.Parameter(torch.ones(3, 3, dtype=torch.long), requires_grad=False)
        self.experts = nn.ParameterDict({"up": torch.ones(2, 4, 4)})


def test_bare_parameters_are_found_if_a_pattern_matches_their_name():
    assert list(prunable_weights(Bare())) == ["head"]
    assert list(prunable_weights(Bare(), include=["mix", "experts.*"])) == ["mix", "experts.up"]
    assert list(prunable_weights(Bare(), include=["*"])) == ["mix", "head", "experts.up"]
    assert list(prunable_weights(Bare(), include=["*"], exclude=["m*"])) == ["head", "experts.up"]
    assert list(prunable_weights(Bare(), include=["st*", "head"], trained_only=False)) == ["steps", "head"]


def test_a_vector_in_the_shape_of_a_matrix_is_found_only_by_a_pattern_of_its_own():
    assert list(prunable_weights(Bare(), include=["token"])) == ["token"]


def test_a_model_of_bare_parameters_alone_is_refused_with_their_names():
    model = nn.ParameterDict({"mix": torch.ones(2, 2)})
    with pytest.raises(AutoPruneError, match="ParameterDict has no layer to prune: `include` can name 'mix'"):
        prunable_weights(model)
    assert sparsity(model) == 0


def test_patterns_match_the_names_of_parameters_too():
    assert list(prunable_weights(Bare(), include=["*.weight"])) == ["head"]
    assert list(prunable_weights(Mixed(), exclude=["*v.weight", "up.weight"])) == [
        "attention.in_proj_weight",
        "attention.out_proj",
        "head",
    ]


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_that_two_layers_share_is_listed_once(transposed):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data.t() if transposed else model[0].weight.data
    assert list(prunable_weights(model)) == ["0", "2"]
    model[0].weight.requires_grad_(False)
    assert list(prunable_weights(model)) == ["1", "2"]


def test_of_a_weight_and_a_part_of_it_the_whole_is_listed():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(3, 2))
    model[0].weight.data, model[2].weight.data = model[1].weight.data[:2], model[1].weight.data[2:]
    assert list(prunable_weights(model)) == ["1"]


def test_weights_that_lie_side_by_side_in_one_storage_are_all_listed():
    model, storage = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)), torch.ones(4, 6)
    model[0].weight.data, model[1].weight.data = storage[:, ::2], storage[:, 1::2]
    assert list(prunable_weights(model)) == ["0", "1"]


def test_a_weight_that_shares_only_a_part_of_its_memory_is_left_out():
    model, storage = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)), torch.ones(6, 3)
    model[0].weight.data, model[1].weight.data = storage[:4], storage[2:]
    choice = choose_weights(model)
    assert list(choice.weights) == ["0"]
    assert "shares a part of its memory" in choice.obstacles["1"]


def test_a_weight_in_the_memory_of_an_embedding_counts_as_an_embedding():
    model = Mixed()
    model.head.weight = nn.Parameter(model.embed.weight.data)
    assert "head" not in prunable_weights(model)


def test_weights_have_the_shapes_of_the_model():
    assert {name: weight.shape for name, weight in prunable_weights(nn.Sequential(nn.Conv3d(2, 4, 3))).items()} == {
        "0": torch.Size([4, 2, 3, 3, 3])
    }
