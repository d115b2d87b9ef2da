"""Neuron pruning of LeNet-5 to a share of its operations: error, operations, parameters and latency of what is left.

The network is shrunk after training; its error is that of the shrunk one. Rows go to ``results/neurons.csv``:

    python benchmarks/neurons.py --data-dir DIR --flops 0.07 0.04 --seeds 0 1 2
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from accuracy import arguments
from harness.latency import side_by_side
from harness.methods import METHODS
from harness.report import cell, markdown
from harness.results import Run, means, missing, read, write_row
from harness.tasks import TASKS
from harness.training import evaluate, trained

from lightning_autoprune import model_cost, shrink

RESULTS = Path(__file__).parent / "results" / "neurons.csv"
FIGURES = ("error", "flops", "parameters", "latency_1", "latency_64")


def figures(run: Run, data_dir: Path) -> dict[str, float]:
    """Trains and shrinks one network, and measures it against the dense one."""
    task = TASKS[run.task]
    options = {} if run.target is None else {"granularity": "neuron", "target_flops": run.target}
    method = METHODS["autoprune"](None, run.seed, **options) if options else METHODS["dense"](None, run.seed)
    result = trained(task, method, run.seed, data_dir, run.epochs)
    rows = result.test[0]
    dense = task.network().to(memory_format=torch.channels_last).eval()  # as it is trained
    small = shrink(result.network, rows[:1]).eval()
    whole, left = model_cost(dense, rows[:1]), model_cost(small, rows[:1])
    latency = {n: side_by_side({"dense": dense, "shrunk": small}, rows[:n])["shrunk"] for n in (1, 64)}
    return {
        "error": round(evaluate(small, result.test)[0], 3),
        "flops": round(left.flops / whole.flops, 5),
        "parameters": round(left.parameters / whole.parameters, 5),
        **{f"latency_{n}": round(ratio, 3) for n, ratio in latency.items()},
        "seconds": result.seconds,
    }


def main() -> None:
    parser = arguments(__doc__, RESULTS)
    parser.set_defaults(tasks=["lenet-5"])
    parser.add_argument("--flops", type=float, nargs="+", default=[0.07, 0.04], help="shares of the dense operations")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for seed in args.seeds:
        for task in args.tasks:
            for target in (None, *args.flops):
                run = Run(
                    task, "dense" if target is None else "neuron", target, args.epochs or TASKS[task].epochs, seed
                )
                if missing(args.results, [run]):
                    found = figures(run, args.data_dir)
                    write_row(args.results, run, found)
                    print(*run.key().values(), "→", found, flush=True)
    rows = read(args.results)
    for task in args.tasks:
        found = {f: means([r for r in rows if r["task"] == task], f, ("target", "epochs")) for f in FIGURES}
        lines = [
            [target or "dense", epochs, *(cell(found[f][target, epochs], "loss") for f in FIGURES)]
            for target, epochs in found["error"]
        ]
        print(markdown([f"{task}: operations asked for", "epochs", "error, %", *FIGURES[1:]], lines))


if __name__ == "__main__":
    main()
