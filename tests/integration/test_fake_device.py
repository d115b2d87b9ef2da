"""A real process with a device that has no float64 and random numbers of its own: ``fake_device_run``."""

from __future__ import annotations

import pytest
import torch
from helpers import same
from processes import finish, start

SETTINGS = ("default", "train", "fixed", "loader", "autoprune", "constant", "neurons", "manual")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this version of torch knows no devices that are written in Python")
    folder = tmp_path_factory.mktemp("fake")
    finish([start("fake_device_run.py", [str(folder)])])
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_on_a_device_without_float64_has_the_bits_of_one_on_the_cpu(found, name):
    assert same(found[name]["fake"], found[name]["cpu"])
    assert found[name]["fake"]["zeros"] == pytest.approx(0.5 if name == "neurons" else 0.8, abs=0.1)


def test_a_run_on_a_device_without_float64_resumes_bit_for_bit(found):
    assert same(found["resumed"], found["default"]["fake"])


def test_the_random_numbers_of_a_device_are_isolated(found):
    for draws in found["random"]:
        assert [draws["before"], draws["after"]] == draws["expected"]
    first, again, other = (draws["inside"] for draws in found["random"])
    assert first == again != other


def test_held_out_passes_leave_the_devices_random_numbers_alone(found):
    without, with_callback = found["noisy"]
    assert same(without, with_callback)
