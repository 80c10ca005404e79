"""Where prompts come from: embedded tasks or JSONL files, as a seeded, resumable, endless stream.

A file is read and checked whole before any work starts; every complaint names file, line and fix.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from opd.choices import nearest
from opd.tasks import TASKS, Task
from opd.types import Message, Prompt, Verifier
from opd.verify import gold_problem

HINTS = ("solution", "demonstration", "facts")
KNOWN_COLUMNS = ("id", "prompt", "question", "answer", "domain", *HINTS)
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
    path: str | Path, *, columns: Mapping[str, str] | None = None, system: str = "", verify: Verifier | None = None
) -> list[Prompt]:
    """Prompts of a JSONL file: GSM8K's {question, answer "... #### 42"}, or {prompt | question, answer, solution ...}.

    A prompt is a text or a list of {role, content}. A GSM8K answer gives both the answer 42 and the hint "solution" (the whole text
    without calculator marks). columns: our name -> the file's; names beyond prompt, question, answer, id and domain become hints. verify:
    grades every gold answer; for verifiers that judge a bare answer. Raises ValueError with file and line.
    """
    file = existing_file(path)
    prompts: list[Prompt] = []
    first_line: dict[tuple[str, str], int] = {}
    for line, record in _records(file):
        where = f"{file}:{line}"
        prompt = _prompt(record, columns or {}, system, f"{file.stem}-{line}", where)
        for key in (("id", prompt.id), ("prompt", repr(prompt.messages))):
            if key in first_line:
                raise ValueError(f"{where}: this record has the {key[0]} of line {first_line[key]}; remove one of the two")
            first_line[key] = line
        if verify is not None and (problem := gold_problem(verify, prompt)):
            raise ValueError(f"{where}: {problem}; mend the record or choose another data.verifier")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{file} is empty: expected one JSON object a line")
    return prompts


def existing_file(path: str | Path) -> Path:
    """The path, if a file is there. Raises ValueError with the nearest existing name."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        raise ValueError(
            f"{file} is a folder; give a file in it: {', '.join(sorted(p.name for p in file.glob('*.json*'))) or 'it has no JSONL'}"
        )
    folder = file.parent
    while not folder.is_dir():
        folder = folder.parent
    missing = file.relative_to(folder).parts[0]
    raise ValueError(f"{file} does not exist{nearest(missing, [p.name for p in folder.iterdir()])}; looked in {folder.resolve()}")


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
            "raise data.max_prompt_tokens within what the model allows, or remove them"
        )


def check_dataset_hint(prompts: Sequence[Prompt], hint: str) -> None:
    """Raises ValueError when the data lacks the answers that rollout.source wants to learn from."""
    lacking = [prompt for prompt in prompts if not prompt.hints.get(hint)]
    if lacking:
        have = ", ".join(sorted({name for prompt in prompts for name in prompt.hints})) or "none"
        raise ValueError(
            f"rollout.source learns from {hint!r}, which {len(lacking)} of {len(prompts)} records lack (first: {lacking[0].id!r}); texts in the "
            f"data: {have}. Name the column with data.columns, e.g. {{{hint}: COLUMN}}, or choose another text"
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


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}:{number}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file}:{number}: malformed JSON: {error.msg} at column {error.colno}; expected one JSON object a line"
                ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{file}:{number}: expected a JSON object, found {type(record).__name__}")
            yield number, record


def _prompt(record: Mapping[str, Any], columns: Mapping[str, str], system: str, default_id: str, where: str) -> Prompt:
    values = _named(record, columns, where)
    question = values.get("prompt", values.get("question"))
    if question is None:
        raise ValueError(_missing("prompt or question", "prompt", record, where))
    if values.get("answer") is None:
        raise ValueError(_missing("answer", "answer", record, where))
    answer = _text(values["answer"], "answer", where)
    hints = {name: _text(value, name, where) for name, value in values.items() if value is not None and _is_hint(name)}
    if "####" in answer:
        hints.setdefault("solution", _CALCULATOR.sub("", answer).strip())
        answer = answer.rpartition("####")[2].strip()
    if not answer.strip():
        raise ValueError(f"{where}: the answer is empty")
    messages = _messages(question, where)
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    name = default_id if values.get("id") is None else _text(values["id"], "id", where)
    domain = "" if values.get("domain") is None else _text(values["domain"], "domain", where)
    return Prompt(id=name, messages=messages, answer=answer.strip(), hints=hints, domain=domain)


def _named(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    absent = [theirs for theirs in columns.values() if theirs not in record]
    if absent:
        raise ValueError(
            f"{where}: no column {absent[0]!r}{nearest(absent[0], record)}; the record has {', '.join(record)}; see data.columns"
        )
    unmapped = {name: record[name] for name in KNOWN_COLUMNS if name in record and name not in columns.values()}
    if {"prompt", "question"} & set(columns):
        unmapped = {name: value for name, value in unmapped.items() if name not in ("prompt", "question")}
    return {**unmapped, **{ours: record[theirs] for ours, theirs in columns.items()}}


def _is_hint(name: str) -> bool:
    return name in HINTS or name not in KNOWN_COLUMNS


def _missing(what: str, ours: str, record: Mapping[str, Any], where: str) -> str:
    found = ", ".join(record) or "nothing"
    example = next(iter(record), "column")
    return f"{where}: the record has no {what} (it has {found}); name its column with data.columns, e.g. {{{ours}: {example}}}"


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{where}: {name} must be a text or a number, found {type(value).__name__}")


def _messages(question: Any, where: str) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    shaped = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in turns
    )
    if not shaped:
        raise ValueError(f"{where}: the prompt must be a text or a list of {{role, content}} texts, found {type(question).__name__}")
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise ValueError(f"{where}: the prompt must end with a non-empty user message")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
