"""Training, as a function. `opd.examination` evaluates; `opd.reports` reads run folders."""

import contextlib
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from opd_rollout.engine import Engine, EngineLost

from opd import loop_async
from opd.ahead import Ahead
from opd.build.audit import audit_engine
from opd.build.devices import device_facts, with_chunk_bytes
from opd.build.spending import num_devices, rates_of
from opd.build.system import Parts, actors_of, build_parts, check_tracking, input_facts, is_sharded, open_sink, parse_weights
from opd.build.views import template_notes
from opd.config.load import load_recipe, refuse_method
from opd.config.recipe import Recipe
from opd.config.stages import read_stages
from opd.errors import Paused, RunFailed
from opd.eval import Codec, EvalResult, EvalSettings, decoding_name, final_results, write_evaluation
from opd.eval import evaluate as evaluate_problems
from opd.examination.run import EVALUATION_SEED
from opd.guard.action import RunGuard
from opd.guard.rules import parse_rules
from opd.launcher.driver import refuse_other_launchers, train_stages, wants_launcher
from opd.launcher.ranks import ALONE, Ranks
from opd.launcher.script import refuse_unguarded_script
from opd.learner.memory import is_out_of_memory
from opd.loop import System
from opd.loop import train as train_loop
from opd.randomness import seed_generators
from opd.replaying.freezing import Recorder
from opd.run.folder import (
    check_chain,
    check_run,
    checkpoint_step,
    checkpoints,
    claimed,
    finished,
    free_mebibytes,
    is_disk_full,
    open_run,
    read_lines,
    run_folder,
    write_json,
)
from opd.run.heap import settled_heap
from opd.run.live import LiveView, PhaseClock, Reports, Status
from opd.run.roles import of_actors
from opd.run.training import Plan, TrainingRun
from opd.stop import StopRequest, stop_signals
from opd.text import chat
from opd.timing.ledger import read_ledger, write_ledger
from opd.timing.profile import Profile
from opd.types import Prompt
from opd.verify import final_answer
from opd.viewer.columns import ShownColumns
from opd.viewer.record import Readers, write_samples


def train(
    recipe: str | Recipe,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    folder: Path | None = None,
    *,
    verifier: Callable[..., Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Run a recipe to its end, or go on where it stopped; returns the run folder (the last one's, for a file with stages).

    verifier: fn(prompt, text) -> Verdict, number or bool, in the place of data.verifier. Raises ValueError with the fix for a mistake in
    the input before any work starts, Preempted when asked to stop (the state is saved), TooManySkipped when updates keep being refused.
    """
    refuse_other_launchers()
    if isinstance(recipe, str):
        refuse_method(recipe, overrides)
    stages = [recipe] if isinstance(recipe, Recipe) else read_stages(recipe, overrides)
    if any(stage.engine.kind == "process" for stage in stages):
        refuse_unguarded_script("engine=process")
    if any(wants_launcher(stage) for stage in stages):
        if verifier is not None or folder is not None:
            raise ValueError(
                "several ranks are processes of their own: name the verifier in the recipe, data.verifier={fn: module:name}, and the folder by name"
            )
        return train_stages(stages, recipe if isinstance(recipe, str) else "recipe", quiet=quiet)
    if len(stages) > 1:
        if folder:
            raise ValueError(f"{recipe} has stages, each with a folder of its own: train it without `folder`")
        check_chain(stages, str(recipe))
        return [train(stage, verifier=verifier, quiet=quiet) for stage in stages][-1]
    [resolved] = stages
    folder = folder or run_folder(resolved, recipe if isinstance(recipe, str) else "recipe")
    check_run(folder, resolved)
    if finished(folder, resolved.steps):
        if not quiet:
            print(f"{folder} is finished: nothing to do", file=sys.stderr)
        return folder
    check_tracking(resolved.track.wandb)
    _train_in(folder, resolved, verifier, quiet)
    return folder


def _train_in(folder: Path, recipe: Recipe, verifier: Callable[..., Any] | None, quiet: bool) -> None:
    """One process with everything in it."""
    stop = StopRequest(at_once=True)
    with stop_signals(stop):
        status = Status(folder / "status.json", recipe.steps)
        view = LiveView(folder.name, recipe.steps, quiet=quiet, roles=status.words)
        train_rank(folder, recipe, PhaseClock(status, stop), view, verifier)


def train_rank(
    folder: Path,
    recipe: Recipe,
    clock: PhaseClock,
    view: LiveView,
    verifier: Callable[..., Any] | None = None,
    actors: Mapping[str, Any] | None = None,
) -> str:
    """Build, check, then run as one of `clock.ranks`; up to `open_run` nothing is written. Returns why it ended.

    actors: where the launcher has started them, as rank 0 knows it.
    """
    ranks, status = clock.ranks, clock.status
    with contextlib.ExitStack() as held:
        held.callback(view.close)
        asked, recipe, existed = recipe, ranks.first(with_chunk_bytes(recipe, folder)), folder.is_dir()
        with ranks.announcing():
            if existed and ranks.leads:
                held.enter_context(claimed(folder))
        ranks.wait()
        seed_generators(recipe.seed)
        where = ranks.first(actors) or held.enter_context(actors_of(recipe))
        parts = build_parts(recipe, verifier=verifier, check=clock.check, ranks=ranks, actors=where)
        held.callback(parts.learner.close)
        held.callback(parts.engine.close)
        for note in parts.problems.notes:
            view.say(f"data: {note}")
        for note in template_notes(recipe, parts.tokenizer, {name: parse_weights(name, one.weights) for name, one in recipe.signals.items()}):
            view.say(f"template: {note}")
        audit_engine(recipe, parts, view)
        with ranks.announcing():
            if ranks.leads:
                open_run(folder, asked, facts(recipe, parts))
                if not existed:
                    held.enter_context(claimed(folder))
        ranks.wait()
        if ranks.rank:
            seed_generators(recipe.seed + ranks.rank)  # a verifier's dice fall differently on every rank
        profile = Profile(folder, recipe, parts, ranks, view.say) if recipe.profile.steps else None
        if profile:
            held.callback(profile.close)
            clock.around = profile.around
        system = make_system(parts, clock)
        if recipe.track.bundle_steps:
            system = replace(system, teachers=Recorder(parts, system.last, weights=True, wanted=lambda: status.coming in recipe.track.bundle_steps))
        run = make_run(recipe, folder, parts, status, view, ranks, system.teachers, profile)
        clock.stop.at_once = False
        watch_actors(status, parts)
        with settled_heap(), _recording(folder, run, view, status, ranks):
            reason = train_as_asked(recipe, system, run, clock)
            report_final(recipe, folder, parts, run, system, ranks)
            if ranks.leads:
                write_ledger(folder, read_ledger(folder))
            status.write("finished", reason)
            view.say(f"{folder}: {reason}")
            return reason


def watch_actors(status: Reports, parts: Parts) -> None:
    """What the student's and the teachers' actors do, for status.json and the terminal; nothing where there are none."""
    found = [getattr(parts.engine, "status", None), *(weights.actors for weights in parts.scorer.weights.values())]
    if read := [one for one in found if one]:
        status.watch("actors", lambda: of_actors(one() for one in read))


def train_as_asked(recipe: Recipe, system: System, run: TrainingRun, clock: PhaseClock) -> str:
    """One step after the other, or answers ahead of the learner; returns why it stopped."""
    if not recipe.asynchrony.max_staleness:
        return train_loop(system, run, recipe.steps)
    ahead = Ahead(system.source, clock.check, clock.ranks)
    clock.status.watch("batches", ahead.batches)
    how = loop_async.Asynchrony(max_staleness=recipe.asynchrony.max_staleness, in_flight=recipe.asynchrony.in_flight)
    try:
        return loop_async.train(replace(system, source=ahead), ahead, run, recipe.steps, how)
    except BaseException:
        system.student.close()  # ends what the thread waits for
        raise
    finally:
        ahead.close()


def train_run(recipe: str, overrides: Mapping[str, Any], folder: Path) -> Path:
    """One run of a comparison: quiet, and without W&B unless the comparison asks for it.

    A run that a guard rail pauses has failed, for nobody is there to look.
    """
    try:
        return train(recipe, {"track.wandb": "disabled", **overrides}, folder, quiet=True)
    except Paused as paused:
        raise RuntimeError(f"paused by {paused}") from paused


def evaluate_run(recipe: str, overrides: Mapping[str, Any], folder: Path) -> Path:
    """The recipe's student as it starts, examined on dev and test at every temperature of `eval.temperatures`."""
    resolved = load_recipe(recipe, {**overrides, "track.wandb": "disabled"})
    if finished(folder):
        return folder
    parts = build_parts(resolved)
    open_run(folder, resolved, facts(resolved, parts))
    status = Status(folder / "status.json", 0)
    (folder / "eval.jsonl").unlink(missing_ok=True)
    for split, prompts in (("dev", parts.problems.dev), ("test", parts.problems.test)):
        for temperature in resolved.eval.temperatures if prompts else ():
            write_evaluation(folder, examine(resolved, parts, parts.engine, split, prompts, temperature, resolved.eval.final_samples, 0))
    parts.learner.close()
    parts.engine.close()
    status.write("finished", "evaluated without training")
    return folder


def facts(recipe: Recipe, parts: Parts) -> dict[str, Any]:
    """What resolved.json adds to the recipe: what was chosen, and hashes of template and data."""
    return {
        **input_facts(recipe, parts.tokenizer),
        **device_facts(recipe),
        "verifier": getattr(parts.problems.verify, "__qualname__", type(parts.problems.verify).__name__),
        "allow": list(parts.objective.allowed),
        "num_parameters": parts.num_parameters,
        "devices": num_devices(recipe),
    }


def make_system(parts: Parts, clock: PhaseClock) -> System:
    """The parts as the loop sees them."""
    return System(
        source=parts.source, view=parts.views, teachers=parts.scorer, objective=parts.objective, learner=parts.learner,
        student=parts.engine, clock=clock, ranks=clock.ranks, last={},
    )  # fmt: skip


def make_run(
    recipe: Recipe, folder: Path, parts: Parts, status: Reports, view: LiveView, ranks: Ranks, teachers: Any = None, profile: Profile | None = None
) -> TrainingRun:
    """The run folder's side of the loop. teachers: the system's, which may record steps for bundles."""
    ev, ck, tr = recipe.eval, recipe.checkpoint, recipe.track
    plan = Plan(
        steps=recipe.steps, evaluate_every=ev.every, evaluate_first=ev.before, checkpoint_every=ck.every, keep=ck.keep, keep_best=ck.best,
        samples_every=tr.samples_every, max_skipped=recipe.learner.max_skipped, limits=recipe.budget.limits(),
        rates=rates_of(recipe), devices=num_devices(recipe),
    )  # fmt: skip

    def evaluate_dev(step: int, engine: Engine) -> Mapping[str, Any]:
        result = examine(recipe, parts, engine, "dev", parts.problems.dev, 1.0, ev.samples, step, ranks)
        if ranks.leads:
            write_evaluation(folder, result)
        return result.row

    shown = ShownColumns(tr.samples)
    parts.learner.observer = shown
    return TrainingRun(
        folder,
        plan,
        status=status,
        view=view,
        ranks=ranks,
        open_sink=partial(open_sink, recipe, folder),
        evaluate_dev=evaluate_dev if parts.problems.dev else None,
        write_samples=partial(
            write_samples, tokenizer=parts.tokenizer, num_samples=tr.samples, texts_in_table=tr.texts, contexts=parts.views,
            readers=readers(recipe, parts, ranks), columns=shown.of,
        ),
        save_tokenizer=parts.tokenizer.save_pretrained,
        guard=make_guard(recipe),
        freeze=partial(teachers.write, folder, recipe) if isinstance(teachers, Recorder) else None,
        measure=profile.step if profile else None,
    )


def make_guard(recipe: Recipe) -> RunGuard | None:
    """The recipe's guard rails; None where all are off."""
    g = recipe.guard
    rules = parse_rules(g.action, g.rules)
    if not rules:
        return None
    return RunGuard(rules, answers=g.answers, ngram=g.ngram, rate_factor=g.rate_factor, max_roll_backs=g.max_roll_backs)


def readers(recipe: Recipe, parts: Parts, ranks: Ranks) -> Readers:
    """Who fills in the top-k lists of a samples file; with several ranks only those who can score without the other ranks."""
    alone, own = ranks.count == 1, ("live", "ema", *(("frozen",) if recipe.model.lora else ()))  # frozen: the student without its adapters
    shared = {name for name, signal in recipe.signals.items() if parse_weights(name, signal.weights)[0] in own}
    teachers = {name: weights.scores for name, weights in parts.scorer.weights.items() if alone or name not in shared}
    return Readers(student=partial(parts.learner.teacher_pass, weights="live") if alone or not is_sharded(recipe) else None, teachers=teachers)


def examine(
    recipe: Recipe,
    parts: Parts,
    engine: Engine,
    split: str,
    prompts: Sequence[Prompt],
    temperature: float,
    samples: int,
    step: int,
    ranks: Ranks = ALONE,
) -> EvalResult:
    """One evaluation; the seed does not depend on the run's, so that all runs answer the same problems with the same noise."""
    settings = EvalSettings(
        suite=parts.problems.suite, split=split, samples=samples, temperature=temperature, max_tokens=recipe.sampling.max_tokens,
        stop_ids=parts.stop_ids, seed=EVALUATION_SEED,
    )  # fmt: skip
    codec = Codec(encode=parts.encode, decode=partial(chat.decode, parts.tokenizer), answer=final_answer)
    return evaluate_problems(engine, prompts, parts.problems.verify, codec, settings, step=step, ranks=ranks)



def report_final(recipe: Recipe, folder: Path, parts: Parts, run: TrainingRun, system: System, ranks: Ranks) -> None:
    """Choose the checkpoint (best on dev, or the last), export it as model/, and examine it on the test split."""
    found = {checkpoint_step(path): path for path in ranks.first(checkpoints(folder))}
    last = max(found, default=0)
    chosen = run.progress.best_step if recipe.checkpoint.best and run.progress.best_step in found else last
    if chosen and chosen != last:
        parts.learner.load(found[chosen] / "learner")
        parts.engine.load_weights(parts.learner.weights(chosen))
    scratch = folder / ".model.tmp"
    if ranks.leads:
        shutil.rmtree(scratch, ignore_errors=True)
    parts.learner.export(scratch)
    if ranks.leads:
        parts.tokenizer.save_pretrained(scratch)
        shutil.rmtree(folder / "model", ignore_errors=True)
        scratch.replace(folder / "model")
        write_json(folder / "chosen.json", {"step": chosen, "dev": run.progress.best if chosen == run.progress.best_step else None})
    seen = ranks.first({(row["split"], row["decoding"]) for row in read_lines(folder / "eval.jsonl")})
    for temperature in recipe.eval.temperatures if parts.problems.test else ():
        if ("test", decoding_name(temperature)) not in seen:
            with system.clock("evaluate"):
                samples = recipe.eval.final_samples
                result = examine(recipe, parts, parts.engine, "test", parts.problems.test, temperature, samples, chosen, ranks)
                if ranks.leads:
                    write_evaluation(folder, result)
    run.sink.summarise(final_results(read_lines(folder / "eval.jsonl")))


@contextlib.contextmanager
def _recording(folder: Path, run: TrainingRun, view: LiveView, status: Reports, ranks: Ranks) -> Iterator[None]:
    """However the run ends, status.json says so, error.txt keeps the traceback of a failure, and warnings go to the live view."""
    warnings, failed = _Warnings(view.say), True
    logging.getLogger("opd").addHandler(warnings)
    error_file = folder / (f"error-rank-{ranks.rank}.txt" if ranks.rank else "error.txt")
    error_file.unlink(missing_ok=True)
    try:
        yield
        failed = False
    except KeyboardInterrupt as stopped:
        failed = False
        state = "paused" if isinstance(stopped, Paused) else "preempted"
        status.write(state, str(stopped) or "interrupted twice: what was not saved will be done again")
        raise
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a full disk the first error is the one to report
            status.write("failed", f"{type(error).__name__}: {error}")
            error_file.write_text(traceback.format_exc(), encoding="utf-8")
        if isinstance(error, EngineLost):
            raise RunFailed(str(error)) from error
        if is_out_of_memory(error) and not isinstance(error, ValueError):
            raise ValueError(
                "out of memory outside of the learner's micro-batches: lower engine.token_budget (generation), learner.token_budget (teacher "
                "passes) or sampling.max_tokens, and run the same command again from the last checkpoint (see error.txt)"
            ) from error
        if is_disk_full(error) and not isinstance(error, ValueError):
            raise ValueError(
                f"the disk is full ({free_mebibytes(folder)} MiB free at {folder}); the last good checkpoint stays. Free space and run the same "
                "command again."
            ) from error
        raise
    finally:
        logging.getLogger("opd").removeHandler(warnings)
        view.close()
        run.sink.finish(failed)


class _Warnings(logging.Handler):
    """Shows what our own modules warn of above the progress bar."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())

