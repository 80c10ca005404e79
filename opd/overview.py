"""What there is: recipes, methods and runs, as text."""

import json
from pathlib import Path

from opd.config.load import PACKAGED, read_yaml


def overview(runs: Path = Path("runs")) -> str:
    """Recipes by kind with their first comment line, then the runs of this folder and their state."""
    lines = []
    for kind, title in (("methods", "Methods"), ("runs", "Runs you can start"), ("compare", "Comparisons")):
        lines.append(f"{title} (recipes/{kind}):")
        lines += [f"  {path.stem:<24} {_headline(path)}" for path in recipe_files(kind)]
    states = [(path.parent, json.loads(path.read_text())) for path in sorted(runs.glob("**/status.json"))]
    if states:
        lines.append(f"Run folders under {runs}/:")
        lines += [f"  {folder.name:<48} {state['state']} at step {state['step']}/{state['steps']} {state['why']}" for folder, state in states]
    return "\n".join(lines)


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
