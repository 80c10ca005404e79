"""Prompts and verifier of a recipe: an embedded task, or a file with held-out lines."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from opd.build.judge import judge_fingerprint, open_judge
from opd.config.choices import nearest, split_choice
from opd.config.recipe import Recipe
from opd.data.presets import PRESETS, Preset, find_preset
from opd.data.records import Records, existing_file, on_hub, read_records
from opd.data.sample import sample_records
from opd.data.selection import between, contaminated, overlap, pass_rates
from opd.data.stream import LazyStream, first_prompts
from opd.data.suites import SUITES, suite_records
from opd.errors import Unreachable
from opd.prompts import PromptStream, judged_record, read_prompts, shuffled_stream, split_prompts, task_prompts, task_stream
from opd.tasks import TASKS
from opd.tasks.types import task_corpus
from opd.types import Prompt, Verifier
from opd.verify import adapted, gold_choice, gold_problem, make_verifier, reads_of, version_of
from opd.verify.cache import VerdictCache, cached
from opd.views import TEMPLATES

CHECKED_PROMPTS = 32  # of an endless stream, before the run starts; a file is checked whole
CHECKED_RECORDS = 256  # of data.stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """What the student trains on and is examined on, and who judges.

    train: all of a file, the first ones of an endless or lazy stream. notes: what was left out, for the user to see.
    """

    stream: PromptStream | LazyStream
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
    if data.stream and data.task:
        raise ValueError("data.stream: an embedded task is made as it is read; leave data.stream out, or give data.path")
    if data.task:
        return _embedded(recipe, verifier)
    return _streamed(recipe, verifier) if data.stream and not tries_out(recipe, source_of(recipe)) else _from_records(recipe, verifier)


def _embedded(recipe: Recipe, verifier: Callable[..., Any] | None) -> Problems:
    data, ev = recipe.data, recipe.eval
    stream = task_stream(data.task, data.split, recipe.seed, data.difficulty)
    task = TASKS[data.task]
    train = list(islice(task.prompts(data.split, recipe.seed, data.difficulty or task.difficulties[0]), CHECKED_PROMPTS))
    choice = "task" if data.verifier == "auto" else data.verifier
    graded = None if verifier else gold_choice(choice)
    if graded is not None and (problem := gold_problem(make_verifier(graded), train[0])):
        raise ValueError(f"data.verifier: {graded!r} does not accept the task's own answers ({problem}); leave data.verifier out for the task's own")
    return Problems(
        stream=stream,
        train=train,
        dev=task_prompts(data.task, "dev", ev.num_problems, difficulty=data.difficulty),
        test=task_prompts(data.task, "test", ev.final_problems, difficulty=data.difficulty),
        verify=_verifier(recipe, choice, verifier),
        templates=task.templates,
        corpus=lambda: task_corpus(task, data.difficulty),
        suite=data.task,
    )


def _from_records(recipe: Recipe, verifier: Callable[..., Any] | None) -> Problems:
    data, ev = recipe.data, recipe.eval
    if not data.limit:
        check_fits_memory(source_of(recipe), machine_memory())
    verify, gold = _judges(recipe, verifier)
    prompts, dropped = _read(recipe, data.path, data.split, gold)
    notes = [f"{len(found)} {kind} records left out (first: {found[0].partition('; ')[0]})" for kind, found in dropped.items() if found]
    if tries_out(recipe, source_of(recipe)):
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
    return _problems(recipe, shuffled_stream(prompts, recipe.seed), prompts, exam, verify, notes)


def _streamed(recipe: Recipe, verifier: Callable[..., Any] | None) -> Problems:
    """Prompts that are read while the run goes on; only the first ones are looked at before it. Raises ValueError for what needs all of them."""
    data, ev, source = recipe.data, recipe.eval, source_of(recipe)
    check_streamable(recipe, source)
    verify, gold = _judges(recipe, verifier)
    repair = frozenset(data.repair) - {"too_long"}

    def read(start: int) -> Records:
        preset = find_preset(data.preset) if data.preset else None
        subset = data.subset or (preset.subset if preset and not data.path else "")
        records = read_records(source, subset=subset, split=data.split, limit=data.limit, start=start, lazy=True)
        return _under_our_names(records, preset) if preset and not data.columns else records

    def judge(place: str, record: Mapping[str, Any]) -> tuple[tuple[str, str] | None, Prompt | None]:
        return judged_record(record, data.columns, data.system, place, {}, gold)

    held_out, used = ev.num_problems + ev.final_problems, 0
    exam = _read(recipe, data.eval_path, data.eval_split, gold)[0][:held_out] if data.eval_path else []
    if not data.eval_path:
        exam, used = first_prompts(read(0), judge, repair, held_out)
    stream = LazyStream(read, judge, buffer=data.buffer, seed=recipe.seed, repair=repair, first=used)
    notes = [
        f"streamed: the next prompt is one of {data.buffer} (data.buffer), no shuffle over all; duplicates are not looked for; the first "
        f"{CHECKED_RECORDS} records for training are checked now, the others when they are read"
    ]
    notes += [f"the first {used} records of the data are held out for dev and test"] if used else []
    notes += _only_some(recipe, stream, exam)
    first = first_prompts(read(used), judge, repair, CHECKED_RECORDS)[0]
    if not first:
        raise ValueError(f"{source} holds no record to train on after the {used} that are held out: lower eval.num_problems, or give data.eval_path")
    return _problems(recipe, stream, first, exam, verify, notes)


def _problems(
    recipe: Recipe, stream: PromptStream | LazyStream, train: Sequence[Prompt], exam: Sequence[Prompt], verify: Verifier, notes: Sequence[str]
) -> Problems:
    """Half of an exam that is too short goes to dev."""
    ev = recipe.eval
    num_dev = min(ev.num_problems, len(exam) // 2 if ev.final_problems else len(exam))
    return Problems(
        stream=stream,
        train=train,
        dev=exam[:num_dev],
        test=exam[num_dev : num_dev + ev.final_problems],
        verify=verify,
        templates=TEMPLATES,
        corpus=lambda: [m["content"] for p in train for m in p.messages] + [h for p in train for h in p.hints.values()],
        suite=_own_name(recipe),
        notes=tuple(notes),
    )


def _own_name(recipe: Recipe) -> str:
    """What the run's own dev and test problems are called in eval.jsonl: never as a public suite, which asks other problems, or asks otherwise."""
    data = recipe.data
    name = Path(data.eval_path).stem if data.eval_path else data.preset or Path(data.path).stem
    return name if name not in SUITES else f"{name}-{'own' if data.eval_path else 'held-out'}"


def check_streamable(recipe: Recipe, source: str) -> None:
    """Raises ValueError for wishes that need all records at once, and for files that are one value."""
    if "duplicate" in recipe.data.repair:
        raise ValueError(
            "data.repair=[duplicate] compares every record with all before it, which a stream does not keep: remove duplicates from the file "
            "beforehand, or data.stream=false"
        )
    if Path(source).suffix.lower() == ".json" and not on_hub(source):
        raise ValueError(f"data.stream: {source} is one JSON value, which is read whole: convert it to JSONL (an object a line) or Parquet")


def _only_some(recipe: Recipe, stream: LazyStream, exam: Sequence[Prompt]) -> list[str]:
    """Put the recipe's filters on a stream; what they are, for the user."""
    data, notes = recipe.data, []
    if data.decontaminate:
        n = data.decontaminate.ngram
        shared = [overlap(problems, ngram=n) for problems in (exam, *map(_exam, data.decontaminate.against))]
        stream.only("contaminated", lambda prompt: all(shares(prompt) is None for shares in shared))
        notes.append(f"prompts that share {n} words in a row with an exam are left out as they come (data/left_out/contaminated)")
    if data.pass_rate:
        rates, low, high = pass_rates(existing_file(data.pass_rate.file)), data.pass_rate.low, data.pass_rate.high
        stream.only("pass_rate", lambda prompt: bool(between([prompt], rates, 0, 1)) and low <= rates[prompt.id] <= high)
        notes.append(f"prompts whose pass rate is not from {low:g} to {high:g} are left out as they come (data/left_out/pass_rate)")
    return notes


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits_memory(source: str, memory: int) -> None:
    """Raises ValueError for a file that would take more than half of the machine's memory when it is read whole."""
    file = Path(source).expanduser()
    if file.is_file() and file.stat().st_size > memory // 2:
        size, room = file.stat().st_size / 2**30, memory / 2**30
        raise ValueError(
            f"{file} has {size:.1f} GiB and would be read whole into {room:.1f} GiB of memory: data.stream=true reads it as it is needed, "
            "data.limit=N only its first records"
        )


def source_of(recipe: Recipe) -> str:
    """The file or hub name of the training data."""
    return recipe.data.path or find_preset(recipe.data.preset).path


def _judges(recipe: Recipe, own: Callable[..., Any] | None) -> tuple[Verifier, Verifier | None]:
    """(who judges answers, who judges gold answers or None)."""
    choice = verifier_name(recipe)
    verify, graded = _verifier(recipe, choice, own), None if own else gold_choice(choice)
    return verify, None if graded is None else make_verifier(graded)


def verifier_name(recipe: Recipe) -> Any:
    """The verifier that a file's or preset's answers are judged with."""
    data = recipe.data
    return data.verifier if data.verifier != "auto" else find_preset(data.preset).verifier if data.preset else "math"


def tries_out(recipe: Recipe, source: str) -> bool:
    """Whether made-up problems stand in for a data set of the hub: the run has random weights and is about shapes and speed alone."""
    return recipe.model.init == "random" and bool(recipe.model.path) and on_hub(source)


def _verifier(recipe: Recipe, choice: Any, own: Callable[..., Any] | None) -> Verifier:
    seconds = recipe.data.verifier_seconds
    verify = adapted(own, seconds) if own else make_verifier(choice, open_judge, seconds)
    if not recipe.data.verdict_cache:
        return verify
    reads = str if own else reads_of(choice)
    return cached(verify, VerdictCache(Path(recipe.data.verdict_cache).expanduser(), version_of(choice, own, judge_fingerprint(choice)), reads))


def _read(recipe: Recipe, source: str, split: str, verify: Verifier | None) -> tuple[list[Prompt], dict[str, list[str]]]:
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
    for place, record in _noted(records, preset.note):
        try:
            named = preset.record(record)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{place}: not a record of the preset (no {error}; it has {', '.join(record)}); name the columns with data.columns"
            ) from None
        yield place, {name: value for name, value in named.items() if value is not None}


def _noted(records: Records, note: str) -> Records:
    """The records; where they cannot be reached, what the preset's note says about that."""
    try:
        yield from records
    except Unreachable as error:
        raise ValueError(f"{error}. Note: {note}" if note else str(error)) from None


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
    if preset is None and not Path(name).suffix and not on_hub(name) and not Path(name).exists():
        raise ValueError(f"data.decontaminate.against: {name!r} is no suite, preset, file or hub name{nearest(name, {*SUITES, *PRESETS})}")
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


def without_long_ones(problems: Problems, encode: Callable[[Prompt], Sequence[int]], max_tokens: int) -> Problems:
    """The problems of a lazy stream less the training prompts above max_tokens, which are counted as they are read; encode is the stream's alone."""
    assert isinstance(problems.stream, LazyStream)
    problems.stream.only("too_long", lambda prompt: len(encode(prompt)) <= max_tokens)
    note = f"prompts above {max_tokens} tokens are left out as they come (data/left_out/too_long)"
    return replace(problems, train=[p for p in problems.train if len(encode(p)) <= max_tokens], notes=(*problems.notes, note))
