"""samples/step-*.jsonl: one line an answer, with everything that is known of each of its tokens.

Legend: T completion tokens, K entries of a top-k list. Numbers are rounded to four decimals; what is not known is null.

{"step", "prompt_id", "group", "member", "question", "expected", "text", "views": {signal: text or null}, "status", "reward", "correct",
 "feedback", "finish", "tokens": [T texts], "student_logp": [T], "behaviour_logp": [T], "entropy": [T] or null,
 "student_topk": [T lists of [text, logp]] or null,
 "signals": {signal: {"logp": [T], "entropy": [T], "tail": [T], "topk": [T lists of [text, logp]]}},
 "advantage": {term: [T]}, "weight": {term: [T]}, "versions": [[version, first, end]], "classes": [T], "columns": {name: [T]}}

tail: probability outside the ids that the teacher's scores hold. weight: the route's factor on loss tokens. classes: places in
opd.text.token_class.CLASSES. columns: loss/<term>, loss/total, ratio/<term>, tail_mass/<side>/<term> as the update saw them.

Top-k lists come from the step where it had them. With `Readers`, missing ones (and the student's entropy) are those of the weights just after
the step: near enough to read, not what the loss saw.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from opd_rollout.types import ScoreRequest, TokenScores
from torch import Tensor

from opd.text.token_class import CLASSES, token_classes
from opd.types import Judged, Sample
from opd.viewer.columns import spread

SHOWN_TOPK = 8
Contexts = Mapping[str, Sequence[tuple[int, ...] | None]]
Scorer = Callable[[Sequence[ScoreRequest]], list[TokenScores]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Scores the shown answers once more for their top-k: the student (None: it cannot score for one rank alone), and signals' teachers."""

    student: Scorer | None
    teachers: Mapping[str, Scorer]


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> Any: ...


def write_samples(
    path: Path,
    step: int,
    samples: Sequence[Sample],
    *,
    tokenizer: Decoder,
    num_samples: int,
    texts_in_table: bool = True,
    contexts: Callable[[Sequence[Judged]], Contexts] | None = None,
    readers: Readers | None = None,
    columns: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> list[list[Any]]:
    """Write up to `num_samples` answers, evenly spread over the step's, and return their rows for a table (question, answer, reward,
    correct, finish), empty when `texts_in_table` is false.

    contexts: the views' token ids of all answers, the same function that the step used; without it views are not shown. columns: the
    learner's columns of the answer at a place.
    """
    places = spread(len(samples), num_samples)
    views = contexts([sample.judged for sample in samples]) if contexts else {}

    @cache  # the top-k lists show the same few tokens thousands of times
    def text_of(ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    def decode(ids: Sequence[int]) -> str:
        return text_of(tuple(ids))

    records = []
    for n in places:
        texts = {signal: None if ids[n] is None else decode(ids[n]) for signal, ids in views.items()}
        record = sample_record(samples[n], step=step, decode=decode, views=texts)
        record["columns"] = {name: _numbers(values, 7) for name, values in (columns(n) if columns else {}).items()}
        if readers is not None:
            _complete(record, samples[n], {signal: ids[n] for signal, ids in views.items()}, readers, decode)
        records.append(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text("".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records), encoding="utf-8")
    scratch.replace(path)
    if not texts_in_table:
        return []
    return [[record["question"], record["text"], record["reward"], record["correct"], record["finish"]] for record in records]


def sample_record(
    sample: Sample, *, step: int, decode: Callable[[Sequence[int]], str], views: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """One line of a samples file. decode: token ids -> text, special tokens included. views: signal -> what it read."""
    judged, prepared, completion = sample.judged, sample.prepared, sample.judged.completion
    mask = completion.loss_mask.to(torch.float32)
    verdict, tokens = judged.verdict, [decode([token]) for token in completion.token_ids]
    return {
        "step": step,
        "prompt_id": judged.prompt.id,
        "group": judged.group,
        "member": judged.member,
        "question": judged.prompt.messages[-1]["content"],
        "expected": judged.prompt.answer,
        "text": judged.text,
        "views": dict(views or {}),
        "status": verdict.status,
        "reward": verdict.reward,
        "correct": verdict.correct,
        "feedback": verdict.feedback,
        "finish": completion.finish,
        "tokens": tokens,
        "student_logp": _numbers(completion.logprobs if prepared is None else prepared.old_logp),
        "behaviour_logp": _numbers(completion.logprobs),
        "entropy": None if prepared is None else _numbers(prepared.entropy),
        "student_topk": None if prepared is None or prepared.topk_ids is None else _topk(prepared.topk_ids, prepared.topk_logp, decode),
        "signals": {name: _signal(scores, decode) for name, scores in sample.scores.items()},
        "advantage": {term: _numbers(values) for term, values in sample.advantage.items()},
        "weight": {term: _numbers(factor * mask) for term, factor in sample.route.items()},
        "versions": [list(span) for span in completion.versions],
        "classes": [CLASSES.index(name) for name in token_classes(tokens, judged.prompt.answer)],
        "columns": {},
    }


def _complete(
    record: dict[str, Any], sample: Sample, contexts: Mapping[str, tuple[int, ...] | None], readers: Readers, decode: Callable[[Sequence[int]], str]
) -> None:
    """Fill in the top-k lists that the step did not need."""
    completion_ids = sample.judged.completion.token_ids
    if not completion_ids:
        return
    if record["student_topk"] is None and readers.student is not None:
        [scores] = readers.student([ScoreRequest(context_ids=sample.judged.prompt_ids, completion_ids=completion_ids, k=SHOWN_TOPK)])
        record["student_topk"] = _topk(scores.ids, scores.logp, decode)
        record["entropy"] = record["entropy"] or _numbers(scores.entropy)
    for signal, shown in record["signals"].items():
        context = contexts.get(signal)
        if context is not None and signal in readers.teachers and max(map(len, shown["topk"])) <= 1:
            [scores] = readers.teachers[signal]([ScoreRequest(context_ids=context, completion_ids=completion_ids, k=SHOWN_TOPK)])
            shown["topk"], shown["tail"] = _topk(scores.ids, scores.logp, decode), _numbers(scores.tail_logp.exp())


def _signal(scores: TokenScores, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    found = {"logp": _numbers(scores.sampled), "entropy": _numbers(scores.entropy), "tail": _numbers(scores.tail_logp.exp())}
    return {**found, "topk": _topk(scores.ids, scores.logp, decode)}


def _topk(ids: Tensor, logp: Tensor | None, decode: Callable[[Sequence[int]], str]) -> list[list[list[Any]]]:
    assert logp is not None
    rows = []
    for row_ids, row_logp in zip(ids.tolist(), logp.tolist(), strict=True):
        known = {token: value for token, value in zip(row_ids, row_logp, strict=True) if token >= 0}
        best = sorted(known.items(), key=lambda item: -item[1])[:SHOWN_TOPK]
        rows.append([[decode([token]), _number(value)] for token, value in best])
    return rows


def _numbers(values: Tensor, digits: int = 4) -> list[float | None]:
    return [_number(value, digits) for value in values.tolist()]


def _number(value: float, digits: int = 4) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
