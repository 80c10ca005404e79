"""What an embedded task is: generated questions with an exact verifier, disjoint splits and several kinds of privileged hint."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
_HELD_OUT_BUCKETS = {0: "dev", 1: "test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """An embedded task. prompts(split, seed, difficulty): endless for training splits, finite and seedless for "dev" and "test".

    The pretrain splits carry hints["demonstration"], the text to learn, and may already show a hint. characters: the whole alphabet.
    num_buckets: a num_buckets-th of all questions is kept for "dev", as many for "test".
    """

    name: str
    prompts: Callable[[str, int, str], Iterator[Prompt]]
    verify: Verifier
    characters: str
    difficulties: tuple[str, ...]
    num_buckets: int


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


def with_hint(kind: str, hint: str, question: str) -> str:
    """The user message that a view of this kind shows; kind "" is the bare question."""
    return HINT_TEMPLATES[kind].format(hint=hint, question=question) if kind else question


def check_split(task: str, split: str, difficulty: str, difficulties: tuple[str, ...]) -> None:
    """Raises ValueError for a split or difficulty that the task lacks."""
    if split not in SPLITS:
        raise ValueError(f"task {task} has no split {split!r}; known: {', '.join(SPLITS)}")
    if difficulty not in difficulties:
        raise ValueError(f"task {task} has no difficulty {difficulty!r}; known: {', '.join(difficulties)}")
