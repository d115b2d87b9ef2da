"""The report of a checkpoint as one HTML page that needs nothing else: pictures and styles are in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from lightning_autoprune.reporting.checkpoint_reader import SavedModel
from lightning_autoprune.reporting.layer_table import table_cells, total_row
from lightning_autoprune.reporting.plots import (
    auxiliary_histograms,
    input_survivors,
    metric_path,
    sparsity_curves,
    sparsity_heatmap,
)

__all__ = ["headline", "html_report"]

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

_MAP_FROM = 4  # layers, from which on a map shows more than curves do


def headline(saved: SavedModel) -> str:
    """What the file is, in a sentence."""
    whole = total_row(saved.layers())
    words = {
        None: "It has no state of a pruning: the layers below are all tensors of two dimensions or more.",
        "dense": "Saved in the dense phase, before pruning began.",
        "pruning": "Saved while the masks still changed.",
        "frozen": "The masks are final.",
    }
    if not whole.weights:
        return "It has no weights, that is, no tensors of two dimensions or more."
    epoch = "Step" if saved.epoch is None else f"Epoch {saved.epoch}, step"
    when = "" if saved.step is None else f" {epoch} {saved.step:,}."
    compression = f"{whole.weights / whole.kept:.1f}×" if whole.kept else "nothing is left"
    return f"{whole.sparsity:.2%} of {whole.weights:,} weights are 0 ({compression}).{when} {words[saved.phase]}"


def html_report(saved: SavedModel) -> str:
    """The page, as text: a table of the layers and what pictures the file has the figures for.

    Raises:
        AutoPruneError: if matplotlib is not installed.
    """
    rows = saved.layers()
    head, cells = table_cells([*rows, total_row(rows)])
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + '<th class="left">share kept</th></tr>']
    for row, line in zip([*rows, total_row(rows)], cells, strict=True):
        bar = f'<td class="left"><div style="width:{100 * (1 - row.sparsity):.2f}%"></div></td>'
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + bar + "</tr>")
    pictures = "\n".join(_figure(title, figure, caption) for title, figure, caption in _pictures(saved))
    name = escape(saved.path.name)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: pruning</title><style>{_STYLE}</style></head>
<body>
<h1>{name}</h1>
<p>{escape(headline(saved))}</p>
<h2>Layers</h2>
<div class="wide"><table>
{chr(10).join(lines)}
</table></div>
{pictures}
<p class="note">Made by <code>lightning-autoprune report</code>. FLOPs are of one forward on the module's
<code>example_input_array</code>; revived weights are counted from log to log.</p>
</body>
</html>
"""


def _pictures(saved: SavedModel) -> Iterator[tuple[str, Figure, str]]:
    history = saved.history
    if history.curves:
        yield "Sparsity over the run", sparsity_curves(history.curves), "The share of each layer's weights that are 0."
        if len(history.names) >= _MAP_FROM:
            yield "The same as a map", sparsity_heatmap(history.curves), "A row a layer, a column a step."
    if history.metric and history.points:
        points = [(sparsity, value) for _, sparsity, value in history.points]
        caption = "Each point is a validation, in the order of the run."
        yield f"{history.metric} against sparsity", metric_path(points, history.metric), caption
    if history.histograms:
        caption = "When the masks froze, or at the last look. Weights with m above 0 are kept."
        yield "Auxiliary parameters m", auxiliary_histograms(history.histograms), caption
    first = next(iter(saved.weights.items()), None)
    if first and first[1].dim() in (2, 4) and first[1].numel():
        shape = "×".join(map(str, first[1].shape))  # of a file, which does not say whether it is transposed (GPT-2)
        caption = f"The first layer, {first[0]}, has shape {shape}. The first number is taken for that of its outputs."
        yield "What the first layer still reads", input_survivors(first[1]), caption


def _figure(title: str, figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    picture = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<h2>{escape(title)}</h2>\n<figure><img alt="{escape(title)}" src="data:image/png;base64,{picture}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
