"""Examine and report: rows of eval.jsonl, generations, one printed line an exam and decoding."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opd.accuracy import EvalResult, decoding_name, write_evaluation
from opd.config.load import kind_of, load_recipe, parse_overrides, parse_recipe
from opd.config.recipe import Recipe
from opd.eval import Codec, EvalSettings, evaluation_row, judged_answers
from opd.examination.exams import Decoding, Exam, recipe_exam, suite_exam
from opd.examination.options import Options, parse_options
from opd.examination.speaker import Speaker, name_of, open_speaker, published_config
from opd.prompts import check_lengths
from opd.run.folder import append_line, keep_lines, read_lines
from opd.run.named import RUNS, find_run, nearest_runs
from opd.tasks import TASKS
from opd.text import chat
from opd.types import Prompt

EVALUATION_SEED = 20260501  # not the run's: all models answer the same problems with the same noise
BLOCK = 256  # answers between two saves


def evaluate(model_or_run: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
    """avg@k, pass@k, maj@k with intervals of a run's chosen model, a model folder or hub name, or a model behind `server`; prints and
    returns the rows. On `suite`s, or on a recipe's own problems (`data.task=...`, `data.path=...`; a run's by itself)."""
    options = parse_options(parse_overrides(overrides))
    model_or_run = model_or_run if options.server else located(model_or_run)
    recipe = eval_recipe(model_or_run, options)
    exams = exams_of(model_or_run, recipe, options)
    folder, step = results_folder(model_or_run, options), chosen_step(model_or_run)
    speaker, rows = open_speaker(recipe, options.server), []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        asked = [(exam, *fitted(exam, speaker, recipe.data.max_prompt_tokens)) for exam in exams]
        for exam, encode, decodings in asked:
            for note in exam.notes:
                say(note)
            for decoding in decodings:
                say(plan_line(exam, decoding))
                result = examine(exam, decoding, speaker, encode, folder, step)
                keep_lines(folder / "eval.jsonl", lambda row, mine=result.row: any(row[key] != mine[key] for key in ("suite", "split", "decoding")))
                write_evaluation(folder, result)
                rows.append(dict(result.row))
                print(result_line(result.row))
    finally:
        speaker.engine.close()
    say(f"rows and generations: {folder}")
    return rows


def located(model_or_run: str) -> str:
    """A run's folder for its name; a model folder, a hub name or a server's model as it is. Raises ValueError for any other folder here."""
    if (Path(model_or_run) / "config.json").is_file():
        return model_or_run
    try:
        return str(find_run(model_or_run))
    except ValueError:
        if Path(model_or_run).exists() or (RUNS / model_or_run).exists() or kind_of(model_or_run):
            raise
        return model_or_run


def exams_of(model_or_run: str, recipe: Recipe, options: Options) -> list[Exam]:
    """What is to be examined, read and checked before a model is loaded."""
    if not options.suite.names:
        return [recipe_exam(recipe, options.split)]
    config = published_config(recipe)
    return [suite_exam(name, options.suite, name_of(model_or_run), config) for name in options.suite.names]


def fitted(exam: Exam, speaker: Speaker, longest: int) -> tuple[Callable[[Prompt], tuple[int, ...]], list[Decoding]]:
    """How prompts are encoded, and the decodings with a max_tokens that fits. Raises ValueError where prompts leave no room."""
    known: dict[str, tuple[int, ...]] = {}

    def encode(prompt: Prompt) -> tuple[int, ...]:
        if prompt.id not in known:
            known[prompt.id] = chat.render(speaker.tokenizer, prompt.messages, thinking=exam.thinking)
        return known[prompt.id]

    if not exam.prompts:
        raise ValueError(f"{exam.suite}, split {exam.split}: no problems; give at least one (eval.final_problems for split test)")
    if exam.suite in TASKS:  # their models know one alphabet each
        chat.check_alphabet(speaker.tokenizer, (m["content"] for prompt in exam.prompts[:64] for m in prompt.messages), speaker.name)
    room = (1 << 30) if speaker.positions is None else speaker.positions
    decodings = []
    for decoding in exam.decodings:
        wished = decoding.max_tokens
        if wished is None:
            assert decoding.published is not None
            wished = min(decoding.published.max_tokens, room - max(len(encode(prompt)) for prompt in exam.prompts))
            if wished < 1:
                raise ValueError(f"{exam.suite}: a prompt has more tokens than the model's {room} positions; examine a model with longer contexts")
            check_lengths(exam.prompts, encode, room - wished)
        elif wished >= room:
            raise ValueError(f"max_tokens is {wished}, but the model has {room} positions, which prompt and answer share; lower it")
        else:
            check_lengths(exam.prompts, encode, room - wished if decoding.published else min(room - wished, longest))
        decodings.append(with_max_tokens(decoding, wished))
    return encode, decodings


def with_max_tokens(d: Decoding, wished: int) -> Decoding:
    return Decoding(temperature=d.temperature, top_p=d.top_p, top_k=d.top_k, samples=d.samples, max_tokens=wished, published=d.published)


def examine(
    exam: Exam, decoding: Decoding, speaker: Speaker, encode: Callable[[Prompt], tuple[int, ...]], folder: Path, step: int
) -> EvalResult:
    """One exam in blocks; answers that an earlier, interrupted call with the same settings has saved are not asked for again."""
    assert decoding.max_tokens is not None
    settings = EvalSettings(
        suite=exam.suite, split=exam.split, samples=decoding.samples, temperature=decoding.temperature, top_p=decoding.top_p,
        top_k=decoding.top_k, max_tokens=decoding.max_tokens, stop_ids=speaker.stop_ids, seed=EVALUATION_SEED,
    )  # fmt: skip
    codec = Codec(encode=encode, decode=partial(chat.decode, speaker.tokenizer), answer=exam.votes)
    k = decoding.samples if decoding.temperature > 0 else 1
    partial_file = folder / f".{exam.suite}-{_digest([settings, step, speaker.name, [encode(p) for p in exam.prompts]])}.partial.jsonl"
    done = list(read_lines(partial_file))
    whole, started = len(done) // k, time.perf_counter()
    done = done[: whole * k]
    if whole:
        say(f"{exam.suite}: {whole} of {len(exam.prompts)} problems were answered before: going on")
    size = max(1, BLOCK // k)
    for first in range(whole, len(exam.prompts), size):
        block = judged_answers(speaker.engine, exam.prompts[first : first + size], exam.verify, codec, settings, step)
        for line in block:
            append_line(partial_file, line)
        done += block
        say(f"{exam.suite}: {min(first + size, len(exam.prompts))} of {len(exam.prompts)} problems")
    row = evaluation_row(done, settings, step, time.perf_counter() - started) | {"left_out": exam.left_out}
    partial_file.unlink(missing_ok=True)
    return EvalResult(row=row, generations=tuple(done))


def plan_line(exam: Exam, d: Decoding) -> str:
    """What is about to be asked, and where its settings come from."""
    source = f" ({d.published.source})" if d.published else ""
    count = f"{len(exam.prompts)} problems x {d.samples if d.temperature else 1}"
    return f"{exam.suite}: {count} answers of at most {d.max_tokens} tokens, {decoding_name(d.temperature, d.top_p, d.top_k)}{source}"


def result_line(row: Mapping[str, Any]) -> str:
    """One evaluation for people: means with 95 % intervals over problems, cut answers, and the difference that can be seen."""
    k, (best, worst) = row["k"], row["resolves"]
    if not row["n_problems"]:
        return f"{row['suite']} {row['split']}, {row['decoding']}: none of {row['unjudged']} answers was judged (the verifier abstained or failed)"

    def figure(name: str, interval: str) -> str:
        low, high = row[interval]
        if row[name + "@k"] is None:
            return f"{name}@{k} not known (no problem has {k} judged answers)"
        return f"{name}@{k} {100 * row[name + '@k']:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    figures = [figure("avg", "interval"), figure("pass", "pass@k_interval"), figure("maj", "maj@k_interval")]
    return (
        f"{row['suite']} {row['split']}, {row['decoding']}: {', '.join(figures)}; {100 * row['truncated']:.1f} % cut at max_tokens; "
        f"shows differences from {100 * best:.1f} points (paired, at best) to {100 * worst:.1f} ({row['n_problems']} problems"
        + (f", {row['unjudged']} answers not judged" if row["unjudged"] else "")
        + (f", {row['left_out']} left out: gold answer refused)" if row.get("left_out") else ")")
    )


def eval_recipe(model_or_run: str, options: Options) -> Recipe:
    """A run's recipe with its chosen model, or a bare one around a model. Raises ValueError where there is nothing to examine it on."""
    resolved, changes = Path(model_or_run) / "resolved.json", options.recipe
    if not resolved.is_file():
        if not options.suite.names and not any(key.startswith("data") for key in changes):
            raise ValueError(
                f"{model_or_run} is no run folder{nearest_runs(model_or_run)}: say what to examine a model on, e.g. suite=math500, data.task=expr or "
                "data.path=FILE.jsonl"
            )
        return load_recipe("sft", {"model.path": model_or_run, "sampling.max_tokens": 64, "learner.kind": "torch", **changes})
    before = json.loads(resolved.read_text(encoding="utf-8"))["recipe"]
    model = Path(model_or_run) / "model"
    if not (model / "config.json").is_file():
        raise ValueError(f"{model_or_run} has no model/ yet: finish the run first (opd train with its recipe resumes it)")
    alone: dict[str, Any] = {"init": "", "teacher": "", "view": "", "signals": {}, "writers": {}, "objective": [{"nll": {}}], "group": 1}
    alone |= {"rollout": {}, "model": {**before["model"], "path": str(model), "init": "pretrained", "lora": None}}  # nobody teaches
    return parse_recipe({**before, **alone}, {"learner.kind": "torch", **changes}, origin=model_or_run, resolved=True)


def results_folder(model_or_run: str, options: Options) -> Path:
    """Where rows and generations go: `out`, a folder in the run, or runs/eval-NAME."""
    if options.out:
        return Path(options.out)
    run = Path(model_or_run)
    return run / "evaluations" if (run / "resolved.json").is_file() else Path("runs") / f"eval-{name_of(model_or_run)}"


def chosen_step(model_or_run: str) -> int:
    """The step of a run's chosen checkpoint, 0 for a bare model."""
    chosen = Path(model_or_run) / "chosen.json"
    return json.loads(chosen.read_text(encoding="utf-8"))["step"] if chosen.is_file() else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _digest(content: Any) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=6).hexdigest()
