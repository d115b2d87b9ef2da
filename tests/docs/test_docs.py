"""The documentation site builds without a warning, and what its pages say of the package is so."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from browser import has_color, needs_browser, screenshot
from helpers import Net, loader
from paths import ROOT

import lightning_autoprune
from lightning_autoprune import AutoPruneCallback, plots, prunable_weights, sparsity
from lightning_autoprune.plots import COLORS

for _name in ("sphinx", "furo", "myst_parser", "matplotlib"):
    pytest.importorskip(_name)

DOCS = ROOT / "docs"
PAGES = (
    "settings",
    "configuration",
    "coming_from_modelpruning",
    "troubleshooting",
    "large_models",
    "api",
    "mathematics",
    "changelog",
)
RAISED = ("AutoPruneError", "rank_zero_warn", "warn")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the pages, made as by ``make docs``."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_all_pages_are_built_and_reached_from_the_first(site):
    home = (site / "index.html").read_text()
    for page in PAGES:
        assert (site / f"{page}.html").exists(), page
        assert f'href="{page}.html"' in home, page


@needs_browser
def test_a_real_browser_shows_the_site(site, tmp_path):
    home = screenshot(site / "index.html", tmp_path / "index.png")
    assert all(has_color(home, color) for color in COLORS[1:3])  # of the curves in the first picture
    for page in PAGES:
        seen = screenshot(site / f"{page}.html", tmp_path / f"{page}.png")
        assert has_color(seen, "#000000")  # text
        assert has_color(seen[:, :8], "#F8F9FB")  # the theme's bar at the left, which needs its style sheet


def test_the_reference_has_every_public_name(site):
    api = (site / "api.html").read_text()
    names = [f"lightning_autoprune.{name}" for name in lightning_autoprune.__all__]
    names += [f"lightning_autoprune.plots.{name}" for name in plots.__all__ if inspect.isfunction(getattr(plots, name))]
    assert [name for name in names if f'id="{name}"' not in api] == [], "to be added to docs/api.rst"


def test_the_settings_are_all_there_with_their_defaults():
    page = (DOCS / "settings.md").read_text()
    for name, parameter in inspect.signature(AutoPruneCallback).parameters.items():
        value = parameter.default
        shown = json.dumps(value) if isinstance(value, str) else repr(value)
        assert f"| `{name}={shown}` |" in page, name


def test_the_measured_figures_are_put_in(site):
    from ablations import CHANGES

    page = (site / "settings.html").read_text()
    assert "{{" not in page
    cells = re.sub(r"<[^>]+>", "", page.replace("&quot;", '"').replace("&#39;", "'"))
    for name in CHANGES:
        assert name in cells, name
    assert "not measured" in cells


# Troubleshooting


def messages() -> list[re.Pattern[str]]:
    """What the package raises and warns of, with anything in the place of what is put in."""
    found = []
    for path in sorted(Path(lightning_autoprune.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in RAISED and node.args:
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                constants = [str(part.value) if isinstance(part, ast.Constant) else None for part in parts]
                if sum(len(constant or "") for constant in constants) >= 20:
                    pattern = "".join(".*" if constant is None else re.escape(constant) for constant in constants)
                    found.append(re.compile(pattern))
    return found


def entries() -> dict[str, list[str]]:
    """The quoted messages under each heading of the page."""
    found = {}
    for section in re.split(r"^### ", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        quotes = re.findall(r"(?:^> .*\n)+", text, flags=re.MULTILINE)
        found[heading] = [" ".join(line.removeprefix("> ") for line in quote.splitlines()) for quote in quotes]
    return found


def test_the_source_has_every_message_that_is_explained():
    known, explained = messages(), entries()
    assert len(explained) >= 20
    for heading, quotes in explained.items():
        assert quotes, heading
        assert quotes[0].startswith(heading), heading
        for quote in quotes:
            assert any(pattern.fullmatch(quote) for pattern in known), quote
    assert not any(pattern.fullmatch("All weights of the layers are wrong: do as you like.") for pattern in known)


# Coming from ModelPruning


def test_the_code_before_and_after_gives_the_same_sparsity_under_the_same_keys():
    before, after, _ = re.findall(r"```python\n(.*?)```", (DOCS / "coming_from_modelpruning.md").read_text(), re.DOTALL)
    for code in (before, after):
        exec(code, {"model": Net(), "train_loader": loader()})
        plain = Net()
        plain.load_state_dict(torch.load("pruned.ckpt", weights_only=True)["state_dict"])
        assert sparsity(plain) == pytest.approx(0.95, abs=0.01)
        assert all(weight.count_nonzero() for weight in prunable_weights(plain).values())


def test_a_file_with_masks_becomes_a_plain_one():
    *_, code = re.findall(r"```python\n(.*?)```", (DOCS / "coming_from_modelpruning.md").read_text(), re.DOTALL)
    old, model = Net(), Net()
    torch.nn.utils.prune.l1_unstructured(old.first, "weight", 0.5)
    torch.save({"state_dict": old.state_dict()}, "old.ckpt")
    exec(code, {"model": model})
    assert torch.equal(model.first.weight, old.first.weight)


def test_every_option_of_modelpruning_has_its_row():
    from lightning.pytorch.callbacks import ModelPruning

    page = (DOCS / "coming_from_modelpruning.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    for name in inspect.signature(ModelPruning).parameters:
        assert f"`{name}" in rows, name


def test_links_lead_to_files():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
            assert (DOCS / target).exists(), f"{page.name}: {target}"
