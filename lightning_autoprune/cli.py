"""The command ``lightning-autoprune``: a demo, reports on checkpoints, comparison, export."""

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
from lightning.pytorch import LightningModule
from torch import nn

from lightning_autoprune import __version__
from lightning_autoprune.demo import run as demo
from lightning_autoprune.demo.data import DataError
from lightning_autoprune.demo.run import at_least_one
from lightning_autoprune.deploy.atomic_write import atomic_write
from lightning_autoprune.deploy.onnx_export import export_onnx
from lightning_autoprune.deploy.sparse_file import save_sparse
from lightning_autoprune.deploy.torch_export import export_program
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.reporting.checkpoint_reader import SavedModel, read_checkpoint
from lightning_autoprune.reporting.html_report import headline, html_report
from lightning_autoprune.reporting.layer_table import align_columns, table_cells, total_row
from lightning_autoprune.reporting.mask_comparison import as_comparison_table, compare_masks

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
exit codes: 0, done; 1, a file or a setting that it can't work with; 2, arguments that it does not know.
Files are loaded with weights_only=True: nothing in them is executed. --model imports your own code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # what reads the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return 141
    except (AutoPruneError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-autoprune",
        description="Look at what AutoPruneCallback did, and make small files of it.",
        epilog=_examples(*_EXAMPLES) + "\n" + _NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lightning-autoprune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    demo.add_arguments(add("demo", demo.run, "train LeNet-300-100 dense and pruned, and show what came of it"))

    report = add("report", _report, "show what is left of each layer of a checkpoint")
    report.add_argument("checkpoint", type=Path, help="of Lightning, of torch.save, or a safetensors file")
    report.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page with pictures, which needs no network"
    )
    report.add_argument("--json", action="store_true", help="print all figures as JSON in place of the table")

    both = add("compare", _compare, "show which weights two checkpoints both keep, and which were pruned or came back")
    both.add_argument("first", type=Path, metavar="A", help="the earlier one")
    both.add_argument("second", type=Path, metavar="B", help="the later one, of the same layers")
    both.add_argument("--json", action="store_true", help="print all figures as JSON in place of the table")

    export = add("export", _export, "write a checkpoint as a sparse file, an ONNX file, or a shrunk program")
    export.add_argument("checkpoint", type=Path, help="as of `report`; a Lightning one where --model has arguments")
    export.add_argument("--sparse", type=Path, metavar="FILE", help="safetensors without the zeros; needs no model")
    export.add_argument("--onnx", type=Path, metavar="FILE", help="the shrunk model for onnxruntime; needs --model")
    export.add_argument("--shrunk", type=Path, metavar="FILE", help="the same for torch.export.load; needs --model")
    export.add_argument("--model", metavar="MODULE:NAME", help="a LightningModule, or what makes a module when called")
    export.add_argument(
        "--input-shape",
        type=at_least_one,
        nargs="+",
        metavar="N",
        help="shape of an input, rows first; without it, the module's example_input_array",
    )
    return parser


def _examples(*names: str) -> str:
    lines = [f"  lightning-autoprune {line}" for name in names for line in _EXAMPLES[name]]
    return "\n".join(["examples:", *lines])


def _report(args: argparse.Namespace) -> int:
    saved = _read(args.checkpoint)
    if args.html:
        page = html_report(saved)
        with atomic_write(args.html) as temporary:
            temporary.write_text(page, encoding="utf-8")
        _progress(f"{args.html} is written")
    if args.json:
        print(json.dumps(saved.as_dict(), indent=2))
        return 0
    rows = saved.layers()
    print(f"{saved.path}: {headline(saved)}\n")
    print(align_columns(*table_cells([*rows, total_row(rows)])))
    return 0


def _compare(args: argparse.Namespace) -> int:
    first, second = _read(args.first), _read(args.second)
    rows = compare_masks(first.weights, second.weights)
    apart = sorted((first.weights.keys() ^ second.weights.keys()) | (first.weights.keys() - {row.name for row in rows}))
    if args.json:
        files = {"A": str(args.first), "B": str(args.second)}
        print(json.dumps({**files, "layers": [row.as_dict() for row in rows], "not_in_both": apart}, indent=2))
        return 0
    print(f"A: {args.first}: {headline(first)}\nB: {args.second}: {headline(second)}\n")
    print(align_columns(*as_comparison_table(rows)))
    if apart:
        print(f"\nnot in both, or with another shape: {', '.join(apart)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    if not (args.sparse or args.onnx or args.shrunk):
        raise AutoPruneError("Nothing to write: give `--sparse`, `--onnx` or `--shrunk`.")
    if (args.onnx or args.shrunk) and not args.model:
        raise AutoPruneError("`--onnx` and `--shrunk` need to run the model: give `--model MODULE:NAME`.")
    saved = _read(args.checkpoint)
    before = sum(tensor.nbytes for tensor in saved.state.values())
    if args.sparse:
        save_sparse(saved.state, args.sparse)
        _written(args.sparse, before)
    if args.onnx or args.shrunk:
        model = _make(args.model, saved)
        example = _example(model, args.input_shape)
        if args.onnx:
            _progress("shrinking, exporting and checking in onnxruntime …")
            export_onnx(model, args.onnx, example)
            _written(args.onnx, before)
        if args.shrunk:
            _progress("shrinking and exporting …")
            export_program(model, args.shrunk, example)
            _written(args.shrunk, before)
    return 0


def _make(name: str, saved: SavedModel) -> nn.Module:
    """The model of the checkpoint; its code is the user's own."""
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        make: Any = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever is in the user's module
        raise AutoPruneError(
            f"`--model` is {name!r}, which can't be imported: {_in_a_line(error)}. It must be MODULE:NAME."
        ) from error
    finally:
        sys.path.pop(0)
    try:
        if isinstance(make, type) and issubclass(make, LightningModule) and saved.by_lightning:
            return make.load_from_checkpoint(saved.path, map_location="cpu", weights_only=True)
        model: nn.Module = make()
        model.load_state_dict(saved.state)
    except Exception as error:  # of the user's own code, or of weights that are not for it
        raise AutoPruneError(
            f"{name} does not take the weights of {saved.path}: {_in_a_line(error)}. Name a LightningModule that saves"
            " its hyper-parameters, or a function without arguments that makes the module."
        ) from error
    return model


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")


def _example(model: nn.Module, shape: Sequence[int] | None) -> Any:
    if shape:
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    example = getattr(model, "example_input_array", None)
    if example is None:
        raise AutoPruneError(f"{type(model).__name__} has no `example_input_array`: give `--input-shape`.")
    return example


def _read(path: Path) -> SavedModel:
    if sys.stderr.isatty():
        _progress(f"reading {path} …")
    return read_checkpoint(path)


def _written(path: Path, before: int) -> None:
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes, {before / size:.1f}× smaller than the dense weights ({before:,} bytes)")


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
