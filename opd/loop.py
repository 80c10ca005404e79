"""The training step, and the loop around it. Read this file first.

One step: prompts -> student answers -> verdicts -> privileged views -> teacher scores -> samples -> learner -> new weights.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from opd_kernels import HeadView
from opd_rollout.engine import Engine
from opd_rollout.types import TokenScores
from torch import Tensor

from opd.errors import Preempted
from opd.learner.types import Learner
from opd.objective import Objective, join
from opd.types import Judged, Meter, Prepared, Sample, StepReport

Views = Mapping[str, Sequence[tuple[int, ...] | None]]  # signal name -> a context an answer, None where there is nothing to show


class RolloutSource(Protocol):
    """Answers and verdicts for a step; everything about prompts, filters, refills and mixtures lives behind it."""

    def collect(self, step: int, metrics: Mapping[str, float]) -> list[Judged]: ...

    def meters(self) -> Mapping[str, Meter]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


class TeacherScorer(Protocol):
    """Every signal's log-probs of the student's own tokens."""

    def score(
        self, judged: Sequence[Judged], views: Views, prepared: Sequence[Prepared | None], only: Collection[str]
    ) -> list[Mapping[str, TokenScores]]: ...

    def heads(self) -> Mapping[str, HeadView]: ...

    def meters(self) -> Mapping[str, Meter]: ...


class Viewer(Protocol):
    """What each signal may see and the student may not."""

    def __call__(self, judged: Sequence[Judged], controls: Mapping[str, float]) -> Views: ...

    def meters(self) -> Mapping[str, Meter]: ...


class Ranks(Protocol):
    """What the ranks of a distributed learner agree on; each owns whole groups, so credit needs none of it."""

    def pool(self, values: Tensor) -> Tensor: ...

    def summed(self, meters: Mapping[str, Meter]) -> Mapping[str, Meter]: ...


class Clock(Protocol):
    """Times a phase, publishes its name, and raises Preempted in one after a request to stop (except while weights change).

    safe: what happened since the last recorded step may be thrown away.
    """

    @property
    def safe(self) -> bool: ...

    def __call__(self, phase: str) -> AbstractContextManager[None]: ...

    def seconds(self) -> Mapping[str, float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """All the parts of a run, wired by `opd.build.system`. `last` holds the previous step's metrics for closed-loop schedules."""

    source: RolloutSource
    view: Viewer
    teachers: TeacherScorer
    objective: Objective
    learner: Learner
    student: Engine
    clock: Clock
    ranks: Ranks
    last: dict[str, float]


def train_step(step: int, s: System) -> tuple[StepReport, list[Sample]]:
    """One round of the method: returns what it did and the samples it learned from."""
    objective = s.objective.at(step, s.last)  # every schedule as the number that it gives now
    with s.clock("rollout"):
        judged = s.source.collect(step, s.last)  # the student answers, the verifier judges (filter, refill and mixtures live here)
    with s.clock("views"):
        views = s.view(judged, objective.controls)  # what each signal may see and the student may not
    with s.clock("prepare"):
        prepared = s.learner.prepare(judged, objective.needs)  # only what a term asks for: old log-probs, student top-k, entropy
    with s.clock("teacher"):
        scores = s.teachers.score(judged, views, prepared, objective.needs.signals)  # every signal's log-probs of the student's own tokens
    with s.clock("join"):
        samples = join(judged, prepared, scores, objective, s.ranks.pool, views=views)  # credit, routes and scores: one record an answer
    with s.clock("learn"):
        report = s.learner.step(samples, objective, s.teachers.heads())
    with s.clock("sync"):
        s.student.load_weights(s.learner.weights(s.learner.version))  # the new student speaks next
    meters = {**s.ranks.summed({**s.source.meters(), **s.view.meters(), **s.teachers.meters()}), **report.meters}
    s.last.update({name: meter.mean for name, meter in meters.items()})
    return replace(report, step=step, meters=meters, seconds={**s.clock.seconds(), **report.seconds}), samples


class Run(Protocol):
    """The run folder's side of training: where it stands, what is recorded, when to stop."""

    def restore(self, s: System) -> int: ...

    def evaluate(self, step: int, s: System) -> None: ...

    def record(self, report: StepReport, samples: Sequence[Sample], s: System) -> None: ...

    def checkpoint(self, step: int, s: System) -> None: ...

    def due(self, what: str, step: int) -> bool: ...

    def exhausted(self) -> str: ...


def train(s: System, run: Run, steps: int) -> str:
    """Train until `steps` or a stop rule; returns why it stopped. A rerun continues after the newest checkpoint.

    On a request to stop, or a mistake in the input that only shows now, the last whole step is saved before the exception goes on.
    """
    step = run.restore(s)
    try:
        if run.due("evaluation", step):  # of the untrained student, or the one that an interruption left out
            run.evaluate(step, s)
        while step < steps and not run.exhausted():
            report, samples = train_step(step, s)
            step += 1
            run.record(report, samples, s)
            if run.due("evaluation", step):
                run.evaluate(step, s)
            if run.due("checkpoint", step):
                run.checkpoint(step, s)
    except (Preempted, ValueError):
        if s.clock.safe:
            run.checkpoint(step, s)
        raise
    run.checkpoint(step, s)
    return run.exhausted() or f"all {steps} steps done"
