"""What a run's end says: how accurate the model has become, where it is, and what to look at next."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.run.folder import read_lines


def summary(folder: Path) -> str:
    """Accuracy before and after, the model's folder and the next commands, from a run's eval.jsonl."""
    rows = [row for row in read_lines(folder / "eval.jsonl") if "avg@k" in row]
    dev = [row for row in rows if row["split"] == "dev"]
    said = [f"run folder: {folder}"]
    if len(dev) > 1:
        said.append(f"accuracy on dev: {_share(dev[0])} at step {dev[0]['step']}, {_share(dev[-1])} at step {dev[-1]['step']}")
    tests = {row["decoding"]: _share(row) for row in rows if row["split"] == "test"}
    if tests:
        said.append("accuracy on test: " + ", ".join(f"{share} {decoding}" for decoding, share in tests.items()))
    if (folder / "model").is_dir():
        said.append(f"model: {folder / 'model'} (a Hugging Face folder); next: opd inspect {folder}, opd eval {folder}, opd publish {folder}")
    return "\n".join(said)


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['avg@k']:.1%}" if row["avg@k"] is not None else "no answer judged"
