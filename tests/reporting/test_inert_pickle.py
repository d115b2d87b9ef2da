"""Files are read without running anything that they ask for."""

from __future__ import annotations

import io
import os
import pickle

import pytest
import torch

from lightning_autoprune.reporting import inert_pickle
from lightning_autoprune.reporting.inert_pickle import Inert


def read(content: bytes):
    return inert_pickle.load(io.BytesIO(content))


class Calls:
    """An object whose pickle calls a function with an argument."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class Fills(dict):
    """A dictionary, and by its pickle an object with attributes."""


class Extends(list):
    """A list of its own type."""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_called_and_the_rest_is_read(protocol):
    filled = Fills(a=1)
    filled.attribute = 3
    hostile = [Calls(os.mkdir, ("made",)), Calls(exec, ("open('made', 'w')",)), Calls(getattr, (3, "real"))]
    objects = [*hostile, Extends([1, 2]), filled, {Fills}, os.mkdir]
    plain = [1, 2.5, "text", None, True, (1,), {"a": {"b": []}}]
    found = read(pickle.dumps({"objects": objects, "plain": plain}, protocol))
    assert found["plain"] == plain
    *instances, of_classes, function = found["objects"]
    assert all(isinstance(value, Inert) for value in instances)
    assert issubclass(function, Inert)
    assert isinstance(of_classes, Inert) or all(issubclass(value, Inert) for value in of_classes)
    assert not os.path.exists("made")


def call(module: str, name: str, state: bytes) -> bytes:
    """Return a pickle that looks up a global and then sets its state."""
    return f"c{module}\n{name}\n".encode() + state + b"b."


SET_ATTRIBUTE = b"(N(S'changed'\nI1\ndt"  # the state (None, {"changed": 1}), which sets an attribute


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("torch._utils", "_rebuild_tensor_v2", torch._utils._rebuild_tensor_v2),
        ("torch.storage", "UntypedStorage", torch.UntypedStorage),
        ("torch.nn.modules.linear", "Linear", torch.nn.Linear),
    ],
)
def test_a_file_can_not_change_what_it_names(module, name, value):
    read(call(module, name, SET_ATTRIBUTE))
    assert not hasattr(value, "changed")


def test_unknown_modules_are_not_imported():
    assert isinstance(read(b"cthis_is_no_module\nThing\n(tR."), Inert)
