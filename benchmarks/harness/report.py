"""Tables and pictures from the rows of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_autoprune.plots import COLORS

from .results import Mean, means
from .tasks import TASKS

UNITS = {"error": "error, %", "loss": "loss, nats"}
MARKERS = "osD^vPX<>*h"


def cell(mean: Mean | None, figure: str) -> str:
    """Mean ± spread for a table, the value alone of one seed; a dash where there was no run."""
    if mean is None:
        return "–"
    digits = 2 if figure == "error" else 3
    spread = f" ± {mean.spread:.{digits}f}" if len(mean.values) > 1 else ""  # of one seed there is none
    return f"{mean.mean:.{digits}f}{spread}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def full_runs(rows: list[dict[str, str]], task: str) -> list[dict[str, str]]:
    """The rows of a task that had its whole budget."""
    return [row for row in rows if row["task"] == task and row["epochs"] == str(TASKS[task].epochs)]


def by_target(rows: list[dict[str, str]], task: str) -> dict[tuple[str, ...], Mean]:
    """The figure that ranks, by method and target, over the runs of the task's whole budget."""
    return means(full_runs(rows, task), TASKS[task].metric, ("method", "target"))


def compression_table(rows: list[dict[str, str]], task: str, labels: Mapping[str, str]) -> str:
    """Methods down, compressions across; the best of a column is bold.

    In brackets: the number of seeds where it is less than the most in the table; such a cell is never the best.
    """
    figure, runs = TASKS[task].metric, by_target(rows, task)
    found = {key: mean for key, mean in runs.items() if key[0] in labels}
    columns = sorted({column for _, column in found if column}, key=float)
    most = max((len(mean.values) for mean in found.values()), default=0)
    whole = {key: mean.mean for key, mean in found.items() if len(mean.values) == most}
    best = {column: min((m for (_, where), m in whole.items() if where == column), default=None) for column in columns}

    def written(mean: Mean | None, column: str) -> str:
        text = cell(mean, figure)
        if mean and len(mean.values) < most:
            return f"{text} ({len(mean.values)})"
        return f"**{text}**" if mean and mean.mean == best[column] else text

    lines = []
    for method, label in labels.items():
        cells = [found.get((method, column)) for column in columns]
        if any(cells):
            lines.append([label, *map(written, cells, columns)])
    head = f"{task}: {UNITS[figure]} (dense {cell(runs.get(('dense', '')), figure)})"
    return markdown([head, *(f"{column}×" for column in columns)], lines)


def no_target_table(rows: list[dict[str, str]], method: str = "autoprune") -> str:
    """A line for each task where the method ran without a target: what it reached beside dense, of the same seeds."""
    lines = []
    for name, task in TASKS.items():
        full = full_runs(rows, name)
        if ran := [row for row in full if (row["method"], row["target"]) == (method, "")]:
            seeds = {row["seed"] for row in ran}
            dense = [row for row in full if row["method"] == "dense" and row["seed"] in seeds]
            figures = (cell(means(part, task.metric, ()).get(()), task.metric) for part in (dense, ran))
            compression = means(ran, "compression", ())[()].mean
            lines.append([f"{name}: {UNITS[task.metric]}", *figures, f"{compression:.1f}×", str(len(ran))])
    return markdown(["no target", "dense", "pruned", "compression", "seeds"], lines)


def compression_picture(rows: list[dict[str, str]], tasks: Iterable[str], labels: Mapping[str, str]) -> Figure:
    """One panel a task: the figure that ranks against compression, a line a method, bars of one standard deviation."""
    tasks = list(tasks)
    picture = Figure(figsize=(4.6 * len(tasks), 4.4), layout="constrained")
    for axes, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        figure, found = TASKS[task].metric, by_target(rows, task)
        for i, (method, label) in enumerate(labels.items()):
            points = sorted((float(c), mean) for (name, c), mean in found.items() if name == method and c)
            if points:
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
        _style(axes, task, "compression of the prunable weights", UNITS[figure])
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = TASKS[task].compressions
        axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    drawn = {name: line for axes in picture.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    picture.legend(drawn.values(), drawn.keys(), loc="outside right center", frameon=False)
    return picture


def change_picture(rows: list[dict[str, str]], tasks: Sequence[str], names: Mapping[str, str]) -> Figure:
    """One panel a task: the figure that ranks for each change of the default, with each seed as a dot."""
    picture = Figure(figsize=(6.2 * len(tasks), 5.4), layout="constrained")
    for axes, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        figure = TASKS[task].metric
        found = means([row for row in rows if row["task"] == task], figure, ("options",))
        named = [(name, found[key,]) for key, name in names.items() if (key,) in found]
        for y, (name, mean) in enumerate(reversed(named)):
            color = "black" if name == "default" else COLORS[0]
            axes.plot(mean.values, [y] * len(mean.values), "o", color=color, alpha=0.4, ms=4)
            axes.plot(mean.mean, y, "|", color=color, ms=16, mew=2.5)
            if name == "default":
                axes.axvline(mean.mean, color="gray", ls=":")
        axes.set_yticks(range(len(named)), [name for name, _ in reversed(named)])
        _style(axes, task, UNITS[figure], "")
    return picture


def sweep_picture(sweeps: Iterable[tuple[str, str, list[tuple[float, Mean]]]], figure: str) -> Figure:
    """The figure that ranks as each setting (of a method) is multiplied by factors, bars of one standard deviation."""
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
    _style(axes, "Error at equal compression as settings change", "factor on the setting", UNITS[figure])
    axes.legend(frameon=False)
    return picture


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(picture: Figure, path: Path) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)
    print("picture:", path)
