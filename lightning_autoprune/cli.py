"""The command ``lightning-autoprune``: run a demo, report on checkpoints, compare them, export them."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_autoprune import __version__
from lightning_autoprune.argument_types import parse_positive_int
from lightning_autoprune.demo import run as demo
from lightning_autoprune.demo.data import DataError
from lightning_autoprune.deploy.atomic_write import atomic_write
from lightning_autoprune.deploy.onnx_export import export_onnx
from lightning_autoprune.deploy.sparse_file import save_sparse
from lightning_autoprune.deploy.torch_export import export_program
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.reporting.checkpoint_reader import SavedModel, read_checkpoint
from lightning_autoprune.reporting.html_report import render_html_report
from lightning_autoprune.reporting.layer_table import align_columns, format_layer_table, sum_layers
from lightning_autoprune.reporting.mask_comparison import compare_masks, format_comparison_table
from lightning_autoprune.training.lightning_package import LightningModule, both

__all__ = ["main"]

_EXAMPLES = {
    "demo": ("demo --data digits", "demo --data mnist --data-dir data/mnist --target 0.95"),
    "report": ("report pruned.ckpt", "report pruned.ckpt --html report.html", "report pruned.ckpt --json"),
    "compare": ("compare early.ckpt pruned.ckpt",),
    "export": (
        "export pruned.ckpt --sparse pruned.safetensors",
        "export pruned.ckpt --model my_project.models:Net --onnx net.onnx --shrunk net.pt2",
        "export pruned.ckpt --model my_project.models:make_net --input-shape 1 1 28 28 --onnx net.onnx",
    ),
}
_NOTES = """
exit codes: 0 success; 1 a file or an option value that can't be used; 2 unknown or invalid arguments.
Files are loaded with weights_only=True: nothing in them is executed. --model imports your own code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _build_parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe before the output ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more when it exits
        return 141
    except (AutoPruneError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-autoprune",
        description="Show what AutoPruneCallback pruned, and export it as small files.",
        epilog=_format_examples(*_EXAMPLES) + "\n" + _NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lightning-autoprune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_format_examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    demo.add_arguments(add_command("demo", demo.run_demo, "train LeNet-300-100 dense and pruned, and show the result"))

    report = add_command("report", _report, "show how much of each layer a checkpoint keeps")
    report.add_argument("checkpoint", type=Path, help="a Lightning checkpoint, a file of torch.save, or safetensors")
    report.add_argument("--html", type=Path, metavar="FILE", help="also write a page with pictures; it works offline")
    report.add_argument("--json", action="store_true", help="print all figures as JSON instead of the table")

    compare = add_command(
        "compare", _compare, "show which weights both checkpoints keep, and which were pruned or came back"
    )
    compare.add_argument("first", type=Path, metavar="A", help="the earlier checkpoint")
    compare.add_argument("second", type=Path, metavar="B", help="the later checkpoint, with the same layers")
    compare.add_argument("--json", action="store_true", help="print all figures as JSON instead of the table")

    export = add_command("export", _export, "write a checkpoint as a sparse file, an ONNX file, or a shrunk program")
    export.add_argument(
        "checkpoint", type=Path, help="as for `report`; a Lightning checkpoint if --model takes arguments"
    )
    export.add_argument("--sparse", type=Path, metavar="FILE", help="safetensors file without zeros; needs no model")
    export.add_argument("--onnx", type=Path, metavar="FILE", help="shrunk model for onnxruntime; needs --model")
    export.add_argument("--shrunk", type=Path, metavar="FILE", help="shrunk model for torch.export.load; needs --model")
    export.add_argument(
        "--model", metavar="MODULE:NAME", help="a LightningModule, or a function without arguments that makes a module"
    )
    export.add_argument(
        "--input-shape",
        type=parse_positive_int,
        nargs="+",
        metavar="N",
        help="shape of an input, batch size first; default: the module's example_input_array",
    )
    return parser


def _format_examples(*commands: str) -> str:
    lines = [f"  lightning-autoprune {line}" for command in commands for line in _EXAMPLES[command]]
    return "\n".join(["examples:", *lines])


def _report(args: argparse.Namespace) -> int:
    saved = _read_with_progress(args.checkpoint)
    if args.html:
        page = render_html_report(saved)
        with atomic_write(args.html) as temporary:
            temporary.write_text(page, encoding="utf-8")
        _print_progress(f"wrote {args.html}")
    if args.json:
        print(json.dumps(saved.as_dict(), indent=2))
        return 0
    rows = saved.layers()
    print(f"{saved.path}: {saved.describe()}\n")
    print(align_columns(*format_layer_table([*rows, sum_layers(rows)])))
    return 0


def _compare(args: argparse.Namespace) -> int:
    first, second = _read_with_progress(args.first), _read_with_progress(args.second)
    rows = compare_masks(first.weights, second.weights)
    shared = {row.name for row in rows[:-1]}  # the last row is their sum
    not_shared = sorted((first.weights.keys() | second.weights.keys()) - shared)
    if args.json:
        files = {"A": str(args.first), "B": str(args.second)}
        print(json.dumps({**files, "layers": [row.as_dict() for row in rows], "not_in_both": not_shared}, indent=2))
        return 0
    print(f"A: {args.first}: {first.describe()}\nB: {args.second}: {second.describe()}\n")
    print(align_columns(*format_comparison_table(rows)))
    if not_shared:
        print(f"\nnot in both, or with another shape: {', '.join(not_shared)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    if not (args.sparse or args.onnx or args.shrunk):
        raise AutoPruneError("Nothing to write: give `--sparse`, `--onnx` or `--shrunk`.")
    if (args.onnx or args.shrunk) and not args.model:
        raise AutoPruneError("`--onnx` and `--shrunk` need to run the model: give `--model MODULE:NAME`.")
    saved = _read_with_progress(args.checkpoint)
    dense_bytes = sum(tensor.nbytes for tensor in saved.state.values())
    if args.sparse:
        save_sparse(saved.state, args.sparse)
        _print_size(args.sparse, dense_bytes)
    if args.onnx or args.shrunk:
        model = _build_model(args.model, saved)
        example = _make_example_input(model, args.input_shape)
        if args.onnx:
            _print_progress("shrinking, exporting and checking in onnxruntime …")
            export_onnx(model, args.onnx, example)
            _print_size(args.onnx, dense_bytes)
        if args.shrunk:
            _print_progress("shrinking and exporting …")
            export_program(model, args.shrunk, example)
            _print_size(args.shrunk, dense_bytes)
    return 0


def _build_model(name: str, saved: SavedModel) -> nn.Module:
    """Import the user's own code and return the model with the weights of the checkpoint."""
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        make: Any = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # importing the user's module may raise anything
        raise AutoPruneError(
            f"`--model` is {name!r}, which can't be imported: {_format_on_one_line(error)}. It must be MODULE:NAME."
        ) from error
    finally:
        sys.path.pop(0)
    try:
        if isinstance(make, type) and issubclass(make, both(LightningModule)) and saved.by_lightning:
            return make.load_from_checkpoint(saved.path, map_location="cpu", weights_only=True)
        model: nn.Module = make()
        model.load_state_dict(saved.state)
    except Exception as error:  # the user's code may raise anything, and weights of another model do not load
        raise AutoPruneError(
            f"{name} does not take the weights of {saved.path}: {_format_on_one_line(error)}. Name a LightningModule"
            " that saves its hyperparameters, or a function without arguments that makes the module."
        ) from error
    return model


def _format_on_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")


def _make_example_input(model: nn.Module, shape: Sequence[int] | None) -> Any:
    if shape:
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    example = getattr(model, "example_input_array", None)
    if example is None:
        raise AutoPruneError(f"{type(model).__name__} has no `example_input_array`: give `--input-shape`.")
    return example


def _read_with_progress(path: Path) -> SavedModel:
    if sys.stderr.isatty():
        _print_progress(f"reading {path} …")
    return read_checkpoint(path)


def _print_size(path: Path, dense_bytes: int) -> None:
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes, {dense_bytes / size:.1f}× smaller than the dense weights ({dense_bytes:,} bytes)")


def _print_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
