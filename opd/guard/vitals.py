"""What a step's answers look like as texts: the numbers that guard rails watch besides the learner's own. Pure functions on token ids and texts.

Legend: T completion tokens of an answer. Every number is a mean over answers (or a share of them); what cannot be said is left out.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np

from opd.text.token_class import class_shares
from opd.types import Judged

Contexts = Mapping[str, Sequence[tuple[int, ...] | None]]
EARLY_SHARE, EARLY_CHARACTERS = 0.15, 80
_FACTOR = 0x9E3779B97F4A7C15


def text_vitals(judged: Sequence[Judged], views: Callable[[Sequence[Judged]], Contexts], *, answers: int, ngram: int) -> dict[str, float]:
    """Metrics text/... of the first answers of a step, whole groups up to about `answers` of them; {} without any.

    views: the signals' contexts, as the step made them. ngram: tokens in a row that make a leak.
    """
    chosen = [one for one in whole_groups(judged, answers) if one.completion.token_ids and one.completion.source not in ("dataset", "replay")]
    if not chosen:
        return {}
    ids = [one.completion.token_ids for one in chosen]
    shares = [class_shares(one.text) for one in chosen]
    found: dict[str, float | None] = {
        "text/distinct_2": distinct(ids, 2),
        "text/repeated_4": fmean(repeated(one, 4) for one in ids),
        "text/duplicates": duplicates(chosen),
        "text/style": fmean(one["style"] for one in shares),
        "text/filler": fmean(one["filler"] for one in shares),
        "text/announced": announced(chosen),
    }
    for signal, contexts in views(chosen).items():
        found[f"text/leak/{signal}"] = leaked(chosen, contexts, ngram)
    return {name: value for name, value in found.items() if value is not None}


def whole_groups(judged: Sequence[Judged], answers: int) -> list[Judged]:
    """The first groups of a step, until they hold `answers` answers: views may show an answer its siblings."""
    groups: dict[int, list[Judged]] = defaultdict(list)
    for one in judged:
        groups[one.group].append(one)
    chosen: list[Judged] = []
    for members in groups.values():
        if chosen and len(chosen) + len(members) > answers:
            break
        chosen += members
    return chosen


def ngrams(ids: Sequence[int], n: int) -> np.ndarray:
    """A 64-bit code for each run of n tokens, [max(0, T - n + 1)] uint64; equal runs have equal codes."""
    tokens = np.asarray(ids, dtype=np.uint64) + np.uint64(1)
    if len(tokens) < n:
        return np.zeros(0, dtype=np.uint64)
    codes, length = tokens, 1
    for bit in f"{n:b}"[1:]:  # twice the length, and one more where the bit says so: the code of two runs in a row is known from theirs
        codes, length = codes[:-length] * np.uint64(pow(_FACTOR, length, 2**64)) + codes[length:], 2 * length
        if bit == "1":
            codes, length = codes[:-1] * np.uint64(_FACTOR) + tokens[length:], length + 1
    return codes


def distinct(answers: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams over all n-grams of all answers together (distinct-n, arXiv:1510.03055); None without any."""
    codes = np.concatenate([ngrams(ids, n) for ids in answers])
    return len(np.unique(codes)) / len(codes) if len(codes) else None


def repeated(ids: Sequence[int], n: int) -> float:
    """Share of an answer's n-grams that stood in it before; 0 where it is too short to have two."""
    codes = ngrams(ids, n)
    return 1.0 - len(np.unique(codes)) / len(codes) if len(codes) else 0.0


def duplicates(judged: Sequence[Judged]) -> float | None:
    """Share of answers that some other prompt got too, word for word; None with fewer than two prompts."""
    asked: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for one in judged:
        asked[one.completion.token_ids].add(one.prompt.id)
    if len({one.prompt.id for one in judged}) < 2:
        return None
    return fmean(float(len(asked[one.completion.token_ids]) > 1) for one in judged)


def announced(judged: Sequence[Judged]) -> float | None:
    """Share of answers whose first 15 % already names the expected answer as a whole word.

    Counts answers of at least 80 characters whose question does not name it; None without any.
    """
    counted = []
    for one in judged:
        expected = (one.prompt.answer or "").strip()
        word = re.compile(rf"(?<!\w){re.escape(expected)}(?!\w)") if expected else None
        if word is None or len(one.text) < EARLY_CHARACTERS or any(word.search(message["content"]) for message in one.prompt.messages):
            continue
        counted.append(float(bool(word.search(one.text[: int(EARLY_SHARE * len(one.text))]))))
    return fmean(counted) if counted else None


def leaked(judged: Sequence[Judged], contexts: Sequence[tuple[int, ...] | None], n: int) -> float | None:
    """Share of answers with a run of n tokens that stands in their teacher's view and not in their prompt; None without views."""
    counted = []
    for one, context in zip(judged, contexts, strict=True):
        if context is not None and context != one.prompt_ids:
            privileged = set(ngrams(context, n).tolist()) - set(ngrams(one.prompt_ids, n).tolist())
            counted.append(float(not privileged.isdisjoint(ngrams(one.completion.token_ids, n).tolist())))
    return fmean(counted) if counted else None
