"""A comparison from its file to its report: search, reported runs, report. Running it again does only what is missing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.comparison.config import Comparison, load_comparison
from opd.comparison.jobs import Job, Tuned, choose, reported_jobs, tuning_jobs
from opd.comparison.progress import ComparisonView
from opd.comparison.report import write_report
from opd.comparison.results import RunResult, read_run
from opd.comparison.summary import summarise
from opd.comparison.table import print_table
from opd.comparison.workers import Functions, Outcome, run_jobs
from opd.errors import Preempted
from opd.run.folder import write_json
from opd.stop import StopRequest, stop_signals


def compare(
    reference: str | Mapping[str, Any] | Comparison,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    functions: Functions,
    root: Path = Path("runs"),
    quiet: bool = False,
) -> Path:
    """Run what is missing, reuse what is finished, write root/<name>/report.html and return its path.

    A failing run is reported and the others go on. Raises ValueError for a mistake in the comparison before any work, Preempted when
    asked to stop (running runs save first; the same call goes on).
    """
    comparison = reference if isinstance(reference, Comparison) else load_comparison(reference, overrides)
    searches = tuning_jobs(comparison, root)
    planned = reported_jobs(comparison, root, {})
    view = ComparisonView(comparison.name, len(searches) + len(planned), quiet=quiet)
    stop = StopRequest()
    try:
        with stop_signals(stop):
            outcomes = _run(searches, comparison, functions, root, view, stop)
            tuned = choose(comparison, searches) if searches else {}
            jobs = reported_jobs(comparison, root, {arm: found.point for arm, found in tuned.items()})
            outcomes += _run(jobs, comparison, functions, root, view, stop)
    finally:
        view.close()
    reasons = {outcome.job.folder: outcome.why for outcome in outcomes if outcome.state == "failed"}
    summary = summarise(comparison, read_results(jobs, reasons), tuned)
    _record(root / comparison.name, comparison, outcomes, tuned)
    report = write_report(root / comparison.name, summary)
    if not quiet:
        print_table(summary, report)
    return report


def rebuild(reference: str | Mapping[str, Any] | Comparison, *, root: Path = Path("runs")) -> Path:
    """Write the report again from the run folders that exist, without running anything."""
    comparison = reference if isinstance(reference, Comparison) else load_comparison(reference)
    searches = tuning_jobs(comparison, root)
    tuned = choose(comparison, searches) if searches else {}
    jobs = reported_jobs(comparison, root, {arm: found.point for arm, found in tuned.items()})
    record = root / comparison.name / "comparison.json"
    rows = json.loads(record.read_text(encoding="utf-8"))["runs"] if record.is_file() else []
    reasons = {record.parent / row["folder"]: row["why"] for row in rows if row["state"] == "failed"}
    return write_report(root / comparison.name, summarise(comparison, read_results(jobs, reasons), tuned))


def read_results(jobs: Sequence[Job], reasons: Mapping[Path, str]) -> list[RunResult]:
    """The reported runs as their folders say; a job that failed without leaving a status carries its reason (by run folder)."""
    results = []
    for job in jobs:
        run = read_run(job.folder, arm=job.arm, seed=job.seed)
        if job.folder in reasons and not run.finished:
            run = replace(run, state="failed", why=reasons[job.folder])
        results.append(run)
    return results


def _run(jobs: Sequence[Job], comparison: Comparison, functions: Functions, root: Path, view: ComparisonView, stop: StopRequest) -> list[Outcome]:
    outcomes = run_jobs(
        jobs,
        functions,
        workers=comparison.workers,
        limit_seconds=comparison.limit_seconds,
        logs=root / comparison.name / "logs",
        watcher=view,
        stopped=lambda: stop.reason,
    )
    if stop.reason:
        raise Preempted(stop.reason)
    return outcomes


def _record(folder: Path, comparison: Comparison, outcomes: Sequence[Outcome], tuned: Mapping[str, Tuned]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "arm": outcome.job.arm,
            "seed": outcome.job.seed,
            "tuning": outcome.job.tuning,
            "point": dict(outcome.job.point),
            "folder": str(outcome.job.folder.relative_to(folder) if outcome.job.folder.is_relative_to(folder) else outcome.job.folder.resolve()),
            "state": outcome.state,
            "why": outcome.why,
        }
        for outcome in outcomes
    ]
    chosen = {arm: dict(found.point) for arm, found in tuned.items()}
    write_json(folder / "comparison.json", {"comparison": comparison.model_dump(mode="json"), "chosen": chosen, "runs": rows})
