from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.model.name_patterns import find_patterns

names = st.lists(st.sampled_from(["a", "b", "0", "1", "[x]", "c*"]), min_size=1, max_size=3).map(".".join)


@given(st.sets(names, min_size=1), st.sets(names))
def test_patterns_match_what_is_wanted_and_nothing_else(wanted, others):
    unwanted = others - wanted
    patterns = find_patterns(sorted(wanted), sorted(unwanted))
    assert all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in wanted)
    assert not any(fnmatchcase(name, pattern) for pattern in patterns for name in unwanted)


def test_a_network_of_many_layers_needs_few_patterns():
    wanted = [f"net.layers.{i}.{part}" for i in range(24) for part in ("attention.q", "attention.k", "experts.w")]
    assert find_patterns([*wanted, "head"], ["net.embed"]) == ["net.layers.*", "head"]
    assert find_patterns(wanted, []) == ["*"]
    scales = [f"net.layers.{i}.scale" for i in range(24)]
    assert find_patterns(wanted, scales) == ["net.layers.*.attention.*", "net.layers.*.experts.w"]
