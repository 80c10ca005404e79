"""What there is: recipes, methods and runs, as text."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.config.load import PACKAGED, read_yaml
from opd.run.named import STOPPED, is_elsewhere, read_status


def overview(runs: Path = Path("runs")) -> str:
    """Recipes by kind with their first comment line, then the runs of this folder and their state."""
    lines = []
    for kind, title in (("methods", "Methods"), ("runs", "Runs you can start"), ("compare", "Comparisons")):
        lines.append(f"{title} (recipes/{kind}):")
        lines += [f"  {path.stem:<24} {_headline(path)}" for path in recipe_files(kind)]
    if states := [(path.parent, read_status(path.parent)) for path in sorted(runs.glob("**/status.json"))]:
        lines += [f"Run folders under {runs}/ (their names, as commands take them):", *_listed(runs, states)]
    return "\n".join(lines)


def _listed(runs: Path, states: Sequence[tuple[Path, Mapping[str, Any]]]) -> Iterator[str]:
    """A line a run; the finished runs of a comparison share one."""
    done = Counter(folder.parents[2] for folder, state in states if _is_of_comparison(folder) and state["state"] == "finished")
    for folder, state in states:
        comparison = folder.parents[2] if _is_of_comparison(folder) else None
        if state["state"] != "finished" or comparison is None:
            yield f"  {str(folder.relative_to(runs)):<48} {_state(state)}"
        elif count := done.pop(comparison, 0):
            page = comparison / "report.html"
            where = f"report: {page}" if page.is_file() else f"opd compare with the same words goes on; its runs: {comparison / 'runs'}/ARM/"
            yield f"  {str(comparison.relative_to(runs)):<48} comparison, {count} runs finished; {where}"


def _is_of_comparison(folder: Path) -> bool:
    return len(folder.parts) > 4 and folder.parts[-3] in ("runs", "tune") and not (folder.parents[2] / "status.json").is_file()


def _state(status: Mapping[str, Any]) -> str:
    steps = f"step {status['step']}" + (f"/{status['steps']}" if 0 < status["steps"] < UNLIMITED else "")
    if status["state"] == STOPPED:
        return f"{STOPPED} at {steps}; the same command resumes it"
    elsewhere = f" on {status['host']}, last heard of {status['updated']}" if is_elsewhere(status) else ""
    return f"{status['state']}{elsewhere} at {steps} {status['why']}".rstrip()


UNLIMITED = 1_000_000  # steps of a run that another budget ends


def recipe_files(kind: str) -> list[Path]:
    """Recipe files of a kind ("methods", "runs", "compare"): those of this directory first, then the packaged ones not shadowed by them."""
    found: dict[str, Path] = {}
    for root in (Path("recipes"), *PACKAGED):
        for path in sorted((root / kind).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]


def _headline(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[:1]
    return first[0].removeprefix("#").strip() if first and first[0].startswith("#") else read_yaml(path).get("paper", "")
