"""Each registry has the names of its setting's public type, and unknown names raise errors."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch

from lightning_autoprune import AutoPruneCallback, AutoPruneError, AuxiliaryParameters, Settings
from lightning_autoprune.method.estimators import ESTIMATORS, EstimatorName
from lightning_autoprune.method.granularity import GRANULARITIES, GranularityName
from lightning_autoprune.method.initialization import INITIAL_M, InitialM
from lightning_autoprune.method.registry import describe, look_up
from lightning_autoprune.method.schedule import SCHEDULES, ScheduleName
from lightning_autoprune.method.update_rules import UPDATE_RULES, UpdateRuleName

REGISTRIES = {
    "estimator": (ESTIMATORS, EstimatorName),
    "granularity": (GRANULARITIES, GranularityName),
    "initial_m": (INITIAL_M, InitialM),
    "schedule": (SCHEDULES, ScheduleName),
    "update_rule": (UPDATE_RULES, UpdateRuleName),
}


def names_in(hint) -> set[str]:
    """Return all strings in a type, at any depth."""
    return {hint} if isinstance(hint, str) else {name for part in get_args(hint) for name in names_in(part)}


@pytest.mark.parametrize("setting", REGISTRIES)
def test_a_registry_has_the_names_of_its_public_type(setting):
    registry, names = REGISTRIES[setting]
    assert list(registry) == list(get_args(names))
    assert names_in(get_type_hints(AutoPruneCallback.__init__)[setting]) == set(registry)
    assert names_in(get_type_hints(Settings)[setting]) == set(registry)


@pytest.mark.parametrize("setting", REGISTRIES)
def test_every_name_is_accepted_and_any_other_raises(setting):
    registry, _ = REGISTRIES[setting]
    for name in registry:
        Settings(**{setting: name})
    with pytest.raises(AutoPruneError, match=f"`{setting}` is 'something else'; allowed are '{next(iter(registry))}'"):
        Settings(**{setting: "something else"})


@pytest.mark.parametrize("setting", ["estimator", "initial_m", "update_rule"])
def test_auxiliary_parameters_refuse_unknown_names(setting):
    with pytest.raises(AutoPruneError, match=f"`{setting}` is 'something else'; allowed are"):
        AuxiliaryParameters({"layer": torch.ones(2)}, **{setting: "something else"})


@pytest.mark.parametrize("name", GRANULARITIES)
def test_a_granularity_is_registered_under_its_own_name(name):
    assert GRANULARITIES[name].name == name


def test_only_allowed_objects_are_returned():
    assert look_up("power", 5, {"cubic": 3}, lambda value: isinstance(value, int)) == 5
    with pytest.raises(AutoPruneError, match=r"`power` is 0.5; allowed are 'cubic', or an integer"):
        look_up("power", 0.5, {"cubic": 3}, lambda value: isinstance(value, int), objects="an integer")


def test_custom_objects_are_described_by_module_and_name():
    class Custom:
        pass

    assert describe(Custom()).endswith("test_custom_objects_are_described_by_module_and_name.<locals>.Custom")
    assert [describe(value) for value in (None, "cubic", 3, 0.5, True)] == [None, "cubic", 3, 0.5, True]
