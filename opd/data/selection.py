"""Which prompts to train on: not those of an exam, and those that the base model solves sometimes. Pure functions on prompts."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from opd.types import Prompt

_WORD = re.compile(r"\w+")
_FEWEST_WORDS = 6  # of an exam's question that is looked for inside a longer text: fewer stand anywhere


def contaminated(prompts: Sequence[Prompt], exam: Iterable[Prompt], *, ngram: int = 13) -> dict[str, str]:
    """id of a prompt -> id of the exam's problem whose text it shares: `ngram` words in a row, or the whole of a shorter question of the exam.

    A question of fewer than six words is no evidence inside a longer text, and counts where it is all of it. Case and punctuation do not
    count. 13 words: the length that GPT-3's authors took (arXiv 2005.14165, appendix C).
    """
    shares = overlap(exam, ngram=ngram)
    return {prompt.id: theirs for prompt in prompts if (theirs := shares(prompt)) is not None}


def overlap(exam: Iterable[Prompt], *, ngram: int = 13) -> Callable[[Prompt], str | None]:
    """A function that gives the id of the exam's problem whose text a prompt shares (see `contaminated`), or None."""
    grams: dict[tuple[str, ...], str] = {}
    for problem in exam:
        for gram in _grams(_words(problem), ngram):
            grams.setdefault(gram, problem.id)
    lengths = [ngram, *sorted({len(gram) for gram in grams if _FEWEST_WORDS <= len(gram) < ngram}, reverse=True)]

    def shares(prompt: Prompt) -> str | None:
        words = _words(prompt)
        return next((grams[gram] for length in lengths for gram in _grams(words, length) if gram in grams), None)

    return shares


def pass_rates(generations: str | Path) -> dict[str, float]:
    """Prompt id -> share of right answers among the judged ones, from a generations file that `opd eval` wrote."""
    right: dict[str, list[bool]] = {}
    for number, line in enumerate(Path(generations).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if record["status"] == "score":
                right.setdefault(record["problem"], []).append(bool(record["correct"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{generations}:{number}: not a line of a generations file ({error!r}); make one with opd eval") from None
    return {name: sum(answers) / len(answers) for name, answers in right.items()}


def between(prompts: Sequence[Prompt], rates: Mapping[str, float], low: float, high: float) -> list[Prompt]:
    """Prompts whose pass rate lies in [low, high]. Raises ValueError for a prompt without a rate, and where none is left."""
    unknown = [prompt.id for prompt in prompts if prompt.id not in rates]
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(prompts)} prompts have no pass rate (first: {unknown[0]!r}); evaluate all of them first")
    kept = [prompt for prompt in prompts if low <= rates[prompt.id] <= high]
    if not kept:
        raise ValueError(f"no prompt has a pass rate from {low:g} to {high:g}; widen data.pass_rate")
    return kept


def _words(prompt: Prompt) -> list[str]:
    return _WORD.findall(" ".join(message["content"] for message in prompt.messages if message["role"] != "system").lower())


def _grams(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    if len(words) < length:
        return [tuple(words)]
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))
