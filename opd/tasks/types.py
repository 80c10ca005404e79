"""What an embedded task is: generated questions with an exact verifier, disjoint splits and several kinds of privileged hint."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from random import Random

from opd.types import Prompt, Verifier

HINT_TEMPLATES: dict[str, str] = {
    "facts": "F{hint}\n{question}",
    "solution": "S{hint}\n{question}",
    "answer": "A{hint}\n{question}",
    "feedback": "W{hint}\n{question}",
}
"""The bases were trained to read hints in exactly these forms."""

HINT_CHARACTERS = "FSAW\n"

SPLITS = ("pretrain_base", "pretrain_teacher", "train", "dev", "test")
NUM_HELD_OUT = 512
CORPUS_PROMPTS = 4000
_HELD_OUT_BUCKETS = {0: "dev", 1: "test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """An embedded task. prompts(split, seed, difficulty): endless for training splits, finite and seedless for "dev" and "test".

    The pretrain splits carry hints["demonstration"], the text to learn, and may already show a hint. characters: the whole alphabet, a token
    each; empty for a task in words, whose tokenizer is a byte-level BPE. templates: how the base was taught to read each kind of hint.
    num_buckets: a num_buckets-th of all questions is kept for "dev", as many for "test".
    """

    name: str
    prompts: Callable[[str, int, str], Iterator[Prompt]]
    verify: Verifier
    difficulties: tuple[str, ...]
    num_buckets: int
    characters: str = ""
    templates: Mapping[str, str] = field(default_factory=lambda: HINT_TEMPLATES)


def bucket_of(question: str, num_buckets: int) -> str:
    """The one split that may ever show this question, a pure function of its text: one bucket is "dev", one "test", the others "train"."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return _HELD_OUT_BUCKETS.get(int.from_bytes(digest, "big") % num_buckets, "train")


def questions_of(split: str, draw: Callable[[Random], str], rng: Random, num_buckets: int) -> Iterator[str]:
    """Questions of a split's bucket: endless draws for training splits, NUM_HELD_OUT different ones for "dev" and "test"."""
    bucket = split if split in ("dev", "test") else "train"
    seen: set[str] = set()
    while bucket == "train" or len(seen) < NUM_HELD_OUT:
        question = draw(rng)
        if bucket_of(question, num_buckets) == bucket and question not in seen:
            if bucket != "train":
                seen.add(question)
            yield question


def stream_rng(task: str, split: str, seed: int, difficulty: str) -> Random:
    """The generator behind a stream; held-out splits ignore the seed."""
    return Random(f"{task}/{split}/{difficulty}/{0 if split in ('dev', 'test') else seed}")


def with_hint(kind: str, hint: str, question: str, templates: Mapping[str, str] = HINT_TEMPLATES) -> str:
    """The user message that a view of this kind shows; kind "" is the bare question."""
    return templates[kind].format(hint=hint, question=question) if kind else question


def check_split(task: str, split: str, difficulty: str, difficulties: tuple[str, ...]) -> None:
    """Raises ValueError for a split or difficulty that the task lacks."""
    if split not in SPLITS:
        raise ValueError(f"task {task} has no split {split!r}; known: {', '.join(SPLITS)}")
    if difficulty not in difficulties:
        raise ValueError(f"task {task} has no difficulty {difficulty!r}; known: {', '.join(difficulties)}")


def task_corpus(task: Task, difficulty: str) -> list[str]:
    """What a tokenizer of the task is made from: its alphabet, or CORPUS_PROMPTS demonstrations, the same ones for every seed."""
    if task.characters:
        return [task.characters]
    shown = islice(task.prompts("pretrain_base", 0, difficulty or task.difficulties[0]), CORPUS_PROMPTS)
    return [text for prompt in shown for text in (prompt.messages[-1]["content"], prompt.hints["demonstration"])]
