"""Reads the file of a real offline W&B run: records in blocks, in the format of LevelDB's log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

HEADER, BLOCK, RECORD_HEADER = 7, 32 * 1024, 7


def parse_records(path: Path) -> list[Any]:
    """Return all records of a ``.wandb`` file."""
    from wandb.proto import wandb_internal_pb2

    raw, at, fragment, records = path.read_bytes(), HEADER, b"", []
    while at + RECORD_HEADER <= len(raw):
        if BLOCK - at % BLOCK < RECORD_HEADER:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        size = int.from_bytes(raw[at + 4 : at + 6], "little")
        kind = raw[at + 6]
        fragment += raw[at + RECORD_HEADER : at + RECORD_HEADER + size]
        at += RECORD_HEADER + size
        if kind in (1, 4):  # a whole record, or the last of several fragments
            records.append(wandb_internal_pb2.Record.FromString(fragment))
            fragment = b""
    return records


def read_records(folder: Path, seconds: float = 30) -> list[Any]:
    """Return all records of the only run below a folder, as soon as the file is complete."""
    deadline = time.monotonic() + seconds
    while True:
        (path,) = folder.rglob("*.wandb")
        records = parse_records(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has no exit record")
        time.sleep(0.1)


def read_models(folder: Path) -> list[Any]:
    """Return the artifacts of the only run below a folder that are models; tables are artifacts too."""
    records = read_records(folder)
    logged = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    logged += [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    return [artifact for artifact in logged if artifact.type == "model"]


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that the only run below a folder logged."""
    rows = []
    for record in read_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
