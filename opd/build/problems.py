"""Prompts and verifier of a recipe: an embedded task, or a file with held-out lines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from opd.build.judge import judge_fingerprint, open_judge
from opd.config.choices import split_choice
from opd.config.recipe import Recipe
from opd.data.presets import PRESETS, Preset, find_preset
from opd.data.records import Records, existing_file, on_hub, read_records
from opd.data.sample import sample_records
from opd.data.selection import between, contaminated, pass_rates
from opd.data.suites import SUITES, suite_records
from opd.prompts import PromptStream, read_prompts, shuffled_stream, split_prompts, task_prompts, task_stream
from opd.tasks import HINT_TEMPLATES, TASKS
from opd.types import Prompt, Verifier
from opd.verify import adapted, gold_choice, make_verifier, reads_of, version_of
from opd.verify.cache import VerdictCache, cached
from opd.views import TEMPLATES

CHECKED_PROMPTS = 32  # of an endless stream, before the run starts; a file is checked whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """What the student trains on and is examined on, and who judges.

    train: all of a file, the first ones of an endless stream. notes: what was left out, for the user to see.
    """

    stream: PromptStream
    train: Sequence[Prompt]
    dev: Sequence[Prompt]
    test: Sequence[Prompt]
    verify: Verifier
    templates: Mapping[str, str]
    corpus: Callable[[], Sequence[str]]
    suite: str
    notes: tuple[str, ...] = ()


def load_problems(recipe: Recipe, verifier: Callable[..., Any] | None) -> Problems:
    """Prompts and verifier of a recipe's data. Raises ValueError for everything that cannot be read or graded."""
    data = recipe.data
    if (bool(data.task) + bool(data.path or data.preset)) != 1:
        raise ValueError(
            "data: give either task (embedded: " + ", ".join(sorted(TASKS)) + ") or path (a file, or owner/name on the hub) or preset"
        )
    return _embedded(recipe, verifier) if data.task else _from_records(recipe, verifier)


def _embedded(recipe: Recipe, verifier: Callable[..., Any] | None) -> Problems:
    data, ev = recipe.data, recipe.eval
    stream = task_stream(data.task, data.split, recipe.seed, data.difficulty)
    task = TASKS[data.task]
    return Problems(
        stream=stream,
        train=list(islice(task.prompts(data.split, recipe.seed, data.difficulty or task.difficulties[0]), CHECKED_PROMPTS)),
        dev=task_prompts(data.task, "dev", ev.num_problems, difficulty=data.difficulty),
        test=task_prompts(data.task, "test", ev.final_problems, difficulty=data.difficulty),
        verify=_verifier(recipe, "task" if data.verifier == "auto" else data.verifier, verifier),
        templates=HINT_TEMPLATES,
        corpus=lambda: [task.characters],
        suite=data.task,
    )


def _from_records(recipe: Recipe, verifier: Callable[..., Any] | None) -> Problems:
    data, ev = recipe.data, recipe.eval
    preset = find_preset(data.preset) if data.preset else None
    choice = verifier_name(recipe)
    verify = _verifier(recipe, choice, verifier)
    graded = None if verifier else gold_choice(choice)
    gold = None if graded is None else make_verifier(graded)
    prompts, dropped = _read(recipe, data.path, data.split, gold)
    notes = [f"{count} {kind} records left out" for kind, count in dropped.items() if count]
    if tries_out(recipe, data.path or (preset.path if preset else "")):
        notes.append(f"model.init=random: {len(prompts)} made-up problems stand in for {data.preset or data.path}")
    if data.pass_rate:
        before = len(prompts)
        prompts = between(prompts, pass_rates(existing_file(data.pass_rate.file)), data.pass_rate.low, data.pass_rate.high)
        notes.append(f"{len(prompts)} of {before} prompts have a pass rate from {data.pass_rate.low:g} to {data.pass_rate.high:g}")
    held_out = ev.num_problems + ev.final_problems
    if data.eval_path:
        exam = _read(recipe, data.eval_path, data.eval_split, gold)[0][:held_out]
    elif held_out:
        prompts, exam = split_prompts(prompts, min(held_out, max(2, len(prompts) // 5)))
    else:
        exam = []
    if data.decontaminate:
        prompts, found = _decontaminated(recipe, prompts, exam)
        notes += found
    if held_out > len(exam):
        notes.append(f"only {len(exam)} of {held_out} problems are there for dev and test (eval.*_problems): intervals are wide")
    num_dev = min(ev.num_problems, len(exam) // 2 if ev.final_problems else len(exam))
    return Problems(
        stream=shuffled_stream(prompts, recipe.seed),
        train=prompts,
        dev=exam[:num_dev],
        test=exam[num_dev : num_dev + ev.final_problems],
        verify=verify,
        templates=TEMPLATES,
        corpus=lambda: [m["content"] for p in prompts for m in p.messages] + [h for p in prompts for h in p.hints.values()],
        suite=data.preset or Path(data.path).stem,
        notes=tuple(notes),
    )


def verifier_name(recipe: Recipe) -> Any:
    """The verifier that a file's or preset's answers are judged with."""
    data = recipe.data
    return data.verifier if data.verifier != "auto" else find_preset(data.preset).verifier if data.preset else "math"


def tries_out(recipe: Recipe, source: str) -> bool:
    """Whether made-up problems stand in for a data set of the hub: the run has random weights and is about shapes and speed alone."""
    return recipe.model.init == "random" and bool(recipe.model.path) and on_hub(source)


def _verifier(recipe: Recipe, choice: Any, own: Callable[..., Any] | None) -> Verifier:
    verify = adapted(own) if own else make_verifier(choice, open_judge)
    if not recipe.data.verdict_cache:
        return verify
    reads = str if own else reads_of(choice)
    return cached(verify, VerdictCache(Path(recipe.data.verdict_cache).expanduser(), version_of(choice, own, judge_fingerprint(choice)), reads))


def _read(recipe: Recipe, source: str, split: str, verify: Verifier | None) -> tuple[list[Prompt], dict[str, int]]:
    data = recipe.data
    preset = find_preset(data.preset) if data.preset else None
    path, subset = source or (preset.path if preset else ""), data.subset or (preset.subset if preset and not source else "")
    if tries_out(recipe, path):
        made_up = sample_records(split_choice(verifier_name(recipe), "data.verifier")[0])
        return read_prompts(made_up, system=data.system, verify=verify, origin="the made-up sample")
    records = read_records(path, subset=subset, split=split, limit=data.limit)
    if preset and not data.columns:
        records = _under_our_names(records, preset)
    repair = frozenset(data.repair) - {"too_long"}
    return read_prompts(records, columns=data.columns, system=data.system, verify=verify, repair=repair, origin=path)


def _under_our_names(records: Records, preset: Preset) -> Records:
    for place, record in records:
        try:
            named = preset.record(record)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{place}: not a record of the preset (no {error}; it has {', '.join(record)}); name the columns with data.columns"
            ) from None
        yield place, {name: value for name, value in named.items() if value is not None}


def _decontaminated(recipe: Recipe, prompts: Sequence[Prompt], exam: Sequence[Prompt]) -> tuple[list[Prompt], list[str]]:
    wish = recipe.data.decontaminate
    assert wish
    known, notes = {prompt.id for prompt in prompts}, []
    exams = {"the run's own evaluation": exam} | {name: _exam(name) for name in wish.against}
    shared: dict[str, str] = {}
    for name, problems in exams.items():
        found = contaminated(prompts, problems, ngram=wish.ngram)
        shared |= found
        first = next((f" (first: {mine} shares text with {theirs})" for mine, theirs in found.items()), "")
        notes.append(f"{len(found)} of {len(known)} prompts share {wish.ngram} words in a row with {name}{first}: left out")
    kept = [prompt for prompt in prompts if prompt.id not in shared]
    if not kept:
        raise ValueError("data.decontaminate leaves no prompt to train on; check that the exam is not the training data itself")
    return kept, notes


def _exam(name: str) -> list[Prompt]:
    if name in SUITES:
        bare = replace(SUITES[name], ask="{question}")  # the request around a question is no part of the exam
        return read_prompts(suite_records(bare), repair=frozenset({"duplicate"}))[0]
    preset = PRESETS.get(name)
    records = read_records(preset.path, subset=preset.subset, split="test") if preset else read_records(name, split="test")
    return read_prompts(_under_our_names(records, preset) if preset else records, repair=frozenset({"duplicate"}))[0]


def without_long(problems: Problems, lengths: Mapping[str, int], max_tokens: int, seed: int) -> Problems:
    """The problems less the training prompts above max_tokens (by prompt id), with a note of how many those were."""
    kept = [prompt for prompt in problems.train if lengths[prompt.id] <= max_tokens]
    if not kept:
        raise ValueError(f"every prompt is longer than {max_tokens} tokens; raise data.max_prompt_tokens within what the model allows")
    dropped = len(problems.train) - len(kept)
    note = (f"{dropped} of {len(problems.train)} prompts are longer than {max_tokens} tokens: left out",) if dropped else ()
    return replace(problems, train=kept, stream=shuffled_stream(kept, seed), notes=problems.notes + note)
