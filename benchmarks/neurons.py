"""Neuron pruning of LeNet-5 to a share of its operations: error, operations, parameters and latency of what is left.

The network is shrunk after training; its error is that of the shrunk one. Rows go to ``results/neurons.csv``; those of
the dense network, trained alike, are ``accuracy.py``'s:

    python benchmarks/neurons.py --data-dir DIR --flops 0.07 0.04 --seeds 0 1 2
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from accuracy import arguments
from harness.latency import side_by_side
from harness.methods import METHODS
from harness.report import cell, markdown
from harness.results import Run, means, missing, read, write_row
from harness.shrunk import shrunk
from harness.tasks import TASKS
from harness.training import evaluate, quiet, trained

RESULTS = Path(__file__).parent / "results" / "neurons.csv"
FIGURES = ("error", "flops", "parameters", "latency_1", "latency_64", "latency_1_contiguous", "latency_64_contiguous")


def figures(run: Run, data_dir: Path) -> dict[str, float]:
    """Trains and shrinks one network, and measures it against the dense one."""
    task = TASKS[run.task]
    method = METHODS["autoprune"](None, run.seed, granularity="neuron", target_flops=run.target)
    result = trained(task, method, run.seed, data_dir, run.epochs)
    rows = result.test[0]
    dense, small, left = shrunk(task, result.network, rows)
    found = {}
    for layout in (torch.channels_last, torch.contiguous_format):  # the fastest for the dense network; the usual one
        models = {name: copy.deepcopy(m).to(memory_format=layout) for name, m in (("dense", dense), ("shrunk", small))}
        for batch in (1, 64):
            name = f"latency_{batch}" + ("_contiguous" if layout is torch.contiguous_format else "")
            found[name] = round(side_by_side(models, rows[:batch])["shrunk"], 3)
    return {
        "error": round(evaluate(small, result.test)[0], 3),
        **left,
        **found,
        "seconds": result.seconds,
    }


def main() -> None:
    parser = arguments(__doc__, RESULTS)
    parser.set_defaults(tasks=["lenet-5"])
    parser.add_argument("--flops", type=float, nargs="+", default=[0.07, 0.04], help="shares of the dense operations")
    args = parser.parse_args()
    quiet()
    for seed in args.seeds:
        for task in args.tasks:
            for target in args.flops:
                run = Run(task, "neuron", target, args.epochs or TASKS[task].epochs, seed)
                if missing(args.results, [run]):
                    found = figures(run, args.data_dir)
                    write_row(args.results, {**run.key(), **found})
                    print(*run.key().values(), "→", found, flush=True)
    rows = read(args.results)
    for task in args.tasks:
        found = {f: means([r for r in rows if r["task"] == task], f, ("target", "epochs")) for f in FIGURES}
        lines = [
            [target, epochs, *(cell(found[f].get((target, epochs)), "loss") for f in FIGURES)]
            for target, epochs in found["error"]
        ]
        print(markdown([f"{task}: operations asked for", "epochs", "error, %", *FIGURES[1:]], lines))


if __name__ == "__main__":
    main()
