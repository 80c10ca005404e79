"""Run folders by name: where they are, what a name that is none of them may have meant, and whether a run's process still lives."""

import difflib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd.config.load import KINDS, kind_of

RUNS = Path("runs")
EVIDENCE = ("resolved.json", "metrics.jsonl", "eval.jsonl", "samples")  # any of them makes a folder a run's
SHOWN = 6  # names in a sentence


def find_run(reference: str | Path) -> Path:
    """The run folder that a path or a bare name (a folder under runs/) means; comparison/arm/seed-N finds the run of that seed.

    Raises ValueError for a comparison or a file with stages (their runs are listed), for any other folder, and for a name that is none
    (with the nearest ones).
    """
    given = Path(reference)
    places = dict.fromkeys([given, RUNS / given])
    for place in places:
        if is_run(place):
            return place
    for place in places:
        if len(found := [place] if is_run(place) else _short_form(place)) == 1:
            return found[0]
        if inside := found or sorted(runs_in(place)):
            raise ValueError(_several(place, inside))
    if noun := kind_of(str(reference)):
        makes = f"opd {'compare' if noun == KINDS['compare'] else 'train'} {reference} makes " + ("runs" if noun == KINDS["compare"] else "one")
        made = "name a run that used it" if noun in (KINDS["methods"], KINDS["hardware"]) else makes
        raise ValueError(f"{reference} is {noun}, and a run folder is wanted: {made}{_known()}")
    for place in places:
        if place.is_file():
            raise ValueError(f"{place} is a file; a run folder is wanted, such as opd train makes under runs/")
        if place.is_dir():
            raise ValueError(f"{place} is no run folder (it has no resolved.json){_known()}")
    missing = f"{given} does not exist" if given.is_absolute() or given.parts[:1] == RUNS.parts else f"neither {given} nor {RUNS / given} exists"
    raise ValueError(f"{missing}{nearest_runs(str(given))}{_known()}")


def find_bundle(reference: str | Path) -> Path:
    """The file of a recorded step: as given, or the only one of a run. Raises ValueError for a run with none or several, or no such thing."""
    given = Path(reference)
    if given.suffix == ".safetensors":
        return given
    if given.is_file():
        raise ValueError(f"{given} is no bundle: opd bundle RUN step=N writes one, RUN/bundles/step-N.safetensors")
    folder = find_run(reference)
    found = sorted(folder.glob("bundles/*.safetensors"))
    if len(found) != 1:
        several = f"has several: name one of {', '.join(map(str, found[:SHOWN]))}"
        raise ValueError(f"{folder} {several if found else f'holds no bundle yet: opd bundle {folder} step=N makes one'}")
    return found[0]


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run's records."""
    return folder.is_dir() and any((folder / name).exists() for name in EVIDENCE)


def runs_in(folder: Path) -> Iterator[Path]:
    """Run folders below a folder, not those inside of runs."""
    for child in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_run(child):
            yield child
        elif child.is_dir() and not child.is_symlink():
            yield from runs_in(child)


def _short_form(place: Path) -> list[Path]:
    """comparison/arm/seed-0 for comparison/runs/arm/seed-0-1a2b3c4d, comparison/arm for all of its seeds."""
    for comparison in place.parents:
        arm_name, *seed = place.relative_to(comparison).parts
        arm = comparison / "runs" / arm_name
        if len(seed) < 2 and arm.is_dir() and (comparison / "runs").resolve() != RUNS.resolve():
            return sorted(path for path in arm.iterdir() if is_run(path) and path.name.startswith(f"{seed[0]}-" if seed else ""))
    return []


def _several(place: Path, inside: list[Path]) -> str:
    arms: dict[str, list[Path]] = {}
    for path in inside:
        if path.parent.parent == place / "runs":
            arms.setdefault(path.parent.name, []).append(path)
    if arms:
        listed = ", ".join(f"{arm} ({len(paths)} run{'s' if len(paths) > 1 else ''})" for arm, paths in arms.items())
        first = next((path for paths in arms.values() for path in paths if (path / "metrics.jsonl").exists()), inside[0])  # the base has no steps
        return f"{place} is a comparison of {listed}: name one of its runs, e.g. {first}; its figures are in {place / 'report.html'}"
    names = ", ".join(map(str, inside[:SHOWN])) + (f" and {len(inside) - SHOWN} more" if len(inside) > SHOWN else "")
    return f"{place} holds several runs: name one of {names}" if len(inside) > 1 else f"{place} holds a run: name it, {names}"


def nearest_runs(reference: str) -> str:
    """' (did you mean X?)', X the nearest run folders here."""
    known = {str(path): str(path.relative_to(RUNS)) for path in runs_in(RUNS)}
    names = {**{name: path for path, name in known.items()}, **{Path(path).name: path for path in known}}
    close = difflib.get_close_matches(Path(reference).name, names, n=3, cutoff=0.5) or difflib.get_close_matches(reference, names, n=3, cutoff=0.5)
    found = list(dict.fromkeys(names[name] for name in close))
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _known() -> str:
    return "; `opd show` lists the runs here" if any(runs_in(RUNS)) else "; there are no runs here yet: opd train RECIPE makes one"


def process_facts() -> dict[str, Any]:
    """What tells later whether the process that writes a status still lives: pid, its start (clock ticks since boot, where known), host."""
    return {"pid": os.getpid(), "pid_started": _started(os.getpid()), "host": platform.node()}


def is_gone(status: Mapping[str, Any]) -> bool:
    """Whether a status says "running" of a process of this machine that has ended without a word. False where nobody can tell."""
    pid = status.get("pid")
    if status.get("state") != "running" or not isinstance(pid, int) or is_elsewhere(status):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives and is somebody else's
        return False
    started = _started(pid)
    return started == DEAD or status.get("pid_started") not in (None, started)


def is_elsewhere(status: Mapping[str, Any]) -> bool:
    """Whether a status says "running" of a process of another machine."""
    return status.get("state") == "running" and status.get("host", platform.node()) != platform.node()


DEAD = -1  # ended, and its parent has not asked yet


def _started(pid: int) -> int | None:
    """Clock ticks since boot; DEAD for a process that only waits to be asked how it ended; None where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return DEAD if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def read_status(folder: Path) -> dict[str, Any]:
    """status.json, its state "stopped without a word" where the process is gone; {} where there is none."""
    path = folder / "status.json"
    status = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {**status, "state": STOPPED} if is_gone(status) else status


STOPPED = "stopped without a word"
