"""Guard rails in a run: what the rules see of each step, and what is done when one speaks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from opd.errors import Paused
from opd.guard.rules import Alarm, Rule, Watch
from opd.guard.vitals import text_vitals
from opd.loop import System
from opd.run.folder import append_line, checkpoint_step, checkpoints, read_lines
from opd.run.training import TrainingRun
from opd.types import Sample

GOOD_FOR = 10  # a checkpoint counts as good when it is at least so many steps older than the alarm: rules look at ten steps


class RunGuard:
    """Implements opd.run.training.Guard. What a resume needs is in the run's progress: which rules hold, what was rolled back, the rate's factor."""

    def __init__(self, rules: Mapping[str, tuple[str, Rule]], *, answers: int, ngram: int, rate_factor: float, max_roll_backs: int) -> None:
        self._watch, self._answers, self._ngram = Watch(rules=rules), answers, ngram
        self._rate_factor, self._max_roll_backs = rate_factor, max_roll_backs
        self._rolled_back: list[list[int]] = []  # [after this step, up to this one]

    def restore(self, run: TrainingRun, s: System) -> None:
        """Read the history from the run's records, and go on with what its progress remembers."""
        state = run.progress.guard
        self._rolled_back = [list(pair) for pair in state.get("rolled_back", [])]
        self._watch.holding = dict(state.get("holding", {}))
        self._watch.steps = [row for row in read_lines(run.folder / "metrics.jsonl") if self._counts(row)]
        self._watch.evals = [row for row in read_lines(run.folder / "eval.jsonl") if row["split"] == "dev" and self._counts(row)]
        s.learner.rate_scale = self._rate_factor ** len(self._rolled_back)

    def _counts(self, row: Mapping[str, Any]) -> bool:
        return not any(after < row["step"] <= until for after, until in self._rolled_back)

    def vitals(self, samples: Sequence[Sample], s: System) -> Mapping[str, float]:
        """Metrics text/... of the step's answers."""
        prefix = "schedule/controllers/"
        given = {name.removeprefix(prefix): value for name, value in s.last.items() if name.startswith(prefix)}
        shown = partial(s.view, controls=given) if given else s.view  # as in this step
        return text_vitals([sample.judged for sample in samples], shown, answers=self._answers, ngram=self._ngram)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """A dev evaluation; rules see it with the next step."""
        self._watch.evals.append(row)

    def judge(self, row: Mapping[str, Any], s: System, run: TrainingRun) -> None:
        """Ask every rule; write, show and send what they say; act on the most severe. Raises Paused where the run should stop."""
        self._watch.steps.append(row)
        alarms = self._watch.look(row["step"])
        run.progress.guard = {"holding": dict(self._watch.holding), "rolled_back": self._rolled_back}
        for alarm in alarms:
            self._write(run, asdict(alarm))
            run.view.say(f"step {alarm.step}: guard rail {alarm.rule} ({alarm.action}): {alarm.message}")
            run.sink.alert(f"{run.folder.name}: {alarm.rule}", f"step {alarm.step}: {alarm.message}")
        if alarms and alarms[0].action == "roll_back":
            self._roll_back(alarms[0], s, run)
        elif alarms and alarms[0].action == "pause":
            raise Paused(f"guard rail {alarms[0].rule} at step {alarms[0].step}: {alarms[0].message}")

    @staticmethod
    def _write(run: TrainingRun, line: Mapping[str, Any]) -> None:
        if run.ranks.leads:
            append_line(run.folder / "guard.jsonl", line)

    def _roll_back(self, alarm: Alarm, s: System, run: TrainingRun) -> None:
        """Weights, optimiser and average of the last good checkpoint, a lower rate, and the questions that come next."""
        good = run.ranks.first(last_good(run.folder, alarm.step))
        if good is None or len(self._rolled_back) >= self._max_roll_backs:
            why = "no checkpoint is old enough to be good" if good is None else f"{len(self._rolled_back)} roll backs did not help"
            raise Paused(f"guard rail {alarm.rule} at step {alarm.step}: {alarm.message}; {why}")
        s.learner.load(good / "learner")
        s.student.load_weights(s.learner.weights(s.learner.version))
        to = checkpoint_step(good)
        self._rolled_back.append([to, alarm.step])
        self._watch.forget(to)
        s.learner.rate_scale = self._rate_factor ** len(self._rolled_back)
        run.progress.guard = {"holding": {}, "rolled_back": self._rolled_back}
        self._write(run, {"step": alarm.step, "rule": alarm.rule, "action": "rolled_back", "to": to})
        run.view.say(f"step {alarm.step}: the weights are those of step {to} again, the learning rate is x {s.learner.rate_scale:g}")


def last_good(folder: Path, step: int) -> Path | None:
    """The newest complete checkpoint that is old enough for no rule to have looked at what went wrong since."""
    found = [path for path in checkpoints(folder) if checkpoint_step(path) <= step - GOOD_FOR]
    return found[-1] if found else None
