"""Each picture shows its data, and data that can't be drawn is refused with a message."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import csv_logger, fit

from lightning_autoprune import AutoPruneCallback, AutoPruneError
from lightning_autoprune.plots import (
    auxiliary_histograms,
    input_survivors,
    metric_path,
    pareto,
    read_curves,
    sparsity_curves,
    sparsity_heatmap,
)

CURVES = {
    "first": [(0, 0.0), (10, 0.5), (20, 0.875)],
    "last": [(0, 0.0), (10, 0.25), (20, 0.5)],
    "all": [(0, 0.0), (10, 0.4), (20, 0.8)],
}


def pixels(figure):
    """Render the figure, which fails if it can't be drawn, and return its pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.buffer_rgba()


def test_curves_are_read_from_the_log_of_a_run():
    callback = AutoPruneCallback(target_sparsity=0.8)
    fit(callback, logger=csv_logger(Path("logs")))
    curves = read_curves("logs/metrics.csv")
    assert curves.keys() == {"first", "last", "all"}
    assert curves["all"][-1] == (31, pytest.approx(callback.sparsity))
    assert [step for step, _ in curves["first"]] == [step for step, _ in curves["all"]]


def test_a_log_without_curves_is_refused_by_name():
    Path("metrics.csv").write_text("step,loss\n1,0.5\n")
    with pytest.raises(AutoPruneError, match=r"metrics.csv has no column `autoprune/sparsity`: no AutoPruneCallback"):
        read_curves("metrics.csv")


def test_there_is_one_line_per_layer_and_the_legend_has_its_last_value():
    figure = sparsity_curves(CURVES)
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["first: 87.50%", "last: 50.00%", "all: 80.00%"]
    assert lines[0].get_xydata().tolist() == [[0, 0], [10, 50], [20, 87.5]]
    pixels(figure)


def test_twenty_eight_layers_are_distinguishable():
    figure = sparsity_curves({f"layer{i}": [(0, 0.0), (1, i / 40)] for i in range(28)})
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 28
    pixels(figure)


def test_more_layers_are_drawn_in_gray_with_one_entry_in_the_legend():
    figure = sparsity_curves({f"layer{i}": [(0, 0.0), (1, i / 40)] for i in range(29)} | {"all": [(0, 0.0), (1, 0.5)]})
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 2
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["each of 29 layers", "all: 50.00%"]
    pixels(figure)


@pytest.mark.parametrize("layers", [3, 12])
def test_layers_whose_names_begin_with_an_underscore_are_in_the_legend(layers):
    names = [*(f"_layer{i}" for i in range(layers)), "all"]
    figure = sparsity_curves({name: [(0, 0.0), (1, 0.5)] for name in names})
    legend = figure.axes[0].get_legend() or figure.legends[0]
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [f"{name}: 50.00%" for name in names]
    drawn = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    assert drawn == [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    pixels(figure)


def test_long_names_leave_room_for_the_curves():
    figure = sparsity_curves(
        {f"model.encoder.layers.{i}.attention.self.query": [(0, 0.0), (1, 0.5)] for i in range(25)}
    )
    pixels(figure)
    assert figure.axes[0].get_window_extent().width > 6 * figure.dpi


def test_a_single_point_is_visible():
    figure = sparsity_curves({"first": [(5, 0.5)], "last": [(5, 0.2)]})
    figure.axes[0].get_legend().remove()  # it shows the same colors
    drawn = np.asarray(pixels(figure))[..., :3]
    assert (drawn == [0x00, 0x72, 0xB2]).all(-1).any()


def test_the_heatmap_has_one_row_per_layer_and_one_column_per_step():
    figure = sparsity_heatmap(CURVES)
    (mesh,) = figure.axes[0].collections
    assert mesh.get_array().reshape(2, 3).tolist() == [[0, 50, 87.5], [0, 25, 50]]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["first", "last"]
    pixels(figure)


@pytest.mark.parametrize("layers", [1, 60, 250])
def test_no_text_overlaps_on_a_heatmap_of_any_height(layers):
    figure = sparsity_heatmap({f"layers.{i}": [(0, 0.0), (1, 0.5)] for i in range(layers)})
    pixels(figure)
    names = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert len(names) >= min(layers, 60)
    assert all(below.y1 < above.y0 for above, below in pairwise(names))
    assert figure.axes[1].yaxis.label.get_window_extent().y1 <= figure.bbox.y1


def test_survivors_are_counted_per_input_and_dead_inputs_are_left_blank():
    weight = torch.ones(3, 6)
    weight[:, 0], weight[0, 1] = 0, 0
    figure = input_survivors(weight, (2, 3))
    (image,) = figure.axes[0].images
    shown = image.get_array()
    assert shown.mask.tolist() == [[True, False, False], [False, False, False]]
    assert shown.compressed().tolist() == [2, 3, 3, 3, 3]
    assert figure.axes[0].get_title() == "1 of 6 inputs are dead"
    pixels(figure)


def test_channels_of_an_image_are_summed_and_a_kernel_is_drawn_as_an_image():
    assert input_survivors(torch.ones(5, 2 * 4), (2, 2)).axes[0].images[0].get_array().tolist() == [[10, 10]] * 2
    kernel = input_survivors(torch.ones(5, 2, 3, 4)).axes[0].images[0].get_array()
    assert kernel.shape == (3, 4)
    assert kernel.min() == kernel.max() == 10


@pytest.mark.parametrize("shape", [(2, 4), (0, 3), (6,)])
def test_a_shape_that_the_inputs_do_not_form_is_refused(shape):
    with pytest.raises(
        AutoPruneError, match=re.escape(f"6 inputs do not form images of `shape` {shape}: give (height")
    ):
        input_survivors(torch.ones(3, 6), shape)


def test_histograms_color_kept_and_pruned_weights_differently():
    figure = auxiliary_histograms({f"layer{i}": torch.linspace(-1, 3, 100) for i in range(5)})
    assert len(figure.axes) == 5
    assert figure.axes[0].get_title() == "layer0\n75.0% kept"
    assert len({bar.get_facecolor() for bar in figure.axes[0].patches}) == 2
    pixels(figure)


def test_a_histogram_draws_an_m_of_zero_as_pruned():
    figure = auxiliary_histograms({"layer": torch.tensor([0.0] * 9 + [1.0])})
    assert figure.axes[0].get_title() == "layer\n10.0% kept"


def test_titles_of_histograms_fit_their_panels():
    names = [f"model.encoder.layers.{i}.attention.self.query" for i in range(3)]
    figure = auxiliary_histograms({name: torch.linspace(-1, 3, 100) for name in names})
    pixels(figure)
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(titles))
    assert titles[-1].x1 < figure.bbox.x1
    assert figure.axes[1].get_title() == "…der.layers.1.attention.self.query\n75.0% kept"


def test_the_path_of_a_metric_connects_its_validations():
    figure = metric_path([(0.0, 0.91), (0.5, 0.93), (0.9, 0.92)], "val_accuracy")
    line, last = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[0, 0.91], [50, 0.93], [90, 0.92]]
    assert last.get_label() == "the last: 0.92 at 90.00%"
    pixels(figure)


def test_the_pareto_front_has_the_runs_that_no_run_beats_in_both():
    runs = {"dense": (0.0, 1.0), "beaten": (0.5, 1.4), "half": (0.5, 1.2), "tenth": (0.9, 1.2), "small": (0.99, 2.0)}
    *_, front = pareto(runs).axes[0].lines
    assert front.get_xydata().round(3).tolist() == [[100, 2.0], [10, 1.2], [1, 1.0]]
    upwards = pareto(runs, "accuracy", lower_is_better=False).axes[0].lines[-1]
    assert upwards.get_xydata().round(3).tolist() == [[100, 2.0]]
    pixels(pareto(runs))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: sparsity_curves({"all": [(0, 0.0)]}), "There is no point to draw: no layer's sparsity"),
        (lambda: sparsity_heatmap({}), "There is no point to draw: no layer's sparsity"),
        (lambda: auxiliary_histograms({}), "There are no auxiliary parameters to draw: they exist only while"),
        (lambda: metric_path([], "val_loss"), "There is no point to draw: 'val_loss' has not been measured"),
        (lambda: pareto({}), "There are no runs to draw"),
        (lambda: pareto({"a": (1.0, 2.0)}), r"`sparsity of a` is 1.0; it must be a number in \[0, 1\)"),
        (lambda: input_survivors(torch.ones(3)), r"The weight has shape \(3,\); it must be \(outputs, inputs"),
    ],
    ids=["curves", "map", "histograms", "path", "front", "sparsity", "weight"],
)
def test_data_that_cannot_be_drawn_is_refused_with_a_message(draw, message):
    with pytest.raises(AutoPruneError, match=message):
        draw()


def test_without_matplotlib_the_error_says_what_to_install():
    code = """
import sys
from lightning_autoprune.plots import sparsity_curves
for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] or ["matplotlib"]:
    sys.modules[name] = None  # as if it were not installed
try:
    sparsity_curves({"a": [(0, 0.0)]})
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "Pictures need matplotlib: pip install 'lightning-autoprune[plots]'.\n"
