"""The rooms of the package: imports point down only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "lightning_autoprune"
ROOMS = ("tensors", "method", "model", "deploy", "reporting", "training", "__init__", "demo", "cli", "__main__")
"""From the lowest to the highest. A module may import from its own room and from those before it.

``__init__`` is what users import from the package itself, as the demo and the commands do.
"""

BELOW_ALL = ("errors", "_version")  # modules that every room may import
FACADES = {"plots": "reporting"}  # public names of modules that lie in a room


def floor(module: str) -> int:
    """The floor on which a module lies, given its dotted name without the package's."""
    room = module.split(".")[0] or "__init__"
    if room in BELOW_ALL:
        return -1
    return ROOMS.index(FACADES.get(room, room))


def imported(source: str) -> Iterator[str]:
    """The modules of the package that a source imports, anywhere in it; without the package's name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, module = name.partition(".")
            if package == "lightning_autoprune":
                in_room = module.split(".")[0] in (*ROOMS, *BELOW_ALL, *FACADES)
                yield module if in_room else ""  # a name that the package itself offers


def upward(module: str, source: str) -> list[str]:
    return [target for target in imported(source) if floor(target) > floor(module)]


def modules() -> dict[str, Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    assert upward(module, modules()[module].read_text()) == []


def test_an_upward_import_is_found_wherever_it_stands():
    assert upward("method.pruner", "from lightning_autoprune.model.cost import model_cost") == ["model.cost.model_cost"]
    assert upward("tensors.bitmasks", "def f():\n    import lightning_autoprune.method.pruner") == ["method.pruner"]
    assert upward("deploy.shrink", "from lightning_autoprune import Pruner") == [""]
    assert upward("deploy.shrink", "from lightning_autoprune import plots") == ["plots"]
    assert upward("training.callback", "from lightning_autoprune.method import pruner") == []


@pytest.mark.parametrize("room", ["tensors", "method"])
def test_the_numerics_import_torch_only(room):
    allowed = {"torch", "typing_extensions", "lightning_autoprune", *sys.stdlib_module_names}
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                foreign = {name.split(".")[0] for name in names if name} - allowed
                if path.name == "random_state.py":
                    foreign -= {"numpy"}  # whose random numbers it isolates too
                assert not foreign, path
