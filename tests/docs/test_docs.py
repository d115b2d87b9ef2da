"""The documentation site builds without warnings, and its pages agree with the package and the benchmarks."""

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
    "held_out_data",
    "finetuning",
    "logging",
    "smaller_models",
    "benchmarks",
    "compatibility",
    "large_models",
    "configuration",
    "extending",
    "coming_from_modelpruning",
    "troubleshooting",
    "api",
    "mathematics",
    "contributing",
    "changelog",
)
RAISED = ("AutoPruneError", "HeldOutError", "Obstacle", "rank_zero_warn", "warn")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the pages as ``make docs`` does, and return their folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet", str(DOCS), str(folder)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return folder


def test_every_page_is_built_and_linked_from_the_home_page(site):
    home = (site / "index.html").read_text()
    for page in PAGES:
        assert (site / f"{page}.html").exists(), page
        assert f'href="{page}.html"' in home, page


@needs_browser
def test_a_real_browser_shows_the_site(site, tmp_path):
    home = screenshot(site / "index.html", tmp_path / "index.png")
    assert all(has_color(home, color) for color in COLORS[1:3])  # curves in the first picture
    for page in PAGES:
        pixels = screenshot(site / f"{page}.html", tmp_path / f"{page}.png")
        assert has_color(pixels, "#000000")  # text
        assert has_color(pixels[:, :8], "#F8F9FB")  # the theme's sidebar, which needs its style sheet


def test_the_api_reference_has_every_public_name(site):
    api = (site / "api.html").read_text()
    names = [f"lightning_autoprune.{name}" for name in lightning_autoprune.__all__]
    names += [f"lightning_autoprune.plots.{name}" for name in plots.__all__ if inspect.isfunction(getattr(plots, name))]
    assert [name for name in names if f'id="{name}"' not in api] == [], "add these to docs/api.rst"


def test_the_settings_page_has_every_setting_with_its_default():
    page = (DOCS / "settings.md").read_text()
    for name, parameter in inspect.signature(AutoPruneCallback).parameters.items():
        value = parameter.default
        shown = json.dumps(value) if isinstance(value, str) else repr(value)
        assert f"| `{name}={shown}` |" in page, name


def test_the_settings_page_has_the_measured_figures(site):
    from ablations import CHANGES

    page = (site / "settings.html").read_text()
    assert "{{" not in page
    cells = re.sub(r"<[^>]+>", "", page.replace("&quot;", '"').replace("&#39;", "'"))
    for name in CHANGES:
        assert name in cells, name
    assert "not measured" in cells


# Links and paths


def test_links_lead_to_files():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
            assert (DOCS / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [*DOCS.glob("*.*"), *ROOT.glob("*.md")], ids=lambda page: page.name)
def test_every_test_path_that_is_named_exists(page):
    if page.suffix in {".md", ".rst", ".py"}:
        for path in re.findall(r"\btests/[\w./]*\w", page.read_text()):
            assert (ROOT / path).exists(), path


def test_the_compatibility_page_names_a_test_file_for_nearly_every_row():
    rows = [row for row in (DOCS / "compatibility.md").read_text().splitlines() if row.startswith("| ")]
    without = [row for row in rows if "tests" not in row and not row.startswith("| ---")]
    assert len(without) <= 1, without


# Benchmarks


def test_the_benchmark_tables_agree_with_the_rows_of_the_results():
    import accuracy
    import cost
    import deploy
    import finetuning
    import neurons
    import paper
    from harness.methods import LABELS
    from harness.report import compression_table, no_target_table
    from harness.results import read_rows
    from harness.tasks import DEFAULT_TASKS, TASKS

    rows = [row for row in read_rows(accuracy.RESULTS) if accuracy.has_current_settings(row)]
    tables = {f"accuracy.py, {task}": compression_table(rows, task, LABELS) for task in DEFAULT_TASKS}
    tables["accuracy.py, no target"] = no_target_table(rows)
    tables["cost.py"] = cost.cost_table(cost.last_rows(cost.RESULTS))
    tables["deploy.py, sizes"] = deploy.size_table(read_rows(deploy.RESULTS))
    tables["deploy.py, latencies"] = deploy.latency_table(read_rows(deploy.RESULTS))
    tuned = read_rows(finetuning.RESULTS)
    for task in {row["task"] for row in tuned}:
        tables[f"finetuning.py, {task}"] = finetuning.make_table(tuned, task)
    tables["neurons.py"] = neurons.result_table(read_rows(neurons.RESULTS), "lenet-5")
    papers = {f"paper.py, {task}": paper.result_table(read_rows(paper.RESULTS), task) for task in TASKS}
    assert any(papers.values())
    tables |= {name: table for name, table in papers.items() if table}
    page = (DOCS / "benchmarks.md").read_text()
    for name, table in tables.items():
        assert f"\n\n{table}\n\n" in page, f"copy the table that {name} prints to docs/benchmarks.md:\n{table}"


def test_the_sweeps_on_the_benchmarks_page_agree_with_the_rows_of_the_results():
    import robustness
    from harness.results import group_means, read_rows

    means = group_means(read_rows(robustness.RESULTS), "error", ("method", "options"))
    page = (DOCS / "benchmarks.md").read_text()
    for method, option, value, factors in robustness.SWEEPS:
        errors = [means[method, robustness.scaled_option(option, value, factor)].mean for factor in factors]
        if method == "spred":
            del errors[-1]  # the page says why
        spread = max(errors) - min(errors)
        assert f" | {' '.join(f'{error:.2f}' for error in errors)} | {spread:.2f} |" in page, option


# Troubleshooting


def messages() -> list[re.Pattern[str]]:
    """Return patterns of the messages that the package raises and warns with, where any text may replace a value."""
    found = []
    for path in sorted(Path(lightning_autoprune.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and function in RAISED and node.args:
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                constants = [str(part.value) if isinstance(part, ast.Constant) else None for part in parts]
                if sum(len(constant or "") for constant in constants) >= 20:
                    pattern = "".join(".*" if constant is None else re.escape(constant) for constant in constants)
                    if function == "Obstacle":
                        pattern = f"Layer .* {pattern}\\."
                    elif function == "HeldOutError":  # has a reason, to which it adds the way out
                        pattern = f"No data can be held out: {pattern}\\. .*"
                    found.append(re.compile(pattern))
    return found


def entries() -> dict[str, list[str]]:
    """Return the quoted messages under each heading of the page."""
    found = {}
    for section in re.split(r"^### ", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        quotes = re.findall(r"(?:^> .*\n)+", text, flags=re.MULTILINE)
        found[heading] = [" ".join(line.removeprefix("> ") for line in quote.splitlines()) for quote in quotes]
    return found


def test_the_source_has_every_message_that_the_troubleshooting_page_quotes():
    known, explained = messages(), entries()
    assert len(explained) >= 20
    for heading, quotes in explained.items():
        assert quotes, heading
        assert quotes[0].startswith(heading), heading
        for quote in quotes:
            assert any(pattern.fullmatch(quote) for pattern in known), quote
    assert not any(pattern.fullmatch("All weights of the layers are wrong: do as you like.") for pattern in known)


# Code


def test_the_code_with_own_objects_runs_and_meets_its_target():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), flags=re.DOTALL)
    names = {"model": Net(), "train_loader": loader()}
    exec(code, names)
    assert names["callback"].sparsity == pytest.approx(0.9, abs=0.01)
    assert sparsity(names["model"]) == pytest.approx(0.9, abs=0.01)


def test_the_code_of_the_papers_setting_takes_its_step_in_each_auxiliary_step():
    from harness.methods.paper import STATED, UNSTATED

    [code] = re.findall(r"```python\n(.*?)```", (DOCS / "benchmarks.md").read_text(), flags=re.DOTALL)
    names = {"model": Net(), "train_loader": loader()}
    exec(code, names)
    settings, steps = names["callback"].settings, 13 * 128 // 2 // 16
    assert settings.auxiliary_lr / (steps - round(0.35 * steps)) == pytest.approx(1.5e-2)
    assert {name: getattr(settings, name) for name in {**STATED, **UNSTATED}} == {**STATED, **UNSTATED}
    assert names["trainer"].global_step == steps


def test_the_benchmarks_page_has_the_measured_change_of_each_part_of_the_papers_setting(site):
    page = (site / "benchmarks.html").read_text()
    assert "{{" not in page
    section = page[page.index('id="the-paper-s-setting"') :]
    for option in ("autoprune", "leaky_relu", "constant"):
        assert f"{option}&quot;</span></code>: +" in section, option


def test_the_code_for_whole_neurons_runs():
    [code] = re.findall(r"```python\n(.*?)```", (DOCS / "smaller_models.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["callback"], AutoPruneCallback)


def test_the_code_before_and_after_gives_the_same_sparsity_under_the_same_keys():
    before, after, _ = re.findall(r"```python\n(.*?)```", (DOCS / "coming_from_modelpruning.md").read_text(), re.DOTALL)
    for code in (before, after):
        exec(code, {"model": Net(), "train_loader": loader()})
        plain = Net()
        plain.load_state_dict(torch.load("pruned.ckpt", weights_only=True)["state_dict"])
        assert sparsity(plain) == pytest.approx(0.95, abs=0.01)
        assert all(weight.count_nonzero() for weight in prunable_weights(plain).values())


def test_a_checkpoint_with_masks_becomes_a_plain_one():
    *_, code = re.findall(r"```python\n(.*?)```", (DOCS / "coming_from_modelpruning.md").read_text(), re.DOTALL)
    old, model = Net(), Net()
    torch.nn.utils.prune.l1_unstructured(old.first, "weight", 0.5)
    torch.save({"state_dict": old.state_dict()}, "old.ckpt")
    exec(code, {"model": model})
    assert torch.equal(model.first.weight, old.first.weight)


def test_every_option_of_modelpruning_has_a_row():
    from lightning.pytorch.callbacks import ModelPruning

    page = (DOCS / "coming_from_modelpruning.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    for name in inspect.signature(ModelPruning).parameters:
        assert f"`{name}" in rows, name
