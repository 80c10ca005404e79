"""The run folder: resolved recipe, append-only JSON lines, atomic checkpoints. Nothing here knows a model."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opd.config import Recipe, differences

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "triton", "wandb", "datasets", "math-verify", "opd-train")
RESULT_KEYS = {"name", "track"}  # what may change between a run and its rerun


def open_run(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Create the folder or check that it belongs to this recipe; ValueError shows the difference."""
    resolved = folder / "resolved.json"
    dumped = recipe.model_dump(mode="json")
    if resolved.is_file():
        before = json.loads(resolved.read_text())["recipe"]
        changed = differences({k: v for k, v in before.items() if k not in RESULT_KEYS}, {k: v for k, v in dumped.items() if k not in RESULT_KEYS})
        if changed:
            raise ValueError(
                f"{folder} holds a run of another recipe: {'; '.join(changed)}. Give this one its own name (name=...) or delete that folder."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(resolved, {"schema_version": recipe.schema_version, "recipe": dumped, **environment(), **facts})


def environment() -> dict[str, Any]:
    """Package versions, git commit, machine: what a reader needs to repeat the run."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return {
        "packages": found,
        "git_commit": commit.stdout.strip(),
        "python": sys.version.split()[0],
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count(), "cpu": _cpu_name()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file whole, so that a reader never sees half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1, default=str) + "\n")
    scratch.replace(path)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete JSON line of a file; a torn last line (a killed writer) is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: a resumed run writes them again."""
    if path.is_file():
        kept = [row for row in read_lines(path) if row["step"] <= step]
        scratch = path.with_name(f".{path.name}.tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        scratch.replace(path)


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write checkpoints/step-N atomically: a crash or a full disk leaves the last good one as it was.

    Raises ValueError when the disk is full, with how much is free.
    """
    parent = folder / "checkpoints"
    parent.mkdir(exist_ok=True)
    target, scratch = parent / f"step-{step:06d}", parent / f".step-{step:06d}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        write(scratch)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "PytorchStreamWriter failed" in str(error):
            free = shutil.disk_usage(parent).free >> 20
            raise ValueError(
                f"the disk is full: checkpoint of step {step} was not written ({free} MiB free at {parent}); the last good one stays. "
                "Free space, or set checkpoint.keep=1, and run the same command again."
            ) from error
        raise
    shutil.rmtree(target, ignore_errors=True)
    scratch.replace(target)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if (path / "state.json").is_file())


def checkpoint_step(path: Path) -> int:
    """The step a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def prune_checkpoints(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one; leftovers of interrupted writes go too."""
    for path in checkpoints(folder)[:-keep]:
        if checkpoint_step(path) != best_step:
            shutil.rmtree(path)
    for scratch in (folder / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(scratch, ignore_errors=True)
