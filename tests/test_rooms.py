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

``__init__`` stands for the public names of the package itself, which the demo and the commands import.
"""

BELOW_ALL = ("errors", "argument_types", "_version")  # modules that every room may import
FACADES = {"plots": "reporting"}  # public modules, and the room that each one's content lies in


def level(module: str) -> int:
    """Return the level of a module, given its dotted name without the package's; -1 is the lowest."""
    room = module.split(".")[0] or "__init__"
    if room in BELOW_ALL:
        return -1
    return ROOMS.index(FACADES.get(room, room))


def find_imports(source: str) -> Iterator[str]:
    """Yield the modules of the package that a source imports, anywhere in it, without the package's name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides which room it is from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, module = name.partition(".")
            if package == "lightning_autoprune":
                in_room = module.split(".")[0] in (*ROOMS, *BELOW_ALL, *FACADES)
                yield module if in_room else ""  # a public name of the package itself


def find_upward_imports(module: str, source: str) -> list[str]:
    """Return the imports of a module that point to a higher room."""
    return [target for target in find_imports(source) if level(target) > level(module)]


def find_modules() -> dict[str, Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


@pytest.mark.parametrize("module", find_modules())
def test_imports_point_down(module):
    assert find_upward_imports(module, find_modules()[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("method.pruner", "from lightning_autoprune.model.cost import model_cost", ["model.cost.model_cost"]),
        ("tensors.bitmasks", "def f():\n    import lightning_autoprune.method.pruner", ["method.pruner"]),
        ("deploy.shrink", "from lightning_autoprune import Pruner", [""]),
        ("deploy.shrink", "from lightning_autoprune import plots", ["plots"]),
        ("training.callback", "from lightning_autoprune.method import pruner", []),
    ],
    ids=["from a room", "inside a function", "from the package", "of a facade", "downward"],
)
def test_upward_imports_are_found_anywhere_in_a_module(module, source, expected):
    assert find_upward_imports(module, source) == expected


@pytest.mark.parametrize("room", ["tensors", "method"])
def test_tensors_and_method_import_only_torch(room):
    allowed = {"torch", "typing_extensions", "lightning_autoprune", *sys.stdlib_module_names}
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                foreign = {name.split(".")[0] for name in names if name} - allowed
                if path.name in ("generators.py", "random_state.py"):
                    foreign -= {"numpy"}  # its random numbers are isolated too
                assert not foreign, path
