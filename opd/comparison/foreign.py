"""Files that other trainers leave: trainer_state.json of Hugging Face's Trainer (TRL), and histories exported from W&B. Nothing is unpickled."""

import csv
import json
from pathlib import Path
from typing import Any


def read_trainer_state(source: Path) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """(rows of the log, facts for the manifest, why it did not finish or "") of a TRL output folder, a checkpoint in it, or the file itself.

    Raises ValueError where there is no trainer_state.json.
    """
    inside = sorted(source.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    found = [path for path in (source, source / "trainer_state.json", *reversed(inside)) if path.is_file()]
    if not found:
        raise ValueError(f"{source} has no trainer_state.json: give the output_dir of a TRL run, and call trainer.save_state() at its end")
    try:
        state = json.loads(found[0].read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{found[0]} is not valid JSON: {error}") from None
    if not isinstance(state, dict) or not state.get("log_history"):
        raise ValueError(f"{found[0]} has no log_history: train with logging_steps=1 (logging_strategy steps)")
    done, wanted = int(state.get("global_step", 0)), int(state.get("max_steps", 0))
    why = f"stopped at step {done} of {wanted}" if done < wanted else ""
    return [dict(row) for row in state["log_history"]], {"framework": "TRL (trainer_state.json)"}, why


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a W&B history: CSV of a run's history or of one chart, JSON (a list of rows) or JSON lines. Raises ValueError for anything else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a W&B export (.csv, .json, .jsonl) or a run-ID.wandb file")
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".csv":
            return _csv_rows(path, text)
        if path.suffix == ".json":
            rows = json.loads(text)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            raise ValueError(f"{path}: W&B exports are .csv, .json, .jsonl or .wandb files, not {path.suffix or 'without an ending'}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of rows, one a step, e.g. list(run.scan_history())")
    return rows


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    """Columns of a chart are named "RUN - metric", with extremes beside them; of one run only, or it is not known whose they are."""
    reader = csv.DictReader(text.splitlines())
    columns = [name for name in reader.fieldnames or () if not name.endswith(("__MIN", "__MAX"))]
    runs = {name.rpartition(" - ")[0] for name in columns if " - " in name}
    if len(runs) > 1:
        raise ValueError(f"{path} holds {len(runs)} runs ({', '.join(sorted(runs)[:4])}): export one run a file")
    return [{name.rpartition(" - ")[2]: _value(row[name]) for name in columns if row[name] not in ("", None)} for row in reader]


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
