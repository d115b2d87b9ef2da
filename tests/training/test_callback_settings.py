"""Every setting has one definition, and the callback's signature and docstring agree with it."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import get_type_hints

import pytest

from lightning_autoprune import AutoPruneCallback, AutoPruneError, AuxiliaryParameters, Settings
from lightning_autoprune.training.callback_settings import CallbackSettings

DEFINED = {entry.name: entry for entry in fields(CallbackSettings)}


def documented(kind: type) -> dict[str, str]:
    """The text of each argument in a Google-style docstring, in one line."""
    section = inspect.getdoc(kind).split("Args:\n")[1].split("\n\n")[0]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)[1:]
    found = dict(entry.split(": ", 1) for entry in entries)
    return {name: " ".join(text.split()) for name, text in found.items()}


def test_the_callbacks_arguments_are_the_settings_with_their_types_and_defaults():
    parameters = dict(list(inspect.signature(AutoPruneCallback.__init__).parameters.items())[1:])
    assert parameters.keys() == DEFINED.keys()
    hints, defined = get_type_hints(AutoPruneCallback.__init__), get_type_hints(CallbackSettings)
    for name, parameter in parameters.items():
        assert parameter.default == DEFINED[name].default, name
        assert hints[name] == defined[name], name


def test_the_callbacks_docstring_has_the_help_of_every_setting():
    assert documented(AutoPruneCallback) == {name: entry.metadata["help"] for name, entry in DEFINED.items()}


def test_auxiliary_parameters_use_the_same_names_and_defaults():
    parameters = inspect.signature(AuxiliaryParameters.__init__).parameters
    shared = parameters.keys() & DEFINED.keys() - {"granularity"}
    assert shared == {"estimator", "initial_m", "initial_scale", "layer_floor", "leaky_slope", "update_rule"}
    for name in shared:
        assert parameters[name].default == DEFINED[name].default, name


def test_the_settings_reach_the_run_as_they_were_given():
    callback = AutoPruneCallback(0.9, pressure=0.2, include=["a*"], seed=3)
    given = {"target_sparsity": 0.9, "pressure": 0.2, "include": ["a*"], "seed": 3}
    assert {name: getattr(callback.settings, name) for name in given} == given
    assert callback.settings == CallbackSettings(**given)


@pytest.mark.parametrize("kind", [Settings, CallbackSettings])
def test_every_setting_has_help_and_a_default_that_is_allowed(kind):
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
def test_a_wrong_setting_is_refused(options, message):
    with pytest.raises(AutoPruneError, match=message):
        CallbackSettings(**options)


def test_figures_can_be_switched_off():
    assert CallbackSettings(figures_every_n_epochs=None).figures_every_n_epochs is None
