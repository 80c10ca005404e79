"""The step of opd/loop.py while the student already answers the next ones. Read opd/loop.py first: the differences are all that is here.

With max_staleness 1 the student writes the answers of step t + 1 with the weights that step t starts from, while step t learns. An answer is
then one version old when the learner reads it, and each token carries the version that drew it (Completion.versions). With 0 this is opd.loop.
"""

from dataclasses import dataclass, replace

from opd.ahead import Ahead
from opd.errors import Preempted
from opd.loop import Run, System
from opd.objective import join
from opd.types import Sample, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Asynchrony:
    """max_staleness: versions that an answer may be older than the learner that reads it. in_flight: new weights reach unfinished answers too."""

    max_staleness: int
    in_flight: bool = False


def train_step(step: int, last: int, s: System, ahead: Ahead, how: Asynchrony) -> tuple[StepReport, list[Sample]]:
    """One round of the method, on answers that were begun up to `max_staleness` steps ago; begins those of the next steps, up to `last`."""
    objective = s.objective.at(step, s.last)
    with s.clock("rollout"):
        ahead.ready(step)  # the learner is idle here; so is the student afterwards, unless it is further ahead
    sync(s, ahead)
    for coming in range(step, min(step + how.max_staleness, last) + 1):
        ahead.begin(coming, s.last)
    with s.clock("rollout"):
        judged = ahead.collect_fresh(step, s.last, s.learner.version, how.max_staleness)  # what is too old is dropped and counted
    with s.clock("views"):
        views = s.view(judged, objective.controls)
    with s.clock("prepare"):
        prepared = s.learner.prepare(judged, objective.needs)  # old log-probs are of these weights: p_old / p_engine corrects for age
    with s.clock("teacher"):
        scores = s.teachers.score(judged, views, prepared, objective.needs.signals)  # now: one version of every teacher a step
    with s.clock("join"):
        samples = join(judged, prepared, scores, objective, s.ranks.pool, views=views)
    with s.clock("learn"):
        report = s.learner.step(samples, objective, s.teachers.heads())
    if how.in_flight:
        sync(s, ahead)  # answers that are being written go on with the new weights
    meters = {**s.ranks.summed({**ahead.meters(), **s.view.meters(), **s.teachers.meters()}), **report.meters}
    s.last.update({name: meter.mean for name, meter in meters.items()})
    return replace(report, step=step, meters=meters, seconds={**s.clock.seconds(), "rollout/ahead": ahead.seconds, **report.seconds}), samples


def sync(s: System, ahead: Ahead) -> None:
    """The newest weights to the student, once a version. An engine that is writing takes them for its next call, or in flight."""
    if ahead.loaded != s.learner.version:
        with s.clock("sync"):
            s.student.load_weights(s.learner.weights(s.learner.version))
        ahead.loaded = s.learner.version


def train(s: System, ahead: Ahead, run: Run, steps: int, how: Asynchrony) -> str:
    """opd.loop.train; before an evaluation or a checkpoint it waits for answers in flight, so that a resume finds them finished."""
    step = run.restore(s)
    try:
        if run.due("evaluation", step):
            run.evaluate(step, s)
        while step < steps and not run.exhausted():
            report, samples = train_step(step, steps - 1, s, ahead, how)
            step += 1
            if run.due("checkpoint", step) or run.due("evaluation", step):
                settle(s, ahead)
            run.record(report, samples, s)
            if run.due("evaluation", step):
                sync(s, ahead)
                run.evaluate(step, s)
            if run.due("checkpoint", step):
                run.checkpoint(step, s)
    except (Preempted, ValueError):
        if s.clock.safe:
            run.checkpoint(step, s)
        raise
    settle(s, ahead)
    sync(s, ahead)
    run.checkpoint(step, s)
    return run.exhausted() or f"all {steps} steps done"


def settle(s: System, ahead: Ahead) -> None:
    """Wait for every answer in flight; as in "sync", nothing may stop the run between a step and its record."""
    with s.clock("sync"):
        ahead.settle()
    s.clock.seconds()
