"""Names that wrappers or the user changed are matched, and never guessed."""

from __future__ import annotations

import pytest

from lightning_autoprune.reporting.name_matching import match_names

BLOCKS = [f"net.{i}.{name}.weight" for i in range(12) for name in ("up", "down")]


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key,
        lambda key: key.removeprefix("net."),
        lambda key: f"model.{key}",
        lambda key: key.replace("net.", "backbone.layers."),
        lambda key: f"_forward_module.{key}",
        lambda key: f"module.{key}",
        lambda key: key.replace(".up", "._orig_mod.up"),
        lambda key: f"model._orig_mod.{key.removeprefix('net.')}",
    ],
)
def test_a_change_of_prefixes_is_undone_in_both_directions(change):
    keys = [change(name) for name in BLOCKS]
    assert match_names(BLOCKS, keys) == dict(zip(BLOCKS, keys, strict=True))
    assert match_names(keys, BLOCKS) == dict(zip(keys, BLOCKS, strict=True))


def test_prefixes_of_parts_of_a_model_may_differ():
    names = ["net.0.weight", "net.2.weight", "head.weight"]
    assert match_names(names, ["0.weight", "2.weight", "head.weight"]) == {
        "net.0.weight": "0.weight",
        "net.2.weight": "2.weight",
        "head.weight": "head.weight",
    }


def test_the_name_of_a_single_layer_may_be_gone():
    assert match_names(["net.weight"], ["weight", "bias"]) == {"net.weight": "weight"}


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["encoder.0.weight", "decoder.0.weight"], ["0.weight"]),  # either could be meant
        (["head.weight"], ["norm.weight", "net.0.weight"]),  # only the word "weight" is the same
        (["a.weight"], []),
        (["net.0.weight"], ["net.0.bias"]),
    ],
)
def test_a_name_without_a_clear_key_is_left_out(names, keys):
    assert match_names(names, keys) == {}


def test_what_fits_decides_between_names():
    fitting = {("decoder.0.weight", "0.weight")}
    found = match_names(["encoder.0.weight", "decoder.0.weight"], ["0.weight"], lambda *pair: pair in fitting)
    assert found == {"decoder.0.weight": "0.weight"}


def test_a_key_of_the_same_name_is_not_given_to_another():
    assert match_names(["a.0.weight", "0.weight"], ["0.weight"]) == {"0.weight": "0.weight"}


def test_many_names_are_matched_quickly():
    names = [f"model.layers.{i}.experts.{j}.up.weight" for i in range(100) for j in range(100)]
    keys = [name.removeprefix("model.") for name in names]
    assert match_names(names, keys) == dict(zip(names, keys, strict=True))
