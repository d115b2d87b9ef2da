"""Reads what a real offline W&B run wrote: a file of records in blocks, as LevelDB writes its log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

HEADER, BLOCK, RECORD_HEADER = 7, 32 * 1024, 7


def records(path: Path) -> list[Any]:
    """All records of a ``.wandb`` file."""
    from wandb.proto import wandb_internal_pb2

    raw, at, part, found = path.read_bytes(), HEADER, b"", []
    while at + RECORD_HEADER <= len(raw):
        if BLOCK - at % BLOCK < RECORD_HEADER:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        size = int.from_bytes(raw[at + 4 : at + 6], "little")
        kind = raw[at + 6]
        part += raw[at + RECORD_HEADER : at + RECORD_HEADER + size]
        at += RECORD_HEADER + size
        if kind in (1, 4):  # whole, or the last of several parts
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found


def read_records(folder: Path, seconds: float = 30) -> list[Any]:
    """All records of the only run below a folder; waits until the file is whole."""
    deadline = time.monotonic() + seconds
    while True:
        (path,) = folder.rglob("*.wandb")
        found = records(path)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has no exit record")
        time.sleep(0.1)


def read_models(folder: Path) -> list[Any]:
    """The artifacts that the only run below a folder logged and that are models; tables are some too."""
    found = read_records(folder)
    logged = [record.request.log_artifact.artifact for record in found if record.request.HasField("log_artifact")]
    logged += [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    return [artifact for artifact in logged if artifact.type == "model"]


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows that the only run below a folder logged."""
    rows = []
    for record in read_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
