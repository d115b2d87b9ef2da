"""Measure the size and the speed of pruned models: dense, masked, shrunk, torch CSR and onnxruntime.

Each network is trained for a few epochs and pruned by weights or by neurons; neither size nor speed depends on how well
it has learned. Latencies are ratios to the dense network's; all models take turns on one thread:

    python benchmarks/deploy.py --data-dir DIR
"""

from __future__ import annotations

import copy
import gzip
import io
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zstandard
from accuracy import make_parser
from harness.latency import relative_latencies
from harness.methods import METHODS
from harness.report import markdown_table
from harness.results import Run, append_row, missing_runs, read_rows
from harness.shrinking import shrink_and_compare
from harness.tasks import TASKS
from harness.training import silence, train_network
from torch import Tensor, nn

from lightning_autoprune import export_onnx, model_cost, prunable_weights, save_sparse

RESULTS = Path(__file__).parent / "results" / "deploy.csv"
CASES: tuple[tuple[str, float | None, dict[str, Any], int], ...] = (
    ("lenet-300-100", 80.0, {}, 3),
    ("lenet-5", 310.0, {}, 3),
    ("lenet-5", None, {"granularity": "neuron", "target_flops": 0.07}, 3),
    ("resnet", 30.0, {}, 2),
    ("resnet", None, {"granularity": "neuron", "target_flops": 0.25}, 2),
    ("transformer", 30.0, {}, 3),
    ("tabular", 30.0, {}, 60),
)
"""Task, compression, options and epochs."""

SIZES = {
    "gzip": "gzip -9",
    "zstd_19": "zstd -19",
    "sparse": "`save_sparse`",
    "sparse_shrunk": "shrunk, `save_sparse`",
    "entropy": "entropy",
}
"""Files by the name in their column, as the table calls them."""

MODELS = {"masked": "masked", "shrunk": "shrunk", "csr": "torch CSR", "onnxruntime": "onnxruntime, shrunk"}
"""Models by the name in their columns, as the table calls them."""


class CSRLinear(nn.Module):
    """A linear layer with a sparse matrix as its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.detach().to_sparse_csr(), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def as_csr(network: nn.Module) -> nn.Module:
    """Return a copy with sparse linear layers; torch has no sparse kernel for convolutions."""
    network = copy.deepcopy(network)
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            parent = network.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], CSRLinear(module))
    return network


def in_onnxruntime(network: nn.Module, inputs: Tensor, path: str) -> Callable[[Tensor], Any]:
    """Return a function that runs the shrunk network on a tensor in onnxruntime."""
    import onnxruntime

    export_onnx(network, path, inputs[:1], tolerance=1e-3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def file_sizes(network: nn.Module, small: nn.Module, path: str) -> dict[str, float]:
    """Return the sizes in bytes of a masked network's files, and their entropy if any position may be zero."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    dense = buffer.getvalue()
    sizes: dict[str, float] = {
        "dense": len(dense),
        "gzip": len(gzip.compress(dense, 9)),
        "zstd_19": len(zstandard.ZstdCompressor(19).compress(dense)),
    }
    for name, model in (("sparse", network), ("sparse_shrunk", small)):
        save_sparse(model, path)
        sizes[name] = os.path.getsize(path)
    bits = 0.0
    for tensor in network.state_dict().values():
        n, k = tensor.numel(), int(tensor.count_nonzero())
        bits += 8 * tensor.element_size() * k + _log2_choose(n, k)
    return {**sizes, "entropy": round(bits / 8)}


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def measure(run: Run, options: dict[str, Any], data: Path) -> dict[str, Any]:
    """Train one network and measure it."""
    task = TASKS[run.task]
    compression = run.target if run.method == "weight" else None
    method = METHODS["autoprune"](compression, run.seed, **options)
    trained = train_network(task, method, run.seed, data, run.epochs)
    masked, inputs = trained.network.eval(), trained.data.test[0]
    shrunk = shrink_and_compare(task, masked, inputs)
    cost = model_cost(masked, inputs[:1])
    kept = sum(int(w.count_nonzero()) for w in prunable_weights(masked).values())
    total = sum(w.numel() for w in prunable_weights(masked).values())
    figures: dict[str, Any] = {
        "compression": round(total / kept, 1),
        "effective_flops": round(cost.effective_flops / cost.flops, 5),
        "flops": shrunk.flops,
        "parameters": shrunk.parameters,
    }
    with tempfile.TemporaryDirectory() as folder:
        figures |= {f"bytes_{name}": size for name, size in file_sizes(masked, shrunk.small, f"{folder}/a").items()}
        models = {"dense": shrunk.dense, "masked": masked, "shrunk": shrunk.small, "csr": as_csr(masked)}
        models["onnxruntime"] = in_onnxruntime(masked, inputs, f"{folder}/a.onnx")
        for batch in (1, 64):
            ratios = relative_latencies(models, inputs[:batch].contiguous())
            figures |= {f"latency_{batch}_{name}": round(ratio, 3) for name, ratio in ratios.items() if name != "dense"}
    return figures


def case_name(row: dict[str, str]) -> str:
    target = float(row["target"])
    return f"{row['task']}, " + (
        f"{target:g}×" if row["method"] == "weight" else f"neurons to {target:.0%} of the FLOPs"
    )


def size_table(rows: list[dict[str, str]]) -> str:
    """Return a table of how many times smaller than the dense file each file is."""
    lines = []
    for row in rows:
        dense = int(row["bytes_dense"])
        ratios = [f"{dense / int(row[f'bytes_{name}']):.1f}×" for name in SIZES]
        lines.append([case_name(row), f"{dense / 1024:.0f} KiB", *ratios])
    return markdown_table(["file, times smaller", "dense", *SIZES.values()], lines)


def latency_table(rows: list[dict[str, str]]) -> str:
    """Return a table of latencies as ratios to the dense network's, with the operations and parameters that remain."""
    lines = []
    for row in rows:
        ratios = [f"{float(row[f'latency_1_{name}']):.2f} / {float(row[f'latency_64_{name}']):.2f}" for name in MODELS]
        costs = [f"{float(row[column]):.1%}" for column in ("parameters", "effective_flops", "flops")]
        lines.append([case_name(row), *costs, *ratios])
    costs = ["parameters, shrunk", "FLOPs, nonzero", "FLOPs, shrunk"]
    return markdown_table(["latency / dense, batch 1 / 64", *costs, *MODELS.values()], lines)


def main() -> None:
    parser = make_parser(__doc__, RESULTS)
    args = parser.parse_args()
    silence()
    for task, compression, options, epochs in CASES:
        granularity = options.get("granularity", "weight")
        run = Run(task, granularity, compression or options["target_flops"], args.epochs or epochs, 0)
        if task in args.tasks and missing_runs(args.results, [run]):
            append_row(args.results, {**run.cells(), **measure(run, options, args.data_dir)})
            print(*run.cells().values(), flush=True)
    rows = [row for row in read_rows(args.results) if row["task"] in args.tasks]
    print(size_table(rows))
    print("\n" + latency_table(rows))


if __name__ == "__main__":
    main()
