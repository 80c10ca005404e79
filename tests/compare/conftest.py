"""Makes the helper modules of this folder importable, in worker processes too; one fabricated comparison for all tests of the report."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fake_runs  # noqa: E402

from opd.comparison.config import load_comparison  # noqa: E402
from opd.comparison.jobs import choose, reported_jobs, tuning_jobs  # noqa: E402
from opd.comparison.report import write_report  # noqa: E402
from opd.comparison.results import read_run  # noqa: E402
from opd.comparison.summary import summarise  # noqa: E402


def do(jobs):
    for job in jobs:
        if (job.arm, job.seed) == ("sft", 2):
            continue
        (fake_runs.fake_evaluate if job.by == "evaluate" else fake_runs.fake_train)(job.recipe, job.overrides, job.folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(summary, page) of 7 arms x 3 seeds with a search, of which one run is missing."""
    root = tmp_path_factory.mktemp("fake")
    comparison = load_comparison(
        str(fake_runs.comparison_yaml(root / "in", fake_runs.ARMS, tokens=60_000)),
        {"tune": {"grid": {"optimizer.lr": [1e-4, 3e-4]}}, "target": 0.6},
    )
    searches = tuning_jobs(comparison, root)
    do(searches)
    tuned = choose(comparison, searches)
    jobs = reported_jobs(comparison, root, {arm: found.point for arm, found in tuned.items()})
    do(jobs)
    summary = summarise(comparison, [read_run(job.folder, arm=job.arm, seed=job.seed) for job in jobs], tuned)
    return summary, write_report(root / comparison.name, summary)
