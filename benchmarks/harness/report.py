"""Tables and pictures from the rows of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_autoprune.plots import COLORS

from .results import Mean, group_means
from .tasks import TASKS, Task

UNITS = {"error": "error, %", "loss": "loss, nats"}
MARKERS = "osD^vPX<>*h"


def format_mean(mean: Mean | None, metric: str) -> str:
    """Return "mean ± spread" for a table; the mean alone for one seed; a dash if there was no run."""
    if mean is None:
        return "–"
    digits = 2 if metric == "error" else 3
    spread = f" ± {mean.spread:.{digits}f}" if len(mean.values) > 1 else ""
    return f"{mean.mean:.{digits}f}{spread}"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def full_length_rows(rows: list[dict[str, str]], task: str) -> list[dict[str, str]]:
    """Return the rows of a task whose runs had all of its epochs."""
    return [row for row in rows if row["task"] == task and row["epochs"] == str(TASKS[task].epochs)]


def means_by_target(rows: list[dict[str, str]], task: str) -> dict[tuple[str, ...], Mean]:
    """Return the mean of the task's metric by (method, target), over the runs with all epochs."""
    return group_means(full_length_rows(rows, task), TASKS[task].metric, ("method", "target"))


def compression_table(rows: list[dict[str, str]], task: str, labels: Mapping[str, str]) -> str:
    """Return a table with a line per method and a column per compression; the best cell of a column is bold.

    A cell with fewer seeds than the most in the table has their number in parentheses, and is never the best.
    """
    metric, runs = TASKS[task].metric, means_by_target(rows, task)
    found = {key: mean for key, mean in runs.items() if key[0] in labels}
    columns = sorted({column for _, column in found if column}, key=float)
    most_seeds = max((len(mean.values) for mean in found.values()), default=0)
    complete = {key: mean.mean for key, mean in found.items() if len(mean.values) == most_seeds}
    best = {
        column: min((mean for (_, target), mean in complete.items() if target == column), default=None)
        for column in columns
    }

    lines = []
    for method, label in labels.items():
        cells = {column: found.get((method, column)) for column in columns}
        if any(cells.values()):
            lines.append([label, *(_format_cell(mean, metric, most_seeds, best[c]) for c, mean in cells.items())])
    head = f"{task}: {UNITS[metric]} (dense {format_mean(runs.get(('dense', '')), metric)})"
    return markdown_table([head, *(f"{column}×" for column in columns)], lines)


def no_target_table(rows: list[dict[str, str]], method: str = "autoprune") -> str:
    """Return a table of what the method reaches without a target, beside dense runs of the same seeds."""
    lines = []
    for name, task in TASKS.items():
        full = full_length_rows(rows, name)
        if pruned := [row for row in full if (row["method"], row["target"]) == (method, "")]:
            seeds = {row["seed"] for row in pruned}
            dense = [row for row in full if row["method"] == "dense" and row["seed"] in seeds]
            results = (
                format_mean(group_means(group, task.metric, ()).get(()), task.metric) for group in (dense, pruned)
            )
            compression = group_means(pruned, "compression", ())[()].mean
            lines.append([f"{name}: {UNITS[task.metric]}", *results, f"{compression:.1f}×", str(len(pruned))])
    return markdown_table(["no target", "dense", "pruned", "compression", "seeds"], lines)


def compression_picture(rows: list[dict[str, str]], tasks: Iterable[str], labels: Mapping[str, str]) -> Figure:
    """Draw the metric against compression: a panel per task, a line per method, bars of one standard deviation."""
    tasks = list(tasks)
    picture = Figure(figsize=(4.6 * len(tasks), 4.4), layout="constrained")
    for axes, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        metric, found = TASKS[task].metric, means_by_target(rows, task)
        for i, (method, label) in enumerate(labels.items()):
            if points := _points(found, method):
                ours = method.startswith("autoprune")
                axes.errorbar(
                    [x for x, _ in points],
                    [mean.mean for _, mean in points],
                    [mean.spread for _, mean in points],
                    label=label,
                    color="black" if method == "autoprune" else COLORS[i % len(COLORS)],
                    marker=MARKERS[i % len(MARKERS)],
                    ls="-" if ours or i < len(COLORS) else "--",
                    lw=2.4 if ours else 1.2,
                    ms=5,
                    capsize=2,
                )
        if ("dense", "") in found:
            axes.axhline(found["dense", ""].mean, color="gray", ls=":", label="dense")
        _style(axes, task, "compression of the prunable weights", UNITS[metric])
        _log_scales(axes, task)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    _add_shared_legend(picture)
    return picture


def finetuning_table(rows: list[dict[str, str]], task: Task, labels: Mapping[str, str]) -> str:
    """Return a table with a line per number of steps and sparsity, and a column per method; bold is a line's best cell.

    The column "not pruned" is the dense network after as many steps, and the head has the network that all start with.
    A cell with fewer seeds than the most in the table has their number in parentheses, and is never the best.
    """
    found = group_means([row for row in rows if row["task"] == task.name], task.metric, ("method", "steps", "target"))
    most_seeds = max((len(mean.values) for mean in found.values()), default=0)
    lines = []
    for steps, target in sorted({key[1:] for key in found if key[2]}, key=lambda key: (int(key[0]), float(key[1]))):
        cells = [found.get((method, steps, target)) for method in labels]
        complete = [mean.mean for mean in cells if mean and len(mean.values) == most_seeds]
        best = min(complete, default=None)
        dense = _format_cell(found.get(("dense", steps, "")), task.metric, most_seeds, None)
        lines.append(
            [steps, f"{float(target):.0%}", *(_format_cell(m, task.metric, most_seeds, best) for m in cells), dense]
        )
    start = format_mean(found.get(("dense", "0", "")), task.metric)
    head = [f"{task.name}: {UNITS[task.metric]} (trained: {start}), steps", "sparsity"]
    return markdown_table([*head, *labels.values(), "not pruned"], lines)


def length_table(rows: list[dict[str, str]], task: str, labels: Mapping[str, str]) -> str:
    """Return a table with a line per method and compression, and a column per length of the run in epochs.

    The best cell of each compression and length is bold; a cell with fewer seeds than the most in the table has their
    number in parentheses, and is never the best.
    """
    metric = TASKS[task].metric
    found = group_means([row for row in rows if row["task"] == task], metric, ("method", "target", "epochs"))
    most_seeds = max((len(mean.values) for mean in found.values()), default=0)
    lengths = sorted({epochs for *_, epochs in found}, key=int)
    best: dict[tuple[str, ...], float] = {}
    for (_, *cell), mean in found.items():
        if cell[0] and len(mean.values) == most_seeds:
            best[tuple(cell)] = min(mean.mean, best.get(tuple(cell), mean.mean))
    lines = []
    for target in sorted({target for _, target, _ in found}, key=lambda target: float(target or 0)):
        for method, label in labels.items():
            cells = {epochs: found.get((method, target, epochs)) for epochs in lengths}
            if any(cells.values()):
                formatted = (
                    _format_cell(mean, metric, most_seeds, best.get((target, epochs))) for epochs, mean in cells.items()
                )
                lines.append([label, f"{target}×" if target else "–", *formatted])
    head = [f"{task}: {UNITS[metric]}", "compression", *(f"{epochs} epochs" for epochs in lengths)]
    return markdown_table(head, lines)


def length_picture(rows: list[dict[str, str]], tasks: Iterable[str], labels: Mapping[str, str]) -> Figure:
    """Draw the metric against the length of the run: a panel per task and compression, a line per method."""
    panels = [
        (task, target)
        for task in tasks
        for target in sorted({row["target"] for row in rows if row["task"] == task and row["target"]}, key=float)
    ]
    picture = Figure(figsize=(4.2 * len(panels) + 2.6, 4.2), layout="constrained")
    for axes, (task, target) in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        metric = TASKS[task].metric
        chosen = [row for row in rows if row["task"] == task and row["target"] in (target, "")]
        found = group_means(chosen, metric, ("method", "epochs"))
        _draw_against_length(axes, found, labels)
        _style(axes, f"{task}, {target}×", "epochs", UNITS[metric])
    _add_shared_legend(picture)
    return picture


def _format_cell(mean: Mean | None, metric: str, most_seeds: int, best: float | None) -> str:
    """Return a cell of a table: bold if it has the best mean, or with its number of seeds if that is not the most."""
    text = format_mean(mean, metric)
    if mean and len(mean.values) < most_seeds:
        return f"{text} ({len(mean.values)})"
    return f"**{text}**" if mean and mean.mean == best else text


def finetuning_picture(
    rows: list[dict[str, str]], tasks: Iterable[Task], labels: Mapping[str, str], target: str
) -> Figure:
    """Draw the metric at one sparsity against the steps: a panel per task, a line per method.

    Args:
        rows: those of the benchmark.
        tasks: the panels.
        labels: names of the methods to draw.
        target: the sparsity, as it is written in the rows.
    """
    tasks = list(tasks)
    picture = Figure(figsize=(4.2 * len(tasks) + 2.6, 4.4), layout="constrained")
    for axes, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        found = group_means(
            [row for row in rows if row["task"] == task.name and row["target"] in (target, "")],
            task.metric,
            ("method", "steps"),
        )
        tuned = {key: mean for key, mean in found.items() if key[1] != "0"}
        _draw_against_length(axes, tuned, {**labels, "dense": "not pruned"})
        if ("dense", "0") in found:
            axes.axhline(found["dense", "0"].mean, color="gray", ls=":", label="before the fine-tuning")
        _style(axes, f"{task.name}, {float(target):.0%} sparse", "steps of fine-tuning", UNITS[task.metric])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    _add_shared_legend(picture)
    return picture


def _draw_against_length(axes: Axes, found: Mapping[tuple[str, ...], Mean], labels: Mapping[str, str]) -> None:
    """Draw means by (method, length of the run): a line per method, over a logarithmic axis."""
    for i, (method, label) in enumerate(labels.items()):
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i], "lw": 1.4}
        if method == "autoprune":
            style |= {"color": "black", "lw": 2.4}
        elif method == "dense":
            style = {"color": "gray", "ls": "--"}
        points = sorted((int(length), mean) for (name, length), mean in found.items() if name == method)
        if points:
            means, spreads = [mean.mean for _, mean in points], [mean.spread for _, mean in points]
            axes.errorbar([length for length, _ in points], means, spreads, label=label, ms=5, capsize=2, **style)
    axes.set_xscale("log")
    lengths = sorted({int(length) for _, length in found})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xticks([], minor=True)


def _add_shared_legend(picture: Figure) -> None:
    """Add one legend, to the right, for all lines of all panels."""
    drawn = {name: line for axes in picture.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    picture.legend(drawn.values(), drawn.keys(), loc="outside right center", frameon=False)


README_PANELS = {
    "lenet-300-100": ("LeNet-300-100, MNIST", (1.5, 2, 3, 5, 10)),
    "resnet": ("small ResNet, MNIST", (1, 2, 5, 10, 20, 50)),
    "transformer": ("character transformer", (1.6, 1.8, 2, 2.3, 2.7, 3.1)),
}
"""Title and vertical ticks per task in the README's picture."""

README_LINES = {
    "autoprune": ("AutoPruneCallback, defaults", {"color": "black", "marker": "o", "lw": 2.6, "zorder": 4}),
    "gmp": ("gradual magnitude pruning", {"color": COLORS[2], "marker": "D", "lw": 1.6, "zorder": 3}),
    "lightning": ("Lightning's ModelPruning", {"color": COLORS[3], "marker": "^", "lw": 1.6, "zorder": 3}),
}
"""Label and style per method that has a line of its own in the README's picture."""


def readme_picture(rows: list[dict[str, str]], labels: Mapping[str, str]) -> Figure:
    """Draw the README's picture: AutoPrune and two common methods as lines, the other methods as a band.

    The band reaches from the best to the worst mean among the methods in ``labels`` that have no line.
    """
    picture = Figure(figsize=(10.5, 4.2), layout="constrained")
    band_methods = [method for method in labels if method not in README_LINES and not method.startswith("autoprune")]
    for axes, (task, (title, ticks)) in zip(
        picture.subplots(1, len(README_PANELS)), README_PANELS.items(), strict=True
    ):
        found = means_by_target(rows, task)
        for method, (label, style) in README_LINES.items():
            points = _points(found, method)
            axes.plot([x for x, _ in points], [mean.mean for _, mean in points], label=label, ms=6, **style)
        band = [_points(found, method) for method in band_methods]
        compressions = [float(x) for x in TASKS[task].compressions]
        columns = [[mean.mean for points in band for x, mean in points if x == column] for column in compressions]
        axes.fill_between(
            compressions,
            [min(column, default=float("nan")) for column in columns],
            [max(column, default=float("nan")) for column in columns],
            color="0.87",
            lw=0,
            label=f"{len(band_methods)} other methods, best to worst",
        )
        if ("dense", "") in found:
            axes.axhline(found["dense", ""].mean, color="0.45", ls=":", lw=1.6, label="not pruned")
        _style(axes, title, "compression of the weights", f"test {UNITS[TASKS[task].metric]}")
        _log_scales(axes, task)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.tick_params(labelsize=11)
        axes.title.set_fontsize(13)
        axes.xaxis.label.set_fontsize(11.5)
        axes.yaxis.label.set_fontsize(11.5)
    picture.legend(
        *picture.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=11.5
    )
    return picture


def change_picture(rows: list[dict[str, str]], tasks: Sequence[str], names: Mapping[str, str]) -> Figure:
    """Draw the metric of each change of the default: a panel per task, a dot per seed, a bar at the mean."""
    picture = Figure(figsize=(6.2 * len(tasks), 5.4), layout="constrained")
    for axes, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        metric = TASKS[task].metric
        found = group_means([row for row in rows if row["task"] == task], metric, ("options",))
        named = [(name, found[key,]) for key, name in names.items() if (key,) in found]
        for y, (name, mean) in enumerate(reversed(named)):
            color = "black" if name == "default" else COLORS[0]
            axes.plot(mean.values, [y] * len(mean.values), "o", color=color, alpha=0.4, ms=4)
            axes.plot(mean.mean, y, "|", color=color, ms=16, mew=2.5)
            if name == "default":
                axes.axvline(mean.mean, color="gray", ls=":")
        axes.set_yticks(range(len(named)), [name for name, _ in reversed(named)])
        _style(axes, task, UNITS[metric], "")
    return picture


def sweep_picture(sweeps: Iterable[tuple[str, str, list[tuple[float, Mean]]]], metric: str) -> Figure:
    """Draw the metric as settings are multiplied by factors: a line per setting, bars of one standard deviation.

    Args:
        sweeps: method, option, and the mean at each factor.
        metric: the metric of the means.
    """
    picture = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = picture.subplots()
    for i, (method, option, points) in enumerate(sweeps):
        axes.errorbar(
            [factor for factor, _ in points],
            [mean.mean for _, mean in points],
            [mean.spread for _, mean in points],
            label=f"{method}: {option}",
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i],
            ls="-" if method == "autoprune" else "--",
            capsize=2,
        )
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_formatter("×{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "235" else "")
    _style(axes, "Error at equal compression as settings change", "factor on the setting", UNITS[metric])
    axes.legend(frameon=False)
    return picture


def _points(found: Mapping[tuple[str, ...], Mean], method: str) -> list[tuple[float, Mean]]:
    """Return the means of a method with their compressions, in ascending order."""
    return sorted((float(target), mean) for (name, target), mean in found.items() if name == method and target)


def _log_scales(axes: Axes, task: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    compressions = TASKS[task].compressions
    axes.set_xticks(compressions, [f"{x:g}×" for x in compressions], minor=False)
    axes.set_xticks([], minor=True)


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save_picture(picture: Figure, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)
    print("picture:", path)
