"""The recipes run as they are, if their packages are installed, and the page shows lines of them."""

from __future__ import annotations

import re
import runpy

import pytest
from paths import ROOT

FOLDER = ROOT / "docs" / "recipes"
PAGE = (ROOT / "docs" / "recipes.md").read_text()
PACKAGES = {  # where the project's name is not that of its package
    "chemprop_mpnn": "chemprop",
    "darts_nbeats": "darts",
    "monai_segmentation": "monai",
    "neuralforecast_nhits": "neuralforecast",
    "pytorch_forecasting_tft": "pytorch_forecasting",
    "pytorch_geometric": "torch_geometric",
    "pytorch_tabular_mlp": "pytorch_tabular",
    "transformers_text": "transformers",
}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_recipe_prunes_to_its_target(name, tmp_path, monkeypatch, capsys):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    reached = re.findall(r"^sparsity ([\d.]+)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert reached
    assert all(float(value) == pytest.approx(0.8, abs=0.005) for value in reached)


def test_the_page_names_every_recipe_and_shows_lines_of_it():
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    named = {name: section for section in sections for name in re.findall(r"docs/recipes/(\w+)\.py", section)}
    assert sorted(named) == SCRIPTS
    for name, section in named.items():
        lines = [line.strip() for line in ["", "...", *(FOLDER / f"{name}.py").read_text().splitlines()]]
        [block] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
        assert [line for line in block.splitlines() if line.strip() not in lines] == [], name
