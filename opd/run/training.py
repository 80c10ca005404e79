"""One training run in its folder: resume, records, evaluations, checkpoints, stop rules."""

import json
import math
import pickle
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from opd_rollout.engine import Engine

from opd.ahead import agreed, of_rank
from opd.errors import TooManySkipped
from opd.launcher.ranks import ALONE, Ranks
from opd.loop import System
from opd.randomness import generator_state, set_generator_state
from opd.run.folder import append_line, checkpoint_step, checkpoints, keep_lines, prune_checkpoints, read_lines, save_checkpoint, write_json
from opd.run.live import LiveView, Reports
from opd.run.spending import Rates, from_totals, role_seconds, used_up
from opd.types import Sample, StepReport

ACCUMULATED = ("tokens/student", "tokens/written", "tokens/teacher", "tokens/learner")  # meters whose sums grow over the run
COUNTERS = (*ACCUMULATED, "tokens/evaluation", "seconds/total", "updates/skipped_total")


class Sink(Protocol):
    """A second home for metrics; `run_id` survives a resume so that one curve stays one curve."""

    run_id: str

    def log(self, row: Mapping[str, float], step: int) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def summarise(self, values: Mapping[str, float]) -> None: ...

    def finish(self, failed: bool) -> None: ...


class NoSink:
    """Takes everything and keeps nothing."""

    run_id = ""

    def log(self, row: Mapping[str, float], step: int) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def summarise(self, values: Mapping[str, float]) -> None: ...

    def finish(self, failed: bool) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """When a run evaluates, saves and stops; 0 switches a rule off. limits: by name of opd.run.spending.QUANTITIES."""

    steps: int
    evaluate_every: int
    evaluate_first: bool
    checkpoint_every: int
    keep: int
    keep_best: bool
    samples_every: int
    max_skipped: int
    limits: Mapping[str, float]
    rates: Rates
    devices: int


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers besides learner and source."""

    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))
    role_seconds: dict[str, float] = field(default_factory=dict)
    best: float = -1.0
    best_step: int | None = None
    evaluated_step: int | None = None
    skipped_in_a_row: int = 0
    saved_step: int | None = None
    guard: dict[str, Any] = field(default_factory=dict)  # see opd.guard.action


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What a resume needs besides the weights, as it was after the last whole step (a step that was broken off has moved on)."""

    source: Mapping[str, Any]
    last: Mapping[str, float]
    generators: Mapping[str, Any]


def averaged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name -> mean over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.fmean(row[name] for row in rows if name in row) for name in names}


def read_checkpoint(folder: Path, s: System, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Bring learner, student, source, metrics and generators to where a checkpoint was taken; returns the rest of its state.

    Raises ValueError where its files cannot be read.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        s.learner.load(folder / "learner")
    except (OSError, RuntimeError, EOFError, KeyError, AssertionError, pickle.UnpicklingError, json.JSONDecodeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"checkpoint {folder} cannot be read ({reason}); delete that folder to resume from the one before it") from error
    s.source.load_state(of_rank([state["source"], *state["other_sources"]], ranks.rank, ranks.count))
    s.last.update(state["last"])
    s.student.load_weights(s.learner.weights(s.learner.version))
    if ranks.rank < len(state["generators"]):  # else written by fewer ranks: the others keep those that they started with
        set_generator_state(state["generators"][ranks.rank])
    return state


class Guard(Protocol):
    """Watches the run and may act on it; see opd.guard.action."""

    def restore(self, run: "TrainingRun", s: System) -> None: ...

    def vitals(self, samples: Sequence[Sample], s: System) -> Mapping[str, float]: ...

    def evaluated(self, row: Mapping[str, Any]) -> None: ...

    def judge(self, row: Mapping[str, Any], s: System, run: "TrainingRun") -> None: ...


class TrainingRun:
    """Implements opd.loop.Run over a folder. Every rank has one and they agree on everything; the one that leads writes and tracks.

    `evaluate_dev(step, engine)` returns the line of eval.jsonl; `write_samples(path, step, samples)` returns table rows;
    `save_tokenizer(folder)` completes a checkpoint's model/.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        status: Reports,
        view: LiveView,
        ranks: Ranks = ALONE,
        open_sink: Callable[[str], Sink],
        evaluate_dev: Callable[[int, Engine], Mapping[str, Any]] | None,
        write_samples: Callable[[Path, int, Sequence[Sample]], Sequence[Sequence[Any]]],
        save_tokenizer: Callable[[Path], None],
        guard: Guard | None = None,
        freeze: Callable[[StepReport, Sequence[Sample]], Any] | None = None,
        measure: Callable[[StepReport, Sequence[Sample]], Any] | None = None,
    ) -> None:
        self.folder, self.plan, self.status, self.view = folder, plan, status, view
        self.guard, self.ranks, self._freeze, self._measure = guard, ranks, freeze, measure
        self.progress, self.sink, self._cut = Progress(), NoSink(), Cut(source={}, last={}, generators={})
        self._open_sink, self._evaluate_dev, self._write_samples, self._save_tokenizer = open_sink, evaluate_dev, write_samples, save_tokenizer

    def restore(self, s: System) -> int:
        """Load the newest complete checkpoint, if any, and drop records of later steps; returns the step to go on from."""
        found = self.ranks.first(checkpoints(self.folder))
        for damaged in sorted(set((self.folder / "checkpoints").glob("step-*")) - set(found)):
            self.view.say(f"{damaged} is incomplete and left out")
        step = self._load(found[-1], s) if found else 0
        if self.ranks.leads:
            self._drop_later(step, bool(found))
            tracking = self.folder / "tracking.json"
            self.sink = self._open_sink(json.loads(tracking.read_text())["run_id"] if tracking.is_file() else "")
            if self.sink.run_id:
                write_json(tracking, {"run_id": self.sink.run_id})
        if self.guard:
            self.ranks.wait()  # for the records to be as they were
            self.guard.restore(self, s)
        self._remember(s)
        self._report(step, s)
        self.view.start_at(step)
        return step

    def _drop_later(self, step: int, resumed: bool) -> None:
        evaluated = self.progress.evaluated_step
        for name in ("metrics.jsonl", "guard.jsonl", LEDGER):
            keep_lines(self.folder / name, lambda row: row["step"] <= step and resumed)
        keep_lines(self.folder / "eval.jsonl", lambda row: resumed and (row["step"] < step or row["step"] == evaluated or row["split"] == "test"))

    def _report(self, step: int, s: System) -> None:
        self.status.step(step)
        self.status.facts(version=s.learner.version, next=upcoming(self.plan, step, self._evaluate_dev is not None))

    def _load(self, folder: Path, s: System) -> int:
        state = read_checkpoint(folder, s, self.ranks)
        self.progress = Progress(**state["progress"])
        self.progress.totals = {**dict.fromkeys(COUNTERS, 0.0), **self.progress.totals}  # of an older version, which had fewer
        self.view.say(f"resumed after step {checkpoint_step(folder)} from {folder}")
        return checkpoint_step(folder)

    def _remember(self, s: System) -> None:
        self._cut = Cut(source=s.source.state(), last=dict(s.last), generators=generator_state())

    def due(self, what: str, step: int) -> bool:
        """Whether "evaluation" or "checkpoint" is due after `step`; an evaluation that was done before a resume is not."""
        if what == "evaluation":
            every = self.plan.evaluate_every
            wanted = self.plan.evaluate_first if step == 0 else self._is_last(step) or bool(every) and step % every == 0
            return wanted and self._evaluate_dev is not None and self.progress.evaluated_step != step
        every = self.plan.checkpoint_every
        return bool(every) and step % every == 0 or (self.plan.keep_best and self.progress.best_step == step)

    def _is_last(self, step: int) -> bool:
        return step == self.plan.steps or bool(self.exhausted())

    def evaluate(self, step: int, s: System) -> None:
        """Accuracy on the dev split; a new best is remembered and checkpointed."""
        assert self._evaluate_dev is not None
        with s.clock("evaluate"):
            row = self._evaluate_dev(step, s.student)
        s.clock.seconds()  # evaluation does not count as training time
        self.progress.totals["tokens/evaluation"] += row["tokens"]
        self.progress.evaluated_step = step
        if row["avg@k"] is None:
            self.view.say(f"step {step}: dev has no accuracy: none of {row['unjudged']} answers was judged (the verifier abstained or failed)")
        else:
            self._dev_accuracy(step, float(row["avg@k"]), s)
        if self.progress.saved_step == step:
            self.progress.saved_step = None  # a checkpoint from before this evaluation does not know of it
        if self.guard:
            self.guard.evaluated(row)
        self._remember(s)

    def _dev_accuracy(self, step: int, accuracy: float, s: System) -> None:
        s.last["eval/dev"] = accuracy
        self.sink.log({"eval/dev": accuracy}, step)
        if accuracy > self.progress.best and step > 0:
            self.progress.best, self.progress.best_step = accuracy, step

    def record(self, report: StepReport, samples: Sequence[Sample], s: System) -> None:
        """One line of metrics, the live view, and now and then a file of samples."""
        step, totals = report.step + 1, self.progress.totals
        if self._measure:
            self._measure(report, samples)
        samples = [sample for sample in samples if not sample.context]  # each answer once
        of_ranks = self.ranks.gather((report.seconds, list(dict.fromkeys(sample.judged.prompt.id for sample in samples))))
        report = replace(report, seconds=of_ranks[0][0])  # budgets are counted by one clock
        means = {name: meter.mean for name, meter in report.meters.items() if name not in ACCUMULATED and math.isfinite(meter.mean)}
        if means.get("learner/replays"):
            budget = means["learner/token_budget"]
            self.view.say(f"step {step}: out of memory; micro-batches of at most {budget:.0f} tokens from now on, the minibatch was replayed")
        tokens = {name: report.meters[name].sum if name in report.meters else 0.0 for name in ACCUMULATED}
        totals.update({name: totals[name] + tokens[name] for name in ACCUMULATED})
        for role, busy in role_seconds(report.seconds).items():
            self.progress.role_seconds[role] = self.progress.role_seconds.get(role, 0.0) + busy
        taken = sum(value for phase, value in report.seconds.items() if "/" not in phase)  # a phase counts its parts
        totals["seconds/total"] += taken
        totals["updates/skipped_total"] += report.meters["updates/skipped"].sum if "updates/skipped" in report.meters else 0.0
        row = {**means, **totals, **{f"seconds/{phase}": value for phase, value in report.seconds.items()}, "seconds/step": taken}
        row["rate/tokens"] = tokens["tokens/student"] / taken if taken else 0.0
        if self.guard:
            started = time.perf_counter()  # not the clock: nothing may stop the run between the step and its record
            row |= averaged(self.ranks.gather(self.guard.vitals(samples, s)))
            row["seconds/guard"] = time.perf_counter() - started
        if self.ranks.leads:
            append_line(self.folder / "metrics.jsonl", {"step": step, "version": report.version, "skipped": report.skipped, **row})
            state = s.source.state()
            drawn = state.get("taken", state).get("stream", {}).get("cursor")  # ahead of the learner: as it was after these answers
            prompts = [name for _, names in of_ranks for name in names]
            append_line(self.folder / LEDGER, {"step": step, "drawn": drawn, "prompts": prompts, "tokens": step_tokens(tokens)})
        self.sink.log(row, step)
        self._remember(s)
        self.status.facts(tokens_per_second=round(row["rate/tokens"], 1))
        self._report(step, s)
        self.view.update(step, {**s.last, **row})
        every = self.plan.samples_every
        if self.ranks.leads and ((every and step % every == 0) or self._is_last(step)):
            rows = self._write_samples(self.folder / "samples" / f"step-{step:06d}.jsonl", step, samples)
            if rows:
                self.sink.table("samples", SAMPLE_COLUMNS, rows, step)
                self.sink.table("tokens", TOKEN_COLUMNS, token_rows(read_lines(self.folder / "samples" / f"step-{step:06d}.jsonl")), step)
        if self._freeze:
            self._freeze(report, samples)
        self._count_skipped(report)
        if self.guard:
            with s.clock("guard"):  # a phase in which stopping is safe
                self.guard.judge({"step": step, **row}, s, self)
            s.clock.seconds()
            self._remember(s)

    def _count_skipped(self, report: StepReport) -> None:
        if not report.skipped:
            self.progress.skipped_in_a_row = 0
            return
        self.progress.skipped_in_a_row += 1
        self.view.say(f"step {report.step + 1}: no update, {report.skipped}")
        if self.progress.skipped_in_a_row > self.plan.max_skipped:
            raise TooManySkipped(
                f"{self.progress.skipped_in_a_row} steps in a row had a refused update ({report.skipped}); the last good checkpoint stays in "
                f"{self.folder / 'checkpoints'}. Lower optimizer.lr, or look at samples/ and metrics.jsonl."
            )

    def checkpoint(self, step: int, s: System) -> None:
        """Save everything that a resume needs after the last whole step, once a step."""
        if self.progress.saved_step == step or step == 0:
            return
        self.progress.saved_step = step
        cut = self._cut
        set_generator_state(cut.generators)

        ranks = self.ranks
        generators = ranks.gather(cut.generators)
        source, *others = agreed(ranks.gather(cut.source))

        def write(scratch: Path) -> None:
            s.learner.save(scratch / "learner")
            s.learner.export(scratch / "model")
            if ranks.leads:
                self._save_tokenizer(scratch / "model")
                state = {"source": source, "other_sources": others, "last": cut.last, "generators": generators}
                write_json(scratch / "state.json", {**state, "progress": _as_dict(self.progress), "step": step})

        with s.clock("checkpoint"):
            save_checkpoint(self.folder, step, write, leads=ranks.leads, wait=ranks.wait)
            if ranks.leads:
                prune_checkpoints(self.folder, self.plan.keep, self.progress.best_step if self.plan.keep_best else None)
        self.status.facts(saved=step)
        s.clock.seconds()

    def exhausted(self) -> str:
        """Which stop rule has fired, or ""."""
        plan, progress = self.plan, self.progress
        return used_up(plan.limits, from_totals(progress.totals, progress.role_seconds, plan.devices), plan.rates)


def step_tokens(tokens: Mapping[str, float]) -> dict[str, int]:
    """One step's tokens by who handled them: those of answers (student) and of texts about answers (auxiliary) apart."""
    found = from_totals(tokens, {}, 1)
    return {name: round(getattr(found, name)) for name in ("student", "auxiliary", "teacher", "learner")}


def upcoming(plan: Plan, step: int, evaluates: bool) -> str:
    """What comes after the steps that follow: the nearest evaluation, checkpoint or end."""
    every = {"evaluation": plan.evaluate_every if evaluates else 0, "checkpoint": plan.checkpoint_every}
    due = {name: min((step // number + 1) * number, plan.steps) for name, number in every.items() if number}
    nearest = min(due.values(), default=plan.steps)
    names = [name for name, at in due.items() if at == nearest] + (["end of training"] if nearest == plan.steps else [])
    return f"{' and '.join(names)} after step {nearest}" if step < plan.steps else "final evaluation"


LEDGER = "ledger.jsonl"  # a line a step: prompts drawn so far, those whose answers this step learned from, and this step's tokens
SAMPLE_COLUMNS = ("prompt", "completion", "reward", "correct", "finish")
TOKEN_COLUMNS = ("prompt_id", "sample", "position", "token", "student_logp", "entropy", "gap", "advantage", "loss")


def token_rows(records: Iterable[Mapping[str, Any]], most: int = 4) -> list[list[Any]]:
    """A row a token of the first `most` records of a samples file; gap: first teacher's log-prob minus the student's; None where not known."""
    rows = []
    for record in islice(records, most):
        teacher = next((signal["logp"] for signal in record["signals"].values()), None)
        advantage = next(iter(record["advantage"].values()), None)
        loss = record["columns"].get("loss/total")
        for n, token in enumerate(record["tokens"]):
            logp = record["student_logp"][n]
            gap = None if teacher is None or teacher[n] is None or logp is None else round(teacher[n] - logp, 4)
            known = [None if values is None else values[n] for values in (record["entropy"], advantage, loss)]
            rows.append([record["prompt_id"], record["member"], n, token, logp, known[0], gap, known[1], known[2]])
    return rows


def _as_dict(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in Progress.__slots__}
