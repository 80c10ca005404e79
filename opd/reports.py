"""The commands that read run folders, as functions: compare, inspect. Apart from `opd.api`, so that training loads no plotting library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.api import evaluate_run, train_run
from opd.build.system import model_folders
from opd.comparison.config import Comparison, arm_recipe, load_comparison
from opd.comparison.runner import compare as run_comparison
from opd.comparison.workers import Functions
from opd.launcher.script import refuse_unguarded_script
from opd.run.named import find_run
from opd.viewer.page import write_viewer


def compare(comparison: str, overrides: Sequence[str] | Mapping[str, Any] = (), *, quiet: bool = False) -> Path:
    """Run what is missing of a comparison and write its report; returns the report's path. Raises ValueError for a mistake before any work."""
    refuse_unguarded_script("opd.compare")
    found = load_comparison(comparison, overrides)
    if not Path("runs", found.name).exists():  # later on, arms may be finished whose models are gone
        check_models(found)
    return run_comparison(found, functions=Functions(train=train_run, evaluate=evaluate_run), quiet=quiet)


def check_models(comparison: Comparison) -> None:
    """Raises ValueError for an arm whose student or teacher is not there."""
    for name, arm in comparison.arms.items():
        if arm.recipe:
            try:
                model_folders(arm_recipe(comparison, name, comparison.seeds[0], {}))
            except ValueError as error:
                raise ValueError(f"arm {name!r}: {error}") from None


def inspect(run: str, options: Mapping[str, Any] = {}) -> Path:  # noqa: B006 - never written to
    """Write the run's token viewer and return its path. options: {"other": RUN} lays a second run beside it. Raises ValueError with the fix."""
    if unknown := sorted(set(options) - {"other"}):
        raise ValueError(f"opd inspect RUN [other=RUN]: unknown option {unknown[0]!r}")
    return write_viewer(find_run(run), other=find_run(str(options["other"])) if "other" in options else None)
