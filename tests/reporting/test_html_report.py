"""The HTML report needs no other file, shows the checkpoint's figures, and is safe to open."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from browser import has_color, needs_browser, run, screenshot
from helpers import Net, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.plots import COLORS
from lightning_autoprune.reporting.checkpoint_reader import read_checkpoint
from lightning_autoprune.reporting.html_report import render_html_report


class Elements(HTMLParser):
    """The tags, attributes and texts of a page; fails on tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    class Example(Net):
        example_input_array = torch.zeros(1, 12)

    folder = tmp_path_factory.mktemp("run")
    callback = AutoPruneCallback(target_sparsity=0.8)
    fit(
        [callback, ModelCheckpoint(folder, filename="c")],
        model=Example(),
        val=loader(seed=3),
        enable_checkpointing=True,
    )
    return read_checkpoint(folder / "c.ckpt")


def test_the_page_has_the_table_and_every_picture_and_needs_no_other_file(saved):
    elements = Elements(render_html_report(saved))
    titles = [attributes["alt"] for tag, attributes in elements.tags if tag == "img"]
    assert titles == [
        "Sparsity over the run",
        "val_loss against sparsity",
        "Auxiliary parameters m",
        "Inputs that the first layer still reads",
    ]
    sources = [attributes.get("src", "") + attributes.get("href", "") for _, attributes in elements.tags]
    assert all(source.startswith("data:image/png;base64,") for source in sources if source)
    text = " ".join(elements.texts)
    for row in saved.layers():
        assert f"{row.kept:,}" in text
        assert f"{row.flops_kept:,}" in text
        assert f"{row.sparsity:.2%}" in text
    assert saved.describe() in text
    assert "80.08% of 256 weights are 0 (5.0×). Epoch 3, step 32. The masks are final." in text


def test_many_layers_are_shown_as_a_map(saved, tmp_path):
    history = saved.history.state_dict()
    assert "Sparsity over the run, as a map" not in render_html_report(saved)
    names = [f"layer{i}" for i in range(5)]
    rows = torch.rand(3, 6)
    history = {**history, "names": names, "rows": rows, "steps": torch.arange(3), "revived": [0] * 5}
    weights = {name: torch.eye(3) for name in names}
    many = type(saved)(saved.path, weights, weights, "frozen", 1, 1, type(saved.history).from_state_dict(history))
    assert "Sparsity over the run, as a map" in render_html_report(many)


def test_the_picture_of_the_first_layer_explains_how_its_shape_is_read(saved):
    assert "first, has shape 16×12. The first number is taken as the number of outputs." in render_html_report(saved)


def test_a_missing_pruning_state_is_mentioned_and_names_are_escaped(tmp_path):
    path = tmp_path / "<img src=x onerror=alert(1)>.pt"
    torch.save({"<script>alert(1)</script>": torch.eye(3)}, path)
    page = render_html_report(read_checkpoint(path))
    assert "It has no pruning state: the layers below are all tensors with two or more dimensions." in page
    elements = Elements(page)
    assert {tag for tag, _ in elements.tags} & {"script"} == set()
    assert [attributes["alt"] for tag, attributes in elements.tags if tag == "img"] == [
        "Inputs that the first layer still reads"
    ]


@needs_browser
def test_a_real_browser_shows_the_page(saved, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render_html_report(saved), encoding="utf-8")
    seen = screenshot(page, tmp_path / "report.png")
    assert all(has_color(seen, color) for color in COLORS[:2])  # they are in the curves and the histograms
    dom = run(page, tmp_path, "--dump-dom")
    assert len(re.findall("<tr>", dom)) == 4
    assert dom.count("<img ") == 4
