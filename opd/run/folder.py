"""The run folder: resolved recipe, append-only JSON lines, atomic checkpoints. Nothing here knows a model."""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opd.config.load import differences, parse_recipe, recipe_hash
from opd.config.recipe import Recipe
from opd.run.machine import environment
from opd.run.named import process_facts

MAY_CHANGE = (
    "name",
    "track",
    "profile",
    "guard",
    "prices",
    "data.verifier_seconds",
    "checkpoint.every",
    "checkpoint.keep",
    "launch",
    "learner.ranks",
    "learner.token_budget",
    "learner.chunk_bytes",
    "ray",
    "engine.token_budget",
    "engine.replicas",
    "engine.tensor_parallel",
    "engine.placement",
    "engine.memory_share",
    "engine.kv_bytes",
    "engine.chunk",
    "engine.deadline_seconds",
    "engine.straggler_factor",
    "engine.restarts",
    "engine.exchange",
)
"""Keys that a rerun may set differently: they decide what is kept and what fits into memory, not what is learned."""
INPUTS = {  # what may not
    "data_hash": "the data",
    "model_hash": "the model that it started from, or its teacher",
    "template_hash": "the chat template",
    "learner": "the kind of learner",
}
LOCK = ".lock"
FILES = "files.json"  # the sizes of a checkpoint's files
LEFTOVERS = {LOCK, "status.json", "error.txt"}  # what a run that never started may have left in its folder


def run_folder(recipe: Recipe, reference: str) -> Path:
    """runs/<name>, by default recipe-method-seed-hash. Raises ValueError for a name that leads out of runs/."""
    if Path(recipe.name).is_absolute() or ".." in Path(recipe.name).parts:
        raise ValueError(f"name={recipe.name}: a run lives under runs/; give a plain name, or one with folders like study/arm")
    return Path("runs") / (recipe.name or f"{Path(reference).stem}-{recipe.method or 'method'}-{recipe.seed}-{recipe_hash(recipe)}")


def finished(folder: Path, steps: int = 0) -> bool:
    """Whether the folder holds a run that reached its end, which was not meant to come before `steps`."""
    path = folder / "status.json"
    status = json.loads(path.read_text()) if path.is_file() else {}
    return status.get("state") == "finished" and status["steps"] >= steps


def check_chain(stages: Sequence[Recipe], reference: str) -> None:
    """`check_run` for every stage before the first one trains; a stage that a later one started from may not go on. Raises ValueError."""
    folders = [run_folder(recipe, reference) for recipe in stages]
    for number, (folder, recipe) in enumerate(zip(folders, stages, strict=True)):
        check_run(folder, recipe)
        begun = [later for later in folders[number + 1 :] if (later / "resolved.json").is_file()]
        if begun and finished(folder) and not finished(folder, recipe.steps):
            raise ValueError(
                f"{folder} cannot go on to {recipe.steps} steps: {begun[0]} has started from its model. Train the chain under another name "
                f"(name=...), or delete {begun[0]}{' and the stages after it' if len(begun) > 1 else ''}."
            )


def check_run(folder: Path, recipe: Recipe) -> None:
    """Raises ValueError, with the difference, for a folder that holds another recipe's run or no run at all.

    A run may go on to more steps than it was begun with where its learning rate does not depend on them, or launch.extend says so.
    """
    resolved = folder / "resolved.json"
    if not resolved.is_file():
        if folder.exists() and (not folder.is_dir() or any(path.name not in LEFTOVERS and not _is_scratch(path) for path in folder.iterdir())):
            raise ValueError(f"{folder} exists and is no run folder (it has no resolved.json). Give this run another name (name=...).")
        return
    changed = [change for change in _changes(resolved, recipe) if not change.startswith(MAY_CHANGE)]
    if changed and all(change.startswith("steps: ") for change in changed) and recipe.steps > (before := recorded_steps(resolved)):
        if recipe.optimizer.schedule == "constant" or recipe.launch.extend:
            return
        raise ValueError(
            f"{folder} holds a run of {before} steps whose learning rate falls to 0 at its end (optimizer.schedule={recipe.optimizer.schedule}): "
            f"with steps={recipe.steps} every step would have had another rate. Add launch.extend=true to go on all the same (it is recorded), "
            f"or start a new run: name=OTHER, with init={folder} to go on from its model."
        )
    if changed:
        raise ValueError(
            f"{folder} holds a run of another recipe: {'; '.join(changed)}. Give this one its own name (name=...) or delete that folder."
        )


def recorded_steps(resolved: Path) -> int:
    """The steps of a run's resolved.json."""
    return json.loads(resolved.read_text(encoding="utf-8"))["recipe"]["steps"]


def _changes(resolved: Path, recipe: Recipe) -> list[str]:
    """What differs from the recorded recipe; a key that the run's version of the code did not know had today's default."""
    recorded = json.loads(resolved.read_text(encoding="utf-8"))["recipe"]
    with contextlib.suppress(ValueError):  # a key that is gone: shown as it stands
        recorded = parse_recipe(recorded, resolved=True).model_dump(mode="json")
    return differences(recorded, recipe.model_dump(mode="json"))


def open_run(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Create the folder, or check that it belongs to this recipe and that the facts in INPUTS are still what they were."""
    check_run(folder, recipe)
    resolved = folder / "resolved.json"
    if not resolved.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(resolved, {"schema_version": recipe.schema_version, "recipe": recipe.model_dump(mode="json"), **environment(), **facts})
        return
    before = json.loads(resolved.read_text(encoding="utf-8"))
    for key, what in INPUTS.items():
        if key in facts and key in before and facts[key] != before[key]:
            raise ValueError(
                f"{folder} cannot go on: {what} changed since the run began ({key}: {before[key]} -> {facts[key]}). "
                "Put it back, or give a new run its own name (name=...)."
            )
    if recipe.steps > before["recipe"]["steps"]:
        keep_lines(folder / "eval.jsonl", lambda row: row["split"] != "test")  # of the model that it has become by now
        before["extended"] = [*before.get("extended", []), {"from": before["recipe"]["steps"], "to": recipe.steps}]
        before["recipe"]["steps"] = recipe.steps
        write_json(resolved, before)
    if (changed := _changes(resolved, recipe)) != before.get("changed_on_resume", []):
        write_json(resolved, {**before, "changed_on_resume": changed})


def _is_scratch(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder is this process's alone while inside; what killed writers left half done is removed.

    Raises ValueError where another process that still lives works in it.
    """
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is working in {folder} (see its status.json); wait for it, or stop it first") from None
        except OSError:  # a file system without locks: nobody can tell
            pass
        for path in filter(_is_scratch, folder.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file whole, so that a reader never sees half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1, default=str) + "\n")
    scratch.replace(path)


def status_content(state: str, why: str, *, step: int, steps: int, phase: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What status.json holds; `pid`, `pid_started` and `host` are this process, `updated` now (UTC)."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"state": state, "step": step, "steps": steps, "phase": phase, **process_facts(), "why": why, "updated": now, **facts}


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line; numbers that JSON does not have (NaN, infinity) become null."""
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


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


def keep_lines(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop all other lines, and a torn last one: a resumed run writes them again."""
    if path.is_file():
        kept = [row for row in read_lines(path) if keep(row)]
        scratch = path.with_name(f".{path.name}.tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        scratch.replace(path)


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], *, leads: bool = True, wait: Callable[[], None] = lambda: None) -> Path:
    """Write checkpoints/step-N atomically: a crash or a full disk leaves the last good one as it was.

    With several ranks all call it and write into one folder, which the rank that `leads` makes and closes; `wait` returns when all are
    there. Raises ValueError when the disk is full, with how much is free.
    """
    parent = folder / "checkpoints"
    target, scratch = parent / f"step-{step:06d}", parent / f".step-{step:06d}.tmp"
    try:
        if leads:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        wait()
        write(scratch)
        wait()
        if leads:
            write_json(scratch / FILES, {str(path.relative_to(scratch)): path.stat().st_size for path in scratch.rglob("*") if path.is_file()})
    except Exception as error:
        if leads:
            shutil.rmtree(scratch, ignore_errors=True)
        if is_disk_full(error):
            raise ValueError(
                f"the disk is full: checkpoint of step {step} was not written ({free_mebibytes(folder)} MiB free at {parent}); the last good one "
                "stays. Free space (checkpoint.keep=1 needs less), and run the same command again."
            ) from error
        raise
    if leads:
        if target.exists():
            remove_folder(target)
        scratch.replace(target)
    wait()
    return target


def remove_folder(path: Path) -> None:
    """Delete a checkpoint so that a crash on the way never leaves half of one under its own name."""
    scratch = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    path.replace(scratch)
    shutil.rmtree(scratch)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; torch and safetensors say so in words of their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in ("No space left", "PytorchStreamWriter failed", "os error 28"))


def free_mebibytes(folder: Path) -> int:
    """Free space where the folder lies, MiB."""
    return shutil.disk_usage(folder).free >> 20


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. One whose files lost bytes (power cut, half a copy) does not count."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if _is_complete(path))


def _is_complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / FILES).read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, json.JSONDecodeError):
        return False


def checkpoint_step(path: Path) -> int:
    """The step a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def prune_checkpoints(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one; leftovers of interrupted writes go too."""
    for path in checkpoints(folder)[:-keep]:
        if checkpoint_step(path) != best_step:
            remove_folder(path)
    for scratch in (folder / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(scratch, ignore_errors=True)
