"""Prune the neurons of LeNet-5 to a fraction of its operations, and measure the shrunk network.

Reported are error, operations, parameters and latency of the network after ``shrink``. Rows go to
``results/neurons.csv``; those of the dense network, trained in the same way, are in ``results/accuracy.csv``:

    python benchmarks/neurons.py --data-dir DIR --flops 0.07 0.04 --seeds 0 1 2
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from accuracy import add_hardware_arguments, chosen_hardware, make_parser
from harness.latency import relative_latencies
from harness.methods import METHODS
from harness.report import format_mean, markdown_table
from harness.results import Mean, Run, append_row, group_means, missing_runs, read_rows
from harness.shrinking import shrink_and_compare
from harness.tasks import TASKS
from harness.training import Hardware, evaluate, silence, train_network

RESULTS = Path(__file__).parent / "results" / "neurons.csv"
LAYOUTS = {"": torch.channels_last, "_contiguous": torch.contiguous_format}
"""Memory layouts by the suffix of their columns: the faster one for the dense network, and the usual one."""


def measure(run: Run, data_dir: Path, hardware: Hardware) -> dict[str, float]:
    """Train and shrink one network, and measure it against the dense one."""
    task = TASKS[run.task]
    method = METHODS["autoprune"](None, run.seed, granularity="neuron", target_flops=run.target)
    trained = train_network(task, method, run.seed, data_dir, run.epochs, hardware=hardware)
    inputs = trained.data.first_inputs(64)
    shrunk = shrink_and_compare(task, trained.network, inputs)
    latencies = {}
    for suffix, layout in LAYOUTS.items():
        models = {
            "dense": copy.deepcopy(shrunk.dense).to(memory_format=layout),
            "small": copy.deepcopy(shrunk.small).to(memory_format=layout),
        }
        for batch in (1, 64):
            ratios = relative_latencies(models, inputs[:batch])
            latencies[f"latency_{batch}{suffix}"] = round(ratios["small"], 3)
    error, _ = evaluate(shrunk.small, trained.data.test_batches(hardware.workers), trained.device)
    return {
        "error": round(error, 3),
        "flops": shrunk.flops,
        "parameters": shrunk.parameters,
        **latencies,
        "seconds": trained.seconds,
    }


def result_table(rows: list[dict[str, str]], task: str) -> str:
    """Return a table with a line per target and number of epochs, means over the seeds."""
    rows = [row for row in rows if row["task"] == task]
    columns = ("error", "flops", "parameters", *(f"latency_{batch}{s}" for batch in (1, 64) for s in LAYOUTS))
    found = {column: group_means(rows, column, ("target", "epochs")) for column in columns}

    def percent(mean: Mean) -> str:
        return f"{mean.mean:.1%}"

    def both_layouts(key: tuple[str, ...], batch: int) -> str:
        means = (found[f"latency_{batch}{suffix}"].get(key) for suffix in LAYOUTS)
        return " / ".join(f"{mean.mean:.2f}" if mean else "–" for mean in means)

    lines = [
        [
            f"{float(target):.0%}",
            epochs,
            str(len(error.values)),
            format_mean(error, "error"),
            percent(found["flops"][target, epochs]),
            percent(found["parameters"][target, epochs]),
            both_layouts((target, epochs), 1),
            both_layouts((target, epochs), 64),
        ]
        for (target, epochs), error in found["error"].items()
    ]
    heads = [f"{task}: FLOPs to keep", "epochs", "seeds", "error, %", "FLOPs", "parameters"]
    heads += [f"latency, batch {batch}: channels-last / contiguous" for batch in (1, 64)]
    return markdown_table(heads, lines)


def main() -> None:
    parser = make_parser(__doc__, RESULTS, tasks=TASKS)
    add_hardware_arguments(parser)
    parser.set_defaults(tasks=["lenet-5"])
    parser.add_argument("--flops", type=float, nargs="+", default=[0.07, 0.04], help="fractions of the operations")
    args = parser.parse_args()
    silence()
    for seed in args.seeds:
        for task in args.tasks:
            for target in args.flops:
                run = Run(task, "neuron", target, args.epochs or TASKS[task].epochs, seed)
                if missing_runs(args.results, [run]):
                    figures = measure(run, args.data_dir, chosen_hardware(args))
                    append_row(args.results, {**run.cells(), **figures})
                    print(*run.cells().values(), "→", figures, flush=True)
    for task in args.tasks:
        print(result_table(read_rows(args.results), task))


if __name__ == "__main__":
    main()
