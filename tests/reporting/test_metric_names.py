"""Names of layers that every logger takes, each different."""

from __future__ import annotations

import string

from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.reporting.metric_names import loggable_names


def test_names_that_every_logger_takes_stay_as_they_are():
    layers = ["net", "net.0", "encoder.layers.11.attention.in_proj_weight", "my-head_2"]
    assert loggable_names(layers) == {layer: layer for layer in layers}


def test_other_characters_become_underscores_and_long_names_lose_their_beginning():
    names = loggable_names(["heads.a/b", "heads.x y", "heads.größe[0]", "z" + "w" * 199 + ".0"])
    assert list(names.values()) == ["heads.a_b", "heads.x_y", "heads.gr__e_0_", "w" * 198 + ".0"]


def test_a_layer_that_needs_another_name_never_takes_that_of_another_layer():
    assert loggable_names(["a/b", "a:b", "a_b", "a_b_2"]) == {
        "a/b": "a_b_3",
        "a:b": "a_b_4",
        "a_b": "a_b",
        "a_b_2": "a_b_2",
    }


@given(st.lists(st.text(alphabet="ab/_2.:", min_size=1, max_size=5), unique=True))
def test_all_names_differ_and_none_has_a_slash(layers):
    names = loggable_names(layers)
    assert list(names) == layers
    assert len(set(names.values())) == len(layers)
    assert set("".join(names.values())) <= {*string.ascii_letters, *string.digits, *"_.-"}
