"""Which runs a comparison needs, where they live, and which of them are already there."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from opd.comparison.config import Budget, Comparison, arm_overrides, arm_recipe
from opd.comparison.results import RunResult, dev_score, read_run
from opd.config.load import differences, parse_recipe, recipe_hash
from opd.config.recipe import Recipe
from opd.run.folder import MAY_CHANGE
from opd.run.spending import Rates

NOT_HASHED = ("name", "track", "launch", "hardware", "target", "profile")  # by opd.config.load.recipe_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: `by` names the function that does it ("" trains, "evaluate" only evaluates, else module:function)."""

    arm: str
    seed: int
    tuning: bool
    point: Mapping[str, Any]
    recipe: str
    overrides: Mapping[str, Any]
    folder: Path
    by: str
    budget: Budget

    @property
    def title(self) -> str:
        searched = " ".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in self.point.items()) if self.tuning else ""
        return f"{'tune ' if self.tuning else ''}{self.arm} {searched + ' ' if searched else ''}seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One point of the grid for one arm: its dev score over the search's seeds, minus infinity where a run failed."""

    point: Mapping[str, Any]
    score: float
    runs: tuple[RunResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What the search found for one arm and what all its runs cost; scored_tokens are those of teacher and learner."""

    point: Mapping[str, Any]
    trials: tuple[Trial, ...]
    generated_tokens: float
    scored_tokens: float
    seconds: float

    @property
    def runs(self) -> int:
        return sum(len(trial.runs) for trial in self.trials)

    @property
    def at_edge(self) -> tuple[str, ...]:
        """Keys whose chosen value is the first or last of three or more tried: a wider grid might find a better one."""
        edges = []
        for key, chosen in self.point.items():
            tried = sorted({trial.point[key] for trial in self.trials if isinstance(trial.point[key], int | float)})
            if len(tried) > 2 and chosen in (tried[0], tried[-1]):
                edges.append(key)
        return tuple(edges)


def tuning_jobs(comparison: Comparison, root: Path) -> list[Job]:
    """Every arm that trains, at every point of the grid, with every seed of the search."""
    if comparison.tune is None:
        return []
    return [
        _job(comparison, root, arm, seed, point, tuning=True)
        for point in comparison.tune.points()
        for seed in comparison.tune.seeds
        for arm, settings in comparison.arms.items()
        if settings.train and not settings.runs
    ]


def reported_jobs(comparison: Comparison, root: Path, chosen: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """Every arm with every reported seed, at its chosen point; the untrained arm once. Seed by seed, so that an early look is fair."""
    return [
        _job(comparison, root, arm, seed, chosen.get(arm, {}), tuning=False)
        for seed in comparison.seeds
        for arm, settings in comparison.arms.items()
        if settings.train or seed == comparison.seeds[0]
    ]


def _job(comparison: Comparison, root: Path, arm: str, seed: int, point: Mapping[str, Any], *, tuning: bool) -> Job:
    settings = comparison.arms[arm]
    if settings.runs:
        folder = settings.folder(seed)
        return Job(arm=arm, seed=seed, tuning=False, point={}, recipe="", overrides={}, folder=folder, by="", budget=comparison.budget)
    recipe = arm_recipe(comparison, arm, seed, point, tuning=tuning)
    words = "".join(f"{key.rsplit('.', 1)[-1]}-{_short(value)}-" for key, value in point.items()) if tuning else ""
    return Job(
        arm=arm,
        seed=seed,
        tuning=tuning,
        point=point,
        recipe=settings.recipe,
        overrides=arm_overrides(comparison, arm, seed, point, tuning=tuning),
        folder=_folder(root / comparison.name / ("tune" if tuning else "runs") / arm, f"{words}seed-{seed}", recipe),
        by=settings.by or ("" if settings.train else "evaluate"),
        budget=(comparison.tune.budget if tuning and comparison.tune else None) or comparison.budget,
    )


def _folder(parent: Path, stem: str, recipe: Recipe) -> Path:
    """parent/stem-HASH; where that is not there, a finished run of the same recipe whose hash is of another version of the code."""
    folder = parent / f"{stem}-{recipe_hash(recipe)}"
    if folder.exists():
        return folder
    others = sorted(path for path in parent.glob(f"{escape(stem)}-*") if path.name.rpartition("-")[0] == stem and run_state(path)[0] == "finished")
    return next((path for path in others if _is_run_of(path, recipe)), folder)


def _is_run_of(folder: Path, recipe: Recipe) -> bool:
    """Whether a run's record asks for this recipe. Keys that it did not know get today's defaults, values that it recorded stay.

    A default that changed since counts only where it decides what is learned (MAY_CHANGE): a buffer's size does not.
    """
    resolved = folder / "resolved.json"
    try:
        recorded = parse_recipe(json.loads(resolved.read_text(encoding="utf-8"))["recipe"], resolved=True) if resolved.is_file() else None
    except ValueError:  # a key that is gone: not today's recipe
        return False
    if recorded is None:
        return False
    wanted = recipe.model_dump(mode="json")
    chosen = {change.partition(": ")[0] for change in differences(Recipe().model_dump(mode="json"), wanted)}
    changed = {change.partition(": ")[0] for change in differences(recorded.model_dump(mode="json"), wanted)}
    return all(key.startswith(NOT_HASHED) or (key.startswith(MAY_CHANGE) and key not in chosen) for key in changed)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return "".join(letter if letter.isalnum() or letter in ".-+" else "-" for letter in text)[:24]


def run_state(folder: Path) -> tuple[str, str]:
    """(state, why) from status.json; ("missing", "") where the run never started."""
    path = folder / "status.json"
    if not path.is_file():
        return "missing", ""
    status = json.loads(path.read_text(encoding="utf-8"))
    return status.get("state", "missing"), status.get("why", "")


def run_fraction(job: Job) -> float:
    """How much of its budget or of its steps a run has spent, 0 to 1."""
    path = job.folder / "status.json"
    if not path.is_file():
        return 0.0
    status = json.loads(path.read_text(encoding="utf-8"))
    if status.get("state") == "finished":
        return 1.0
    last = last_line(job.folder / "metrics.jsonl")
    given = {key.removeprefix("prices."): value for key, value in job.overrides.items() if key.startswith("prices.")}
    devices = given.pop("devices", 1)
    return min(0.99, max(job.budget.share(last, Rates(**given), devices), last.get("step", 0) / max(1, status.get("steps", 1))))


def last_line(path: Path, tail: int = 1 << 16) -> Mapping[str, Any]:
    """The last complete JSON line of a growing file, or {}; reads its last `tail` bytes only."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tail))
        lines = file.read().split(b"\n")[:-1]
    try:
        return json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        return {}


def choose(comparison: Comparison, jobs: Sequence[Job]) -> dict[str, Tuned]:
    """For every arm the grid point with the highest mean dev score over the search's seeds (the earlier one on a tie);

    an empty point where every run of the search failed.
    """
    assert comparison.tune is not None
    chosen = {}
    for arm in dict.fromkeys(job.arm for job in jobs):
        mine = [job for job in jobs if job.arm == arm]
        trials = []
        for point in comparison.tune.points():
            runs = tuple(read_run(job.folder, arm=arm, seed=job.seed) for job in mine if job.point == point)
            trials.append(Trial(point=point, score=statistics.fmean(dev_score(run, comparison.tune.metric) for run in runs), runs=runs))
        best = max(trials, key=lambda trial: trial.score)
        runs = [run for trial in trials for run in trial.runs]
        chosen[arm] = Tuned(
            point=best.point if best.score > -math.inf else {},
            trials=tuple(trials),
            generated_tokens=sum(run.costs["tokens/student"] for run in runs),
            scored_tokens=sum(run.costs["tokens/teacher"] + run.costs["tokens/learner"] for run in runs),
            seconds=sum(run.costs["seconds/total"] for run in runs),
        )
    return chosen
