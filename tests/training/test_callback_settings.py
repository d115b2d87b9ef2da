"""Every setting has one definition, and the callback's signature and docstring agree with it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from lightning_autoprune import AutoPruneCallback, AutoPruneError, AuxiliaryParameters, Settings
from lightning_autoprune.training.callback_settings import CallbackSettings

SETTINGS = {entry.name: entry for entry in fields(CallbackSettings)}


def parse_arguments(kind: type) -> dict[str, str]:
    """Return the text of each argument in a Google-style docstring, joined into one line."""
    section = inspect.getdoc(kind).split("Args:\n")[1].split("\n\n")[0]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)[1:]
    texts = dict(entry.split(": ", 1) for entry in entries)
    return {name: " ".join(text.split()) for name, text in texts.items()}


def test_the_callback_takes_every_setting_with_its_type_and_default():
    parameters = dict(list(inspect.signature(AutoPruneCallback.__init__).parameters.items())[1:])
    assert parameters.keys() == SETTINGS.keys()
    hints, defined = get_type_hints(AutoPruneCallback.__init__), get_type_hints(CallbackSettings)
    for name, parameter in parameters.items():
        assert parameter.default == SETTINGS[name].default, name
        assert hints[name] == defined[name], name


def test_the_callbacks_docstring_has_the_help_of_every_setting():
    assert parse_arguments(AutoPruneCallback) == {name: entry.metadata["help"] for name, entry in SETTINGS.items()}


def test_auxiliary_parameters_use_the_same_names_and_defaults():
    parameters = inspect.signature(AuxiliaryParameters.__init__).parameters
    shared = parameters.keys() & SETTINGS.keys() - {"granularity"}
    assert shared == {"estimator", "initial_m", "initial_scale", "layer_floor", "leaky_slope", "update_rule"}
    for name in shared:
        assert parameters[name].default == SETTINGS[name].default, name


def test_the_callbacks_settings_are_its_arguments():
    callback = AutoPruneCallback(0.9, pressure=0.2, include=["a*"], seed=3)
    given = {"target_sparsity": 0.9, "pressure": 0.2, "include": ["a*"], "seed": 3}
    assert {name: getattr(callback.settings, name) for name in given} == given
    assert callback.settings == CallbackSettings(**given)


@pytest.mark.parametrize("kind", [Settings, CallbackSettings])
def test_every_setting_has_help_and_an_allowed_default(kind):
    kind()
    for entry in fields(kind):
        assert len(entry.metadata["help"]) > 15, entry.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every_n_steps": 0}, r"`log_every_n_steps` is 0; it must be an integer in \[1, inf\)"),
        ({"figures_every_n_epochs": -1}, r"`figures_every_n_epochs` is -1; it must be an integer in \[0, inf\)"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(AutoPruneError, match=message):
        CallbackSettings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"held_out": 0.0},
            r'`held_out` is 0.0; it must be a number in \(0, 1\). `held_out` may also be "val", ',
        ),
        ({"held_out": 1.0}, r"`held_out` is 1.0; it must be a number in \(0, 1\)"),
        ({"held_out": 1}, r"`held_out` is 1; it must be a number in \(0, 1\)"),
        ({"held_out": "test"}, "`held_out` is 'test'; allowed are 'val', 'train'"),
        ({"held_out": [1]}, r"`held_out` is \[1\]; it must be a number"),
        ({"log_every_n_steps": 0}, r"`log_every_n_steps` is 0; it must be an integer in \[1, inf\)"),
        ({"log_every_n_steps": 2.5}, r"`log_every_n_steps` is 2.5; it must be an integer in \[1, inf\)"),
        ({"target_sparsity": 1}, r"`target_sparsity` is 1; it must be a number in \[0, 1\)"),
        ({"warmup": 0.5, "finetune": 0.5}, "leave no time to prune"),
    ],
)
def test_invalid_arguments_are_refused_at_once(options, message):
    with pytest.raises(AutoPruneError, match=message):
        AutoPruneCallback(**options)


def test_figures_can_be_turned_off():
    assert CallbackSettings(figures_every_n_epochs=None).figures_every_n_epochs is None


def test_numbers_of_numpy_are_stored_as_plain_numbers():
    settings = CallbackSettings(
        target_sparsity=np.float32(0.5), mask_every_n_steps=np.int64(2), pressure=np.float64(0.1)
    )
    assert settings == CallbackSettings(target_sparsity=0.5, mask_every_n_steps=2, pressure=0.1)
    assert [type(value) for value in (settings.target_sparsity, settings.mask_every_n_steps)] == [float, int]
    assert settings.described()["target_sparsity"] == 0.5


@pytest.mark.parametrize("value", [["weight"], None, 3])
def test_a_granularity_that_is_no_name_is_refused(value):
    with pytest.raises(AutoPruneError, match=r"`granularity` is .*; allowed are 'weight', 'neuron'"):
        CallbackSettings(granularity=value)


def allowed_kinds(annotation: Any) -> set[Any]:
    """Return what an annotation allows: types, ``Literal`` as ``str``, and ``Callable``."""
    origin = get_origin(annotation)
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if origin in (list, Callable) or not get_args(annotation):
        return {origin or annotation}
    return {kind for member in get_args(annotation) for kind in allowed_kinds(member)}


WRONG = (None, True, 3, 0.5, "no such name", b"bytes", 1j, float("nan"), [3], [None], ["a", 3], {}, {"a"}, object())
HINTS = get_type_hints(CallbackSettings)


def wrong_values(name: str) -> list[Any]:
    """Return values of a type that a setting does not allow, and a text that is none of its names."""
    kinds = allowed_kinds(HINTS[name])
    kinds |= {int} if float in kinds else set()
    # a whole number may be out of the range of a float, and an object may have the base class that is asked for
    return [value for value in WRONG if type(value) not in kinds - {str, list} or value != value]


def test_wrong_values_are_derived_for_every_kind_of_setting():
    assert allowed_kinds(HINTS["schedule"]) == {str, Callable}
    assert allowed_kinds(HINTS["include"]) == {list, type(None)}
    assert True in wrong_values("pressure")
    assert None not in wrong_values("include")
    assert [3] in wrong_values("include")
    assert 0.5 in wrong_values("seed")
    assert all(len(wrong_values(name)) >= 8 for name in HINTS)


@pytest.mark.parametrize("name", HINTS)
def test_a_value_of_a_wrong_type_is_refused_by_name(name):
    for value in wrong_values(name):
        with pytest.raises(AutoPruneError, match=f"`{name}`") as caught:
            AutoPruneCallback(**{name: value})
        assert re.search(r"must be|allowed are", str(caught.value)), value


@pytest.mark.parametrize("name", [name for name, entry in SETTINGS.items() if isinstance(entry.default, (int, float))])
def test_numbers_and_flags_of_numpy_are_taken_as_pythons(name):
    default = SETTINGS[name].default
    kinds = {bool: [np.bool_], int: [np.int64, np.int32, np.uint8], float: [np.float64, np.float32]}
    for kind in kinds[type(default)]:
        stored = getattr(AutoPruneCallback(**{name: kind(default)}).settings, name)
        assert stored == pytest.approx(default), kind
        assert type(stored) is type(default), kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"`seed` is -1; it must be an integer in \[0, 4294967295\]"),
        ({"seed": 2**70}, r"`seed` is 1180591620717411303424; it must be an integer in \[0, 4294967295\]"),
        ({"enabled": "no"}, "`enabled` is 'no'; it must be True or False"),
        ({"include": "fc"}, r"`include` is 'fc'; it must be a list of patterns: \['fc'\]"),
        ({"exclude": [None]}, r"`exclude` is \[None\]; it must be a list of patterns"),
        ({"include": []}, "`include` is empty, so nothing would be pruned: leave it out, or switch pruning off"),
        ({"loss_fn": 3}, "`loss_fn` is 3; it must be a function of the module and a held-out batch, or None"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(options, message):
    with pytest.raises(AutoPruneError, match=message):
        AutoPruneCallback(**options)


def test_patterns_may_be_any_sequence_of_texts_and_exclude_may_be_empty():
    settings = AutoPruneCallback(include=("a", "b"), exclude=[]).settings
    assert (settings.include, settings.exclude) == (["a", "b"], [])
