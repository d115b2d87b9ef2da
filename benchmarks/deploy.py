"""What a pruned model weighs on disk and how fast it runs: dense, masked, shrunk, torch CSR and onnxruntime.

Each network is trained and pruned for a few epochs (neither size nor speed depends on how well it learns), by weights
or by neurons. Latencies are measured in turns, one thread, and given / that of the dense network:

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
from accuracy import arguments
from harness.latency import side_by_side
from harness.methods import METHODS
from harness.report import markdown
from harness.results import Run, missing, read, write_row
from harness.shrunk import shrunk
from harness.tasks import TASKS
from harness.training import quiet, trained
from torch import Tensor, nn

from lightning_autoprune import export_onnx, model_cost, prunable_weights, save_sparse

RESULTS = Path(__file__).parent / "results" / "deploy.csv"
# task, options, epochs
CASES: tuple[tuple[str, float | None, dict[str, Any], int], ...] = (
    ("lenet-300-100", 80.0, {}, 3),
    ("lenet-5", 310.0, {}, 3),
    ("lenet-5", None, {"granularity": "neuron", "target_flops": 0.07}, 3),
    ("resnet", 30.0, {}, 2),
    ("resnet", None, {"granularity": "neuron", "target_flops": 0.25}, 2),
    ("transformer", 30.0, {}, 3),
    ("tabular", 30.0, {}, 60),
)


class CSRLinear(nn.Module):
    """A linear layer whose weight is a sparse matrix."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.detach().to_sparse_csr(), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def as_csr(network: nn.Module) -> nn.Module:
    """A copy with all linear layers sparse; convolutions have no sparse kernel in torch."""
    network = copy.deepcopy(network)
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            parent = network.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], CSRLinear(module))
    return network


def in_onnxruntime(network: nn.Module, inputs: Tensor, path: str) -> Callable[[Tensor], Any]:
    """The network, shrunk, as a function of a tensor."""
    import onnxruntime

    export_onnx(network, path, inputs[:1], tolerance=1e-3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def sizes(network: nn.Module, small: nn.Module, path: str) -> dict[str, float]:
    """Bytes of the files of a masked network, and what its zeros take if all places are alike."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    dense = buffer.getvalue()
    found: dict[str, float] = {
        "dense": len(dense),
        "gzip": len(gzip.compress(dense, 9)),
        "zstd_19": len(zstandard.ZstdCompressor(19).compress(dense)),
    }
    for name, model in (("sparse", network), ("sparse_shrunk", small)):
        save_sparse(model, path)
        found[name] = os.path.getsize(path)
    bits = 0.0
    for tensor in network.state_dict().values():
        n, k = tensor.numel(), int(tensor.count_nonzero())
        bits += 8 * tensor.element_size() * k + _log2_choose(n, k)
    return {**found, "entropy": round(bits / 8)}


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def figures(run: Run, options: dict[str, Any], data: Path) -> dict[str, Any]:
    """Trains one network and measures it."""
    task = TASKS[run.task]
    compression = run.target if run.method == "weight" else None
    result = trained(task, METHODS["autoprune"](compression, run.seed, **options), run.seed, data, run.epochs)
    masked, rows = result.network.eval(), result.test[0]
    dense, small, left = shrunk(task, masked, rows)
    cost = model_cost(masked, rows[:1])
    kept = sum(int(w.count_nonzero()) for w in prunable_weights(masked).values())
    total = sum(w.numel() for w in prunable_weights(masked).values())
    found: dict[str, Any] = {
        "compression": round(total / kept, 1),
        "effective_flops": round(cost.effective_flops / cost.flops, 5),
        **left,
    }
    with tempfile.TemporaryDirectory() as folder:
        found |= {f"bytes_{name}": size for name, size in sizes(masked, small, f"{folder}/a").items()}
        models = {"dense": dense, "masked": masked, "shrunk": small, "csr": as_csr(masked)}
        models["onnxruntime"] = in_onnxruntime(masked, rows, f"{folder}/a.onnx")
        for batch in (1, 64):
            ratios = side_by_side(models, rows[:batch].contiguous())
            found |= {f"latency_{batch}_{name}": round(ratio, 3) for name, ratio in ratios.items() if name != "dense"}
    return found


def main() -> None:
    parser = arguments(__doc__, RESULTS)
    args = parser.parse_args()
    quiet()
    for task, compression, options, epochs in CASES:
        granularity = options.get("granularity", "weight")
        run = Run(task, granularity, compression or options["target_flops"], args.epochs or epochs, 0)
        if task in args.tasks and missing(args.results, [run]):
            write_row(args.results, {**run.key(), **figures(run, options, args.data_dir)})
            print(*run.key().values(), flush=True)
    rows = [row for row in read(args.results) if row["task"] in args.tasks]
    names = [
        f"{row['task']}, {float(row['target']):g}×"
        if row["method"] == "weight"
        else f"{row['task']}, neurons to {float(row['target']):.0%} of the FLOPs"
        for row in rows
    ]
    kinds = ("gzip", "zstd_19", "sparse", "sparse_shrunk", "entropy")
    lines = [
        [name, f"{int(row['bytes_dense']) / 1024:.0f} KiB"]
        + [f"{int(row['bytes_dense']) / int(row[f'bytes_{kind}']):.1f}×" for kind in kinds]
        for name, row in zip(names, rows, strict=True)
    ]
    print(
        markdown(["file, times smaller", "dense", "gzip -9", "zstd -19", "sparse", "sparse, shrunk", "entropy"], lines)
    )
    ways = ("masked", "shrunk", "csr", "onnxruntime")
    lines = [
        [name, f"{float(row['parameters']):.1%}", f"{float(row['effective_flops']):.1%}", f"{float(row['flops']):.1%}"]
        + [f"{float(row[f'latency_1_{way}']):.2f} / {float(row[f'latency_64_{way}']):.2f}" for way in ways]
        for name, row in zip(names, rows, strict=True)
    ]
    heads = ["latency / dense, batch 1 / 64", "parameters, shrunk", "FLOPs, non-zero", "FLOPs, shrunk", *ways]
    print("\n" + markdown(heads, lines))


if __name__ == "__main__":
    main()
