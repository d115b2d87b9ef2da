"""The report on a checkpoint as one HTML page that needs no other file: its pictures and styles are embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from lightning_autoprune.reporting.checkpoint_reader import SavedModel
from lightning_autoprune.reporting.layer_table import LayerSummary, format_layer_table, sum_layers
from lightning_autoprune.reporting.plots import (
    auxiliary_histograms,
    input_survivors,
    metric_path,
    sparsity_curves,
    sparsity_heatmap,
)

__all__ = ["render_html_report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.5rem }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, th.left { text-align: left } tr:last-child { font-weight: 600 }
td.left { min-width: 7rem } td.left div { background: #0072B2; height: .7rem } td.left { background: #fff }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption, .note { color: #555; font-size: .9rem }
"""

_HEATMAP_MIN_LAYERS = 4  # fewer layers are easier to read as curves


class _Picture(NamedTuple):
    title: str
    figure: Figure
    caption: str


def render_html_report(saved: SavedModel) -> str:
    """Return the page: a table of the layers, and every picture that the file has figures for.

    Raises:
        AutoPruneError: if matplotlib is not installed.
    """
    name = escape(saved.path.name)
    pictures = "\n".join(map(_render_picture, _draw_pictures(saved)))
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: pruning</title><style>{_STYLE}</style></head>
<body>
<h1>{name}</h1>
<p>{escape(saved.describe())}</p>
<h2>Layers</h2>
<div class="wide"><table>
{_render_table_rows(saved.layers())}
</table></div>
{pictures}
<p class="note">Made by <code>lightning-autoprune report</code>. FLOPs are those of one forward pass on the module's
<code>example_input_array</code>. Revived weights are counted from log to log.</p>
</body>
</html>
"""


def _render_table_rows(layers: list[LayerSummary]) -> str:
    rows = [*layers, sum_layers(layers)]
    head, cells = format_layer_table(rows)
    lines = ["<tr>" + "".join(f"<th>{escape(text)}</th>" for text in head) + '<th class="left">share kept</th></tr>']
    for row, texts in zip(rows, cells, strict=True):
        bar = f'<td class="left"><div style="width:{100 * (1 - row.sparsity):.2f}%"></div></td>'
        lines.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + bar + "</tr>")
    return "\n".join(lines)


def _draw_pictures(saved: SavedModel) -> Iterator[_Picture]:
    history = saved.history
    if history.curves:
        caption = "The fraction of each layer's weights that are 0."
        yield _Picture("Sparsity over the run", sparsity_curves(history.curves), caption)
        if len(history.names) >= _HEATMAP_MIN_LAYERS:
            caption = "One row per layer, one column per step."
            yield _Picture("Sparsity over the run, as a map", sparsity_heatmap(history.curves), caption)
    if history.metric and history.points:
        points = [(point.sparsity, point.value) for point in history.points]
        caption = "One point per validation, in the order of the run."
        yield _Picture(f"{history.metric} against sparsity", metric_path(points, history.metric), caption)
    if history.histograms:
        caption = "Recorded when the masks became final, or before that, at the last log. Weights with m > 0 are kept."
        yield _Picture("Auxiliary parameters m", auxiliary_histograms(history.histograms), caption)
    name, weight = next(iter(saved.weights.items()), ("", None))
    if weight is not None and weight.dim() in (2, 4) and weight.numel():
        shape = "×".join(map(str, weight.shape))
        # The file does not say whether a weight is transposed, as in GPT-2.
        caption = f"The first layer, {name}, has shape {shape}. The first number is taken as the number of outputs."
        yield _Picture("Inputs that the first layer still reads", input_survivors(weight), caption)


def _render_picture(picture: _Picture) -> str:
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="png", dpi=110)
    png = base64.b64encode(buffer.getvalue()).decode()
    title = escape(picture.title)
    return (
        f'<h2>{title}</h2>\n<figure><img alt="{title}" src="data:image/png;base64,{png}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )
