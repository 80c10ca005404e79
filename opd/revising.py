"""Answers that the student revises itself: it is told whether its attempt is right, in words, and goes on writing (SD-Zero, arXiv 2604.12002).

What comes back is one completion: attempt, phrase and revision, under the verdict on the revision.

Legend: T tokens of attempt, phrase and revision together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from opd_rollout.engine import Engine
from opd_rollout.sampling import request_seed
from opd_rollout.types import Completion, GenerateRequest, Sampling

from opd.types import Judged, Meter, Verifier
from opd.verify import judge_all
from opd.writing import Source

REVISION = "revision"
"""Name of the mark on the tokens of the second attempt, for the weight `marked`."""

PHRASE_TOKENS = 64
"""Longest phrase with what stands around it, tokens: the room that a prompt loses beside two answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrases:
    """What is put after an attempt, by its verdict, with `between` before and after it."""

    right: str
    wrong: str
    between: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pen:
    """What a revision is written and judged with. tokenize: plain text -> ids. decode: ids -> text. seed: of the run."""

    engine: Engine
    verify: Verifier
    tokenize: Callable[[str], tuple[int, ...]]
    decode: Callable[[Sequence[int]], str]
    sampling: Sampling
    seed: int


class RevisedSource:
    """A source whose answers the student revises (opd.loop.RolloutSource). Raises ValueError for phrases that are too long."""

    def __init__(self, source: Source, phrases: Phrases, pen: Pen) -> None:
        self._source, self._pen = source, pen
        self._glue = {
            correct: pen.tokenize(phrases.between + (phrases.right if correct else phrases.wrong) + phrases.between) for correct in (True, False)
        }
        longest = max(map(len, self._glue.values()))
        if longest > PHRASE_TOKENS:
            raise ValueError(f"rollout.revise: a phrase has {longest} tokens; shorten it to {PHRASE_TOKENS}, `between` on both sides included")
        self._meters: dict[str, Meter] = {}

    def collect(self, step: int, metrics: Mapping[str, float] | None = None) -> list[Judged]:
        """The source's answers with their revisions. Those that got no verdict cannot be revised and leave the loss."""
        judged = self._source.collect(step, metrics or {})
        chosen = [index for index, one in enumerate(judged) if one.verdict.status == "score"]
        starts = {index: attempt(judged[index].completion, self._pen.sampling.stop_ids) for index in chosen}
        requests = [
            GenerateRequest(
                prompt_ids=(*judged[index].prompt_ids, *start.token_ids, *self._glue[judged[index].verdict.correct]),
                seed=request_seed(self._pen.seed, f"{judged[index].prompt.id}/{REVISION}", judged[index].member, step),
            )
            for index, start in starts.items()
        ]
        written = self._pen.engine.generate(requests, self._pen.sampling) if requests else []
        texts = [self._pen.decode(one.token_ids) for one in written]
        verdicts = judge_all(self._pen.verify, [(judged[index].prompt, text) for index, text in zip(chosen, texts, strict=True)])
        out = [_unheard(one) for one in judged]
        for index, revision, verdict in zip(chosen, written, verdicts, strict=True):
            glue = self._glue[judged[index].verdict.correct]
            completion = joined(starts[index], glue, revision)
            mark = torch.zeros(len(completion.token_ids), dtype=torch.bool)
            mark[len(mark) - len(revision.token_ids) :] = True
            text = self._pen.decode(completion.token_ids)
            marks = {**judged[index].marks, REVISION: mark}
            out[index] = replace(judged[index], completion=completion, text=text, verdict=verdict, marks=marks)
        self._account(sum(len(one.token_ids) for one in written), [verdict.correct for verdict in verdicts if verdict.status == "score"])
        return out

    def meters(self) -> Mapping[str, Meter]:
        """The source's (its accuracy is that of the first attempts), with the revisions' tokens, and the revisions' accuracy."""
        return {**self._source.meters(), **self._meters}

    def totals(self) -> Mapping[str, int]:
        return self._source.totals()

    def state(self) -> dict[str, Any]:
        return self._source.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._source.load_state(state)

    def _account(self, tokens: int, correct: Sequence[bool]) -> None:
        before = self._source.meters().get("tokens/student", Meter(sum=0.0, count=1.0))
        self._meters = {"tokens/student": Meter(sum=before.sum + tokens, count=before.count)}
        if correct:
            self._meters["accuracy/revision"] = Meter(sum=float(sum(correct)), count=float(len(correct)))


def attempt(completion: Completion, stop_ids: Sequence[int]) -> Completion:
    """The completion without the id that ended it."""
    length = len(completion.token_ids)
    if length and completion.token_ids[-1] in stop_ids:
        length -= 1
    return replace(completion, token_ids=completion.token_ids[:length], logprobs=completion.logprobs[:length], versions=_cut(completion, length))


def joined(start: Completion, glue: tuple[int, ...], revision: Completion) -> Completion:
    """Attempt, phrase (which no policy sampled: NaN log-probs) and revision as one completion [T], all in the loss."""
    offset = len(start.token_ids) + len(glue)
    token_ids = (*start.token_ids, *glue, *revision.token_ids)
    return replace(
        revision,
        token_ids=token_ids,
        logprobs=torch.cat([start.logprobs, torch.full((len(glue),), float("nan")), revision.logprobs]),
        loss_mask=torch.ones(len(token_ids), dtype=torch.bool),
        source=start.source,
        versions=(*start.versions, *((version, offset + first, offset + end) for version, first, end in revision.versions)),
    )


def _cut(completion: Completion, length: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((version, first, min(end, length)) for version, first, end in completion.versions if first < length)


def _unheard(one: Judged) -> Judged:
    return replace(one, completion=replace(one.completion, loss_mask=torch.zeros_like(one.completion.loss_mask)))
