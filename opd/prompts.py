"""From records or embedded tasks to prompts, as a seeded, resumable, endless stream.

Data is read and checked whole before any work starts; every complaint names place and fix.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from typing import Any

from opd.config.choices import nearest
from opd.tasks import TASKS, Task
from opd.types import Message, Meter, Prompt, Verifier
from opd.verify import gold_problem

HINTS = ("solution", "demonstration", "facts")
TRL_HINT = "privileged_context"  # TRL's name for what only the teacher sees
KNOWN_COLUMNS = ("id", "prompt", "question", "answer", "domain", TRL_HINT, *HINTS)
SHOWN_UNGRADABLE = 20
LEAVE_OUT = "mend the record, or leave such records out with data.repair=[incomplete]"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class PromptStream:
    """An endless stream and how far it was read; `make` starts the same stream anew, so that the cursor alone resumes it."""

    def __init__(self, make: Callable[[], Iterator[Prompt]]) -> None:
        self._make = make
        self._stream = make()
        self._cursor = 0

    def take(self, number: int) -> list[Prompt]:
        """The next prompts."""
        taken = list(islice(self._stream, number))
        assert len(taken) == number, "the stream ended"
        self._cursor += number
        return taken

    def meters(self) -> dict[str, Meter]:
        """Nothing: what was left out is known before the run."""
        return {}

    def state(self) -> dict[str, int]:
        """Plain values for a checkpoint."""
        return {"cursor": self._cursor}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the prompts that were taken when `state` was saved."""
        self._stream, self._cursor = self._make(), 0
        self.take(int(state["cursor"]))


def shuffled_stream(prompts: Sequence[Prompt], seed: int) -> PromptStream:
    """Every prompt once an epoch, in an order drawn from (seed, epoch). Raises ValueError for an empty list."""
    if not prompts:
        raise ValueError("no prompts to draw from")
    return PromptStream(lambda: chain.from_iterable(_epoch(prompts, seed, epoch) for epoch in count()))


def task_stream(name: str, split: str, seed: int, difficulty: str = "") -> PromptStream:
    """A split of an embedded task; a finite one starts again at its end. Raises ValueError for unknown names."""
    task, level = _task(name, difficulty)
    if next(task.prompts(split, seed, level), None) is None:
        raise ValueError(f"task {name}: split {split!r} is empty")
    return PromptStream(lambda: chain.from_iterable(task.prompts(split, seed, level) for _ in count()))


def task_prompts(name: str, split: str, number: int, *, seed: int = 0, difficulty: str = "") -> list[Prompt]:
    """The first `number` prompts of a split (all, where a finite one has fewer), for evaluation."""
    task, level = _task(name, difficulty)
    return list(islice(task.prompts(split, seed, level), number))


def read_prompts(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    columns: Mapping[str, str] | None = None,
    system: str = "",
    verify: Verifier | None = None,
    repair: frozenset[str] = frozenset(),
    origin: str = "the data",
    same_texts: bool = False,
) -> tuple[list[Prompt], dict[str, list[str]]]:
    """Prompts of (place, record) pairs: GSM8K's {question, answer "... #### 42"}, or {prompt | question, answer, solution ...}.

    A prompt is a text or a list of {role, content}. A GSM8K answer gives both the answer 42 and the hint "solution" (the whole text
    without calculator marks); TRL's column privileged_context is the hint "solution". columns: our name -> theirs; names beyond prompt,
    question, answer, id and domain become hints, and so does every other column. verify: grades every gold answer; for verifiers that judge a
    bare answer. repair: what is left out instead of refused: "duplicate", "ungradable", "incomplete" records. same_texts: two records may ask
    the same, as published suites do. Returns the prompts and what was left out, a sentence a record by kind. Raises ValueError with the
    place, and for nothing to read.
    """
    prompts: list[Prompt] = []
    dropped: dict[str, list[str]] = {kind: [] for kind in sorted(repair)}
    first_place: dict[tuple[str, str], str] = {}
    place, ungradable, number = "", [], 0
    for place, record in records:
        number += 1
        problem, prompt = judged_record(record, columns or {}, system, place, first_place, verify)
        if problem and problem[0] not in repair:
            if problem[0] != "ungradable":
                raise ValueError(f"{place}: {problem[1]}")
            ungradable.append(f"{place}: {problem[1]}")
        elif problem:
            dropped[problem[0]].append(f"{place}: {problem[1]}")
        if problem:
            continue
        assert prompt is not None
        first_place |= {key: place for key in _keys(prompt)[: 1 if same_texts else 2]}
        prompts.append(prompt)
    if ungradable:
        raise ValueError(_listed(ungradable, number))
    if not prompts:
        counted = ", ".join(f"{len(found)} {kind}, the first {found[0]}" for kind, found in dropped.items() if found)
        raise ValueError(f"{origin}: every record was left out ({counted})" if place else f"{origin} is empty: it holds no record")
    return prompts, dropped


def _listed(ungradable: Sequence[str], number: int) -> str:
    """One sentence for one record, a list of the first for several."""
    if len(ungradable) == 1:
        return ungradable[0]
    more = f"\n  ... and {len(ungradable) - SHOWN_UNGRADABLE} more" if len(ungradable) > SHOWN_UNGRADABLE else ""
    return (
        f"{len(ungradable)} of {number} records have a gold answer that cannot be graded; mend them, choose another data.verifier, or leave them out "
        "with data.repair=[ungradable]:\n  " + "\n  ".join(ungradable[:SHOWN_UNGRADABLE]) + more
    )


def judged_record(
    record: Mapping[str, Any],
    columns: Mapping[str, str],
    system: str,
    place: str,
    first_place: Mapping[tuple[str, str], str],
    verify: Verifier | None,
) -> tuple[tuple[str, str] | None, Prompt | None]:
    """((kind, sentence) of what is wrong with a record, or None; its prompt). first_place: where earlier records' keys stood, for duplicates."""
    source = re.sub(r"[\[\]]", ":", place).rstrip(":").rpartition(":")[0]
    try:
        prompt = _prompt(record, columns, system, first_place)
    except ValueError as error:
        return ("incomplete", str(error)), None
    for key in reversed(_keys(prompt)):
        if key in first_place:
            earlier = first_place[key].removeprefix(f"{source}:")
            place = f"line {earlier}" if earlier.isdigit() else earlier
            remedy = "remove one of the two, or leave such records out with data.repair=[duplicate]"
            return ("duplicate", f"this record has the {key[0]} of {place}; {remedy}"), prompt
    if verify is not None and (problem := gold_problem(verify, prompt)):
        return ("ungradable", f"{problem}; mend the record or choose another data.verifier"), prompt
    return None, prompt


def _keys(prompt: Prompt) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("id", prompt.id), ("prompt", repr(prompt.messages))


def split_prompts(prompts: Sequence[Prompt], num_held_out: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts: a hash of the text decides, so that the order of the file and other lines do not.

    Raises ValueError when too few would be left to train on.
    """
    if not 0 < num_held_out < len(prompts):
        raise ValueError(
            f"cannot hold out {num_held_out} of {len(prompts)} prompts; "
            "give data.eval_path, or lower eval.num_problems and eval.final_problems"
        )
    digests = [hashlib.blake2b(repr([dict(m) for m in p.messages]).encode(), digest_size=8).digest() for p in prompts]
    held_out = set(sorted(range(len(prompts)), key=lambda i: (digests[i], i))[:num_held_out])
    return [p for i, p in enumerate(prompts) if i not in held_out], [prompts[i] for i in sorted(held_out)]


def check_lengths(prompts: Sequence[Prompt], encode: Callable[[Prompt], Sequence[int]], max_tokens: int) -> None:
    """Raises ValueError when a prompt has more than `max_tokens` tokens, naming how many do and the longest."""
    lengths = [(len(encode(prompt)), prompt.id) for prompt in prompts]
    too_long = [item for item in lengths if item[0] > max_tokens]
    if too_long:
        longest, name = max(too_long)
        raise ValueError(
            f"{len(too_long)} of {len(prompts)} prompts are longer than {max_tokens} tokens (the longest, {name!r}, has {longest}); "
            "raise data.max_prompt_tokens within what the model allows, or remove them (data.repair=[too_long] leaves them out of training)"
        )


def check_dataset_hint(prompts: Sequence[Prompt], hint: str) -> None:
    """Raises ValueError when the data lacks the answers that rollout.source wants to learn from."""
    lacking = [prompt for prompt in prompts if not prompt.hints.get(hint)]
    if lacking:
        have = ", ".join(sorted({name for prompt in prompts for name in prompt.hints})) or "none"
        raise ValueError(
            f"rollout.source learns from {hint!r}, which {len(lacking)} of {len(prompts)} records lack (first: {lacking[0].id!r}); texts in the "
            f"data: {have}. Name the column with data.columns, e.g. {{{hint}: COLUMN}}, or choose another text. A method whose "
            "student answers itself needs none: grpo or rloo (rewards), sdpo (the group's own right answers), opd (a stronger teacher)"
        )


def _epoch(prompts: Sequence[Prompt], seed: int, epoch: int) -> Iterator[Prompt]:
    order = list(range(len(prompts)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return (prompts[index] for index in order)


def _task(name: str, difficulty: str) -> tuple[Task, str]:
    if name not in TASKS:
        raise ValueError(f"no embedded task {name!r}{nearest(name, TASKS)}; known: {', '.join(sorted(TASKS))}")
    task = TASKS[name]
    if difficulty and difficulty not in task.difficulties:
        raise ValueError(
            f"task {name} has no difficulty {difficulty!r}{nearest(difficulty, task.difficulties)}; known: {', '.join(task.difficulties)}"
        )
    return task, difficulty or task.difficulties[0]


def content_id(messages: Sequence[Message], taken: Collection[tuple[str, str]] = ()) -> str:
    """The id of a prompt without one: of its text alone, so that any copy of the data gives it, whatever the file's name and order.

    taken: ("id", NAME) pairs; a text that comes again gets a number.
    """
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    name = f"q-{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"
    return next(each for each in chain([name], (f"{name}-{number}" for number in count(2))) if ("id", each) not in taken)


def _prompt(record: Mapping[str, Any], columns: Mapping[str, str], system: str, taken: Collection[tuple[str, str]]) -> Prompt:
    values = _named(record, columns)
    question = values.get("prompt", values.get("question"))
    if question is None:
        raise ValueError(_missing("prompt or question", "prompt", record))
    if values.get("answer") is None:
        raise ValueError(_missing("answer", "answer", record))
    answer = _text(values["answer"], "answer")
    hints = {name: _text(value, name) for name, value in values.items() if value is not None and _is_hint(name)}
    if values.get(TRL_HINT) is not None:
        hints.setdefault("solution", _text(values[TRL_HINT], TRL_HINT))
    if "####" in answer:
        hints.setdefault("solution", _CALCULATOR.sub("", answer).strip())
        answer = answer.rpartition("####")[2].strip()
    if not answer.strip():
        raise ValueError(f"the answer is empty; {LEAVE_OUT}")
    messages = _messages(question)
    name = content_id(messages, taken) if values.get("id") is None else _text(values["id"], "id")
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    domain = "" if values.get("domain") is None else _text(values["domain"], "domain")
    return Prompt(id=name, messages=messages, answer=answer.strip(), hints=hints, domain=domain)


def _named(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    absent = [theirs for theirs in columns.values() if theirs not in record]
    if absent:
        raise ValueError(
            f"no column {absent[0]!r}{nearest(absent[0], record)}; the record has {', '.join(record)}; see data.columns"
        )
    unmapped = {name: record[name] for name in KNOWN_COLUMNS if name in record and name not in columns.values()}
    others = {name: text for name in record if name not in {*KNOWN_COLUMNS, *columns.values()} and (text := _as_text(record[name])) is not None}
    if {"prompt", "question"} & set(columns):
        unmapped = {name: value for name, value in unmapped.items() if name not in ("prompt", "question")}
    return {**others, **unmapped, **{ours: record[theirs] for ours, theirs in columns.items()}}


def _as_text(value: Any) -> str | None:
    """A further column as a text, lists and objects as JSON; None for what is neither (bytes of an image)."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return None


def _is_hint(name: str) -> bool:
    return name in HINTS or name not in KNOWN_COLUMNS


def _missing(what: str, ours: str, record: Mapping[str, Any]) -> str:
    found = ", ".join(record) or "nothing"
    example = next(iter(record), "column")
    return f"the record has no {what} (it has {found}); name its column with data.columns, e.g. {{{ours}: {example}}}"


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{name} must be a text or a number, found {type(value).__name__}")


def _messages(question: Any) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    shaped = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in turns
    )
    if not shaped:
        raise ValueError(f"the prompt must be a text or a list of {{role, content}} texts, found {type(question).__name__}")
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise ValueError(f"the prompt must end with a non-empty user message; {LEAVE_OUT}")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
