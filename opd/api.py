"""The commands that run a model, as functions: train, evaluate. `opd.reports` has those that read run folders."""

import contextlib
import json
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from opd_rollout.engine import Engine
from opd_rollout.parity import audit
from opd_rollout.sampling import request_seed
from opd_rollout.types import GenerateRequest, Sampling

from opd import chat, loop_async
from opd.ahead import Ahead
from opd.build import Parts, build_parts, check_tracking, input_facts, open_sink
from opd.config import load_recipe, parse_overrides, parse_recipe, recipe_hash
from opd.errors import Paused
from opd.eval import Codec, EvalResult, EvalSettings, decoding_name, write_evaluation
from opd.eval import evaluate as evaluate_problems
from opd.freezing import Recorder
from opd.guard import parse_rules
from opd.guarding import RunGuard
from opd.learner.memory import is_out_of_memory
from opd.live import LiveView, PhaseClock, Status, StopRequest, stop_signals
from opd.loop import System
from opd.loop import train as train_loop
from opd.randomness import seed_generators
from opd.recipe import Recipe
from opd.run import Plan, TrainingRun
from opd.runfolder import check_run, checkpoint_step, checkpoints, claimed, free_mebibytes, is_disk_full, open_run, read_lines, write_json
from opd.stages import read_stages
from opd.types import Prompt
from opd.verify import final_answer
from opd.viewer.columns import ShownColumns
from opd.viewer.record import Readers, write_samples

AUDIT_PROMPTS = 4


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
    stages = [recipe] if isinstance(recipe, Recipe) else read_stages(recipe, overrides)
    if len(stages) > 1:
        if folder:
            raise ValueError(f"{recipe} has stages, each with a folder of its own: train it without `folder`")
        return [train(stage, verifier=verifier, quiet=quiet) for stage in stages][-1]
    [resolved] = stages
    folder = folder or run_folder(resolved, recipe if isinstance(recipe, str) else "recipe")
    check_run(folder, resolved)
    if finished(folder):
        if not quiet:
            print(f"{folder} is finished: nothing to do", file=sys.stderr)
        return folder
    check_tracking(resolved.track.wandb)
    _train_in(folder, resolved, verifier, quiet)
    return folder


def _train_in(folder: Path, recipe: Recipe, verifier: Callable[..., Any] | None, quiet: bool) -> None:
    """Build, check, then run; up to `open_run` nothing is written."""
    status, stop = Status(folder / "status.json", recipe.steps), StopRequest(at_once=True)
    clock = PhaseClock(status, stop)
    with stop_signals(stop), contextlib.ExitStack() as held:
        existed = folder.is_dir()
        if existed:
            held.enter_context(claimed(folder))
        seed_generators(recipe.seed)
        parts = build_parts(recipe, verifier=verifier, check=clock.check)
        held.callback(parts.learner.close)
        held.callback(parts.engine.close)
        view = LiveView(folder.name, recipe.steps, quiet=quiet)
        held.callback(view.close)
        for note in parts.problems.notes:
            view.say(f"data: {note}")
        audit_engine(recipe, parts, view)
        open_run(folder, recipe, facts(recipe, parts))
        if not existed:
            held.enter_context(claimed(folder))
        system = make_system(parts, clock)
        if recipe.track.bundle_steps:
            system = replace(system, teachers=Recorder(parts, system.last, weights=True, wanted=lambda: status.coming in recipe.track.bundle_steps))
        run = make_run(recipe, folder, parts, status, view, system.teachers)
        stop.at_once = False
        with _recording(folder, run, view, status):
            reason = train_as_asked(recipe, system, run, clock)
            report_final(recipe, folder, parts, run, system)
            status.write("finished", reason)
            view.say(f"{folder}: {reason}")


def train_as_asked(recipe: Recipe, system: System, run: TrainingRun, clock: PhaseClock) -> str:
    """One step after the other, or answers ahead of the learner; returns why it stopped."""
    if not recipe.asynchrony.max_staleness:
        return train_loop(system, run, recipe.steps)
    ahead = Ahead(system.source, clock.check)
    how = loop_async.Asynchrony(max_staleness=recipe.asynchrony.max_staleness, in_flight=recipe.asynchrony.in_flight)
    try:
        return loop_async.train(replace(system, source=ahead), ahead, run, recipe.steps, how)
    except BaseException:
        system.student.close()  # ends what the thread waits for
        raise
    finally:
        ahead.close()


def train_run(recipe: str, overrides: Mapping[str, Any], folder: Path) -> Path:
    """One run of a comparison: quiet, without W&B. A run that a guard rail pauses has failed, for nobody is there to look."""
    try:
        return train(recipe, {**overrides, "track.wandb": "disabled"}, folder, quiet=True)
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


def evaluate(model_or_run: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
    """avg@k, pass@k and maj@k of a run's chosen model, or of a model folder on an embedded task (`data.task=...`); prints and returns the rows."""
    changes = parse_overrides(overrides)
    resolved = _eval_recipe(model_or_run, changes)
    chosen = Path(model_or_run) / "chosen.json"
    step = json.loads(chosen.read_text(encoding="utf-8"))["step"] if chosen.is_file() else 0
    parts = build_parts(resolved)
    rows = []
    for temperature in resolved.eval.temperatures:
        result = examine(resolved, parts, parts.engine, "test", parts.problems.test, temperature, resolved.eval.final_samples, step)
        row = dict(result.row)
        rows.append(row)
        print(
            f"{row['suite']} test, {row['decoding']}: avg@{row['k']} {row['avg@k']:.3f} ± {row['stderr']:.3f}, pass@{row['k']} {row['pass@k']:.3f} "
            f"± {row['pass@k_stderr']:.3f}, maj@{row['k']} {row['maj@k']:.3f} ± {row['maj@k_stderr']:.3f} ({row['n_problems']} problems)"
        )
    parts.learner.close()
    parts.engine.close()
    return rows


def run_folder(recipe: Recipe, reference: str) -> Path:
    """runs/<name>, by default recipe-method-seed-hash. Raises ValueError for a name that leads out of runs/."""
    if Path(recipe.name).is_absolute() or ".." in Path(recipe.name).parts:
        raise ValueError(f"name={recipe.name}: a run lives under runs/; give a plain name, or one with folders like study/arm")
    return Path("runs") / (recipe.name or f"{Path(reference).stem}-{recipe.method or 'method'}-{recipe.seed}-{recipe_hash(recipe)}")


def finished(folder: Path) -> bool:
    """Whether the folder holds a run that reached its end."""
    path = folder / "status.json"
    return path.is_file() and json.loads(path.read_text())["state"] == "finished"


def facts(recipe: Recipe, parts: Parts) -> dict[str, Any]:
    """What resolved.json adds to the recipe: what was chosen, and hashes of template and data."""
    return {
        **input_facts(recipe, parts.tokenizer),
        "verifier": getattr(parts.problems.verify, "__qualname__", type(parts.problems.verify).__name__),
        "allow": list(parts.objective.allowed),
        "num_parameters": parts.num_parameters,
    }


def make_system(parts: Parts, clock: PhaseClock) -> System:
    """The parts as the loop sees them."""
    return System(
        source=parts.source, view=parts.views, teachers=parts.scorer, objective=parts.objective, learner=parts.learner,
        student=parts.engine, clock=clock, last={},
    )  # fmt: skip


def make_run(recipe: Recipe, folder: Path, parts: Parts, status: Status, view: LiveView, teachers: Any = None) -> TrainingRun:
    """The run folder's side of the loop. teachers: the system's, which may record steps for bundles."""
    ev, ck, tr = recipe.eval, recipe.checkpoint, recipe.track
    plan = Plan(
        steps=recipe.steps, evaluate_every=ev.every, evaluate_first=ev.before, checkpoint_every=ck.every, keep=ck.keep, keep_best=ck.best,
        samples_every=tr.samples_every, max_skipped=recipe.learner.max_skipped, budget_tokens=recipe.budget.generated_tokens,
        budget_seconds=recipe.budget.seconds,
    )  # fmt: skip

    def evaluate_dev(step: int, engine: Engine) -> Mapping[str, Any]:
        result = examine(recipe, parts, engine, "dev", parts.problems.dev, 1.0, ev.samples, step)
        write_evaluation(folder, result)
        return result.row

    shown = ShownColumns(tr.samples)
    parts.learner.observer = shown
    return TrainingRun(
        folder,
        plan,
        status=status,
        view=view,
        open_sink=partial(open_sink, recipe, folder),
        evaluate_dev=evaluate_dev if parts.problems.dev else None,
        write_samples=partial(
            write_samples, tokenizer=parts.tokenizer, num_samples=tr.samples, texts_in_table=tr.texts, contexts=parts.views, readers=readers(parts),
            columns=shown.of,
        ),
        save_tokenizer=parts.tokenizer.save_pretrained,
        guard=make_guard(recipe),
        freeze=partial(teachers.write, folder, recipe) if isinstance(teachers, Recorder) else None,
    )


def make_guard(recipe: Recipe) -> RunGuard | None:
    """The recipe's guard rails; None where all are off."""
    g = recipe.guard
    rules = parse_rules(g.action, g.rules)
    if not rules:
        return None
    return RunGuard(rules, answers=g.answers, ngram=g.ngram, rate_factor=g.rate_factor, max_roll_backs=g.max_roll_backs)


def readers(parts: Parts) -> Readers:
    """Who fills in the top-k lists of a samples file."""
    teachers = {name: weights.scores for name, weights in parts.scorer.weights.items()}
    return Readers(student=partial(parts.learner.teacher_pass, weights="live"), teachers=teachers)


def examine(
    recipe: Recipe, parts: Parts, engine: Engine, split: str, prompts: Sequence[Prompt], temperature: float, samples: int, step: int
) -> EvalResult:
    """One evaluation; the seed does not depend on the run's, so that all runs answer the same problems with the same noise."""
    settings = EvalSettings(
        suite=parts.problems.suite, split=split, samples=samples, temperature=temperature, max_tokens=recipe.sampling.max_tokens,
        stop_ids=parts.stop_ids, seed=EVALUATION_SEED,
    )  # fmt: skip
    codec = Codec(encode=parts.encode, decode=partial(chat.decode, parts.tokenizer), answer=final_answer)
    return evaluate_problems(engine, prompts, parts.problems.verify, codec, settings, step=step)


EVALUATION_SEED = 20260501


def audit_engine(recipe: Recipe, parts: Parts, view: LiveView) -> None:
    """Compare the engine's log-probs with the learner's, in nats; ValueError past the recipe's threshold."""
    prompts = list(parts.problems.dev[:AUDIT_PROMPTS])
    if not prompts or recipe.sampling.temperature == 0:
        return
    requests = [GenerateRequest(prompt_ids=parts.encode(p), seed=request_seed(recipe.seed, p.id, 0, 0)) for p in prompts]
    sampling = Sampling(temperature=recipe.sampling.temperature, max_tokens=recipe.sampling.max_tokens, stop_ids=parts.stop_ids)
    gap = audit(parts.engine, lambda asked, _temperature: parts.learner.teacher_pass(asked, "live"), requests, sampling)
    if not gap.mean <= recipe.engine.audit_nats:  # NaN, of a model with broken weights, must not pass
        raise ValueError(
            f"engine and learner disagree on log-probs by {gap.mean:.4f} nats on average (largest {gap.max:.4f}) over {gap.num_tokens} tokens, more "
            f"than engine.audit_nats={recipe.engine.audit_nats}: training would be off-policy. Use float32, or raise the threshold knowingly."
        )
    view.say(f"engine against learner: {gap.mean:.1e} nats mean, {gap.max:.1e} largest, over {gap.num_tokens} tokens")


def report_final(recipe: Recipe, folder: Path, parts: Parts, run: TrainingRun, system: System) -> None:
    """Choose the checkpoint (best on dev, or the last), export it as model/, and examine it on the test split."""
    found = {checkpoint_step(path): path for path in checkpoints(folder)}
    last = max(found, default=0)
    chosen = run.progress.best_step if recipe.checkpoint.best and run.progress.best_step in found else last
    if chosen and chosen != last:
        parts.learner.load(found[chosen] / "learner")
        parts.engine.load_weights(parts.learner.weights(chosen))
    scratch = folder / ".model.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    parts.learner.export(scratch)
    parts.tokenizer.save_pretrained(scratch)
    shutil.rmtree(folder / "model", ignore_errors=True)
    scratch.replace(folder / "model")
    write_json(folder / "chosen.json", {"step": chosen, "dev": run.progress.best if chosen == run.progress.best_step else None})
    seen = {(row["split"], row["decoding"]) for row in read_lines(folder / "eval.jsonl")}
    for temperature in recipe.eval.temperatures if parts.problems.test else ():
        if ("test", decoding_name(temperature)) not in seen:
            with system.clock("evaluate"):
                samples = recipe.eval.final_samples
                result = examine(recipe, parts, parts.engine, "test", parts.problems.test, temperature, samples, chosen)
                write_evaluation(folder, result)


def _eval_recipe(model_or_run: str, changes: Mapping[str, Any]) -> Recipe:
    resolved = Path(model_or_run) / "resolved.json"
    if not resolved.is_file():
        if not any(key.startswith("data") for key in changes):
            raise ValueError(f"{model_or_run} is no run folder: say what to examine it on, e.g. data.task=expr or data.path=FILE.jsonl")
        return load_recipe("sft", {"model.path": model_or_run, "sampling.max_tokens": 64, "learner.kind": "torch", **changes})
    before = json.loads(resolved.read_text())["recipe"]
    model = Path(model_or_run) / "model"
    if not (model / "config.json").is_file():
        raise ValueError(f"{model_or_run} has no model/ yet: finish the run first (opd train with its recipe resumes it)")
    alone = {"init": "", "teacher": "", "view": "", "signals": {}, "objective": [{"nll": {}}], "group": 1, "rollout": {}}  # nobody teaches
    before = {**before, **alone, "model": {**before["model"], "path": str(model), "init": "pretrained", "lora": None}}
    return parse_recipe(before, {"learner.kind": "torch", **changes}, origin=model_or_run, resolved=True)


@contextlib.contextmanager
def _recording(folder: Path, run: TrainingRun, view: LiveView, status: Status) -> Iterator[None]:
    """However the run ends, status.json says so, error.txt keeps the traceback of a failure, and warnings go to the live view."""
    warnings, failed = _Warnings(view.say), True
    logging.getLogger("opd").addHandler(warnings)
    (folder / "error.txt").unlink(missing_ok=True)
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
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
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

