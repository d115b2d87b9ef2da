"""The measured figures of ``settings.md`` and ``large_models.md``, read from ``benchmarks/results`` in each build."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

import ablations
import cost
import robustness
from harness.report import markdown_table
from harness.results import read_rows
from harness.tasks import TASKS

from lightning_autoprune import AutoPruneCallback

UNITS = {"error": "% error", "loss": "nats"}
DIGITS = {"error": 2, "loss": 3}
DEFAULTS = {name: p.default for name, p in signature(AutoPruneCallback).parameters.items()}
SETTINGS = {name: options for name, options in ablations.CHANGES.items() if options.keys() <= DEFAULTS.keys()}

Seeds = dict[int, float]
"""The figure of each seed."""


def substitutions() -> dict[str, str]:
    """Return the text for each name in double braces: tables, their commands, and the figures of each setting."""
    tasks = _ablation_results()
    return {
        **{name: _describe_setting(name, tasks) for name in DEFAULTS},
        "ablations": _ablation_table(tasks, SETTINGS),
        "other_parts": _ablation_table(tasks, {k: v for k, v in ablations.CHANGES.items() if k not in SETTINGS}),
        "ablations_command": _command("ablations.py", _ablation_rows()),
        "sweeps": _sweep_table(),
        "sweeps_command": _command("robustness.py", _sweep_rows()),
        "cost_of_a_weight": _weight_cost_table(),
        "large_models": _large_model_table(),
    }


def format_options(options: Mapping[str, Any]) -> str:
    """Return options as they are written in Python."""
    return ", ".join(f"{name}={json.dumps(v) if isinstance(v, str) else v}" for name, v in options.items())


def _command(script: str, rows: Iterable[Mapping[str, str]]) -> str:
    tasks = " ".join(dict.fromkeys(row["task"] for row in rows))
    seeds = " ".join(sorted({row["seed"] for row in rows}, key=int))
    return f"```\npython benchmarks/{script} --data-dir DIR --tasks {tasks} --seeds {seeds}\n```"


def _ablation_rows() -> list[dict[str, str]]:
    """Return the rows with the length and the target that ``ablations.py`` has by default."""
    return [
        row
        for row in read_rows(ablations.RESULTS)
        if row["epochs"] == str(TASKS[row["task"]].third) and float(row["target"]) == ablations.TARGETS[row["task"]]
    ]


def _ablation_results() -> dict[str, dict[str, Seeds]]:
    """Return the metric by task and options (as JSON), for the tasks whose default has been run."""
    found: dict[str, dict[str, Seeds]] = {}
    for row in _ablation_rows():
        seeds = found.setdefault(row["task"], {}).setdefault(row["options"], {})
        seeds[int(row["seed"])] = float(row[TASKS[row["task"]].metric])
    return {task: options for task, options in found.items() if "{}" in options}


def _mean(values: Iterable[float], digits: int, sign: str = "") -> str:
    values = list(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    mean = round(statistics.mean(values), digits) + 0.0  # never -0
    return f"{mean:{sign}.{digits}f}{spread}"


def _change(task: str, seeds: Seeds, base: Seeds) -> str | None:
    """Return the difference from the default over the seeds that both have; None if they share no seed."""
    both = sorted(seeds.keys() & base.keys())
    return _mean([seeds[s] - base[s] for s in both], DIGITS[TASKS[task].metric], "+") if both else None


def _describe_setting(name: str, tasks: dict[str, dict[str, Seeds]]) -> str:
    """Return what was measured for a setting. A change of several settings belongs to the last of them."""
    parts = []
    if len(sweep := _sweep(name)) > 1:
        figures = [figure for _, figure in sweep]
        parts.append(
            f"{min(figures):.2f} to {max(figures):.2f}% error at `{sweep[0][0]:g}` to `{sweep[-1][0]:g}`"
            f" ({_sweep_task()})"
        )
    for options in ablations.CHANGES.values():
        if list(options)[-1:] == [name] and options.keys() <= DEFAULTS.keys():
            changes = {
                task: _change(task, found.get(json.dumps(options), {}), found["{}"]) for task, found in tasks.items()
            }
            if known := ", ".join(f"{change} ({task})" for task, change in changes.items() if change):
                shown = format_options(options).removeprefix(f"{name}=")
                parts.append(f"`{shown}`: {known}")
    return " <br> ".join(parts) or "not measured"


def _ablation_table(tasks: dict[str, dict[str, Seeds]], changes: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["change"]
    for task, found in tasks.items():
        seeds = ", ".join(map(str, sorted(found["{}"])))
        head.append(f"{task}, {ablations.TARGETS[task]:g}×: {UNITS[TASKS[task].metric]} (default: seeds {seeds})")
    lines = []
    for name, options in {"default": {}, **changes}.items():
        written = f" (`{format_options(options)}`)" if options and options.keys() <= DEFAULTS.keys() else ""
        cells = [_cell(task, found, json.dumps(options)) for task, found in tasks.items()]
        lines.append([name + written, *cells])
    return markdown_table(head, lines)


def _cell(task: str, found: dict[str, Seeds], options: str) -> str:
    seeds, base = found.get(options, {}), found["{}"]
    if not seeds:
        return "–"
    text = _mean(seeds.values(), DIGITS[TASKS[task].metric])
    if options == "{}":
        return text
    number = "" if seeds.keys() == base.keys() else f", seeds {', '.join(map(str, sorted(seeds)))}"
    return f"{text} ({_change(task, seeds, base) or '–'}{number})"


def _sweep_rows() -> list[dict[str, str]]:
    return [row for row in read_rows(robustness.RESULTS) if row["method"] == "autoprune"]


def _sweep_task() -> str:
    row = _sweep_rows()[0]
    return f"{row['task']}, {row['target']}×"


def _sweep(name: str) -> list[tuple[float, float]]:
    """Return the values that a setting was given, in ascending order, and the mean error of each."""
    errors: dict[float, list[float]] = {}
    for row in _sweep_rows():
        options = json.loads(row["options"])
        if list(options) == [name]:
            errors.setdefault(options[name], []).append(float(row["error"]))
    return [(value, statistics.mean(errors[value])) for value in sorted(errors)]


def _sweep_table() -> str:
    """Return the error of each setting along its sweep, with the default in bold."""
    lines = []
    for name in DEFAULTS:
        if sweep := _sweep(name):
            shown = [f"**{figure:.2f}**" if value == DEFAULTS[name] else f"{figure:.2f}" for value, figure in sweep]
            values = " ".join(f"{value:g}" for value, _ in sweep)
            lines.append([f"`{name}`", values, " ".join(shown)])
    return markdown_table([_sweep_task(), "values", "error, %"], lines)


BFLOAT16 = {"pruning": 10, "held-out gradients": 2, "state": 10}
"""Bytes per bfloat16 weight, as in the table in ``large_models.md``."""


def _nanoseconds_per_weight() -> dict[str, float]:
    """Return the time per weight and step of dense training, and what each mode adds, for the largest network."""
    row = max(read_rows(cost.RESULTS), key=lambda row: (int(row["weights"]), row["date"]))
    dense = float(row["step_ms"]) * 1e6 / int(row["weights"])
    return {"weights": int(row["weights"]), "dense": dense} | {
        mode: dense * (float(row[f"{mode}_time"]) - 1) for mode in cost.OTHERS
    }


def _weight_cost_table() -> str:
    found = _nanoseconds_per_weight()
    head = ["nanoseconds per weight and step", f"of {found['weights'] / 1e6:.0f} million weights"]
    modes = {
        "dense": "dense training, a batch of 128",
        "frozen": "added by final masks",
        "pruning": "added by pruning at the defaults, with the held-out pass",
        "train": 'added by pruning with `held_out="train"`',
        "ModelPruning": "added by Lightning's ModelPruning",
    }
    return markdown_table(
        head, [[text, f"{found[mode]:{'' if mode == 'dense' else '+'}.1f}"] for mode, text in modes.items()]
    )


def _large_model_table() -> str:
    head = ["", "1B weights, 8 ranks", "70B weights, 64 ranks"]
    sizes, nanoseconds = ((1e9, 8), (70e9, 64)), _nanoseconds_per_weight()["train"]

    def gigabytes(text: str, count_bytes: Callable[[float, int], float]) -> list[str]:
        return [text, *(f"{count_bytes(weights, ranks) / 1e9:.3g} GB" for weights, ranks in sizes)]

    lines = [
        gigabytes("memory per rank while pruning", lambda p, n: BFLOAT16["pruning"] * p / n),
        gigabytes(
            "memory per rank for the held-out gradients, in addition",
            lambda p, n: BFLOAT16["held-out gradients"] * p / n,
        ),
        gigabytes("memory per rank with final masks", lambda p, n: p / n / 8),
        gigabytes("pruning state in a checkpoint", lambda p, n: BFLOAT16["state"] * p),
        gigabytes("communication per held-out pass (default)", lambda p, n: 6 * p * (n - 1) / n),
        ["time of an auxiliary step on one core", *(f"{nanoseconds * p / n / 1e9:.3g} s" for p, n in sizes)],
    ]
    return markdown_table(head, lines)
