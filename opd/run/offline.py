"""Reads the file that W&B writes when it is offline (run-ID.wandb): config, history, summary and alerts as they will be uploaded."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER, WHOLE, LAST = 32768, 7, 1, 4  # LevelDB's log format; W&B's own header of 7 bytes belongs to the first block


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRun:
    """What one file holds. history: rows with `_step`, in order; alerts: (title, text)."""

    run_id: str
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    alerts: tuple[tuple[str, str], ...]


def read_offline(path: Path) -> OfflineRun:
    """Everything in a .wandb file up to where it was torn. Raises ValueError for a file that is not one."""
    run: Any = None
    config: dict[str, Any] = {}
    history: dict[int, dict[str, Any]] = {}
    summary: dict[str, Any] = {}
    alerts = []
    for record in _records(path):
        if record.HasField("run"):
            run = record.run
            config |= _values(record.run.config.update)
        elif record.HasField("config"):
            config |= _values(record.config.update)
        elif record.HasField("history"):
            row = _values(record.history.item)
            history.setdefault(int(row.get("_step", record.history.step.num)), {}).update(row)
        elif record.HasField("summary"):
            summary |= _values(record.summary.update)
        elif record.HasField("alert"):
            alerts.append((record.alert.title, record.alert.text))
    if run is None:
        raise ValueError(f"{path} holds no W&B run: give the run-ID.wandb file of an offline-run-... folder")
    rows = tuple({"_step": step, **row} for step, row in sorted(history.items()))
    return OfflineRun(
        run_id=run.run_id, name=run.display_name, group=run.run_group, job_type=run.job_type, tags=tuple(run.tags), config=config, history=rows,
        summary=summary, alerts=tuple(alerts),
    )  # fmt: skip


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(path: Path) -> Iterator[Any]:
    content, position, parts = path.read_bytes(), HEADER, b""
    if content[:4] != b":W&B":
        raise ValueError(f"{path} is no file of W&B: give the run-ID.wandb file of an offline-run-... folder")
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + HEADER])
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (WHOLE, LAST):
            if position > len(content):
                return  # torn by a killed writer
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
