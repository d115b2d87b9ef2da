"""Each notebook runs, on a smaller setting if it trains for long, and is the same as its script."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from paths import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.py"))}
SMALLER = {
    "quickstart": ("max_epochs=40", "max_epochs=10"),
    "your_own_model": ("BATCHES = 400", "BATCHES = 20"),
}
LAST_LINES = {
    "how_it_works": "T = W ⊙ h(M) after each step, dormant values unchanged, target met",
    "quickstart": "same outputs",
    "your_own_model": "resumed as if never stopped, same outputs from the file, the shrunk model and ONNX",
}
PICTURES = {"how_it_works": 8, "quickstart": 2, "your_own_model": 2}


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def printed(notebook) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout").splitlines()


def pictures(notebook) -> int:
    return sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", []))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_runs(name, tmp_path):
    script = NOTEBOOKS[name].read_text()
    if name in SMALLER:
        assert script.count(SMALLER[name][0]) == 1
        script = script.replace(*SMALLER[name])
    notebook = jupytext.reads(script, fmt="py:percent")
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    assert printed(notebook)[-1] == LAST_LINES[name]
    assert pictures(notebook) == PICTURES[name]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_script_and_notebook_are_the_same_and_the_outputs_are_stored(name):
    path = NOTEBOOKS[name].with_suffix(".ipynb")
    stored = nbformat.read(path, as_version=4)
    assert cells(stored) == cells(jupytext.read(NOTEBOOKS[name]))
    assert all(cell.execution_count for cell in stored.cells if cell.cell_type == "code")
    assert printed(stored)[-1] == LAST_LINES[name]
    assert pictures(stored) == PICTURES[name]
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_warning_and_no_path_of_the_machine_is_stored(name):
    stored = nbformat.read(NOTEBOOKS[name].with_suffix(".ipynb"), as_version=4)
    outputs = [output for cell in stored.cells for output in cell.get("outputs", [])]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # nothing of stderr
    texts = [output.get("text", "") for output in outputs] + [str(o.get("data", {}).get("text/plain")) for o in outputs]
    assert not [text for text in texts if str(Path.home()) in text or "/tmp" in text or "site-packages" in text]
