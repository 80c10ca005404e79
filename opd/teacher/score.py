"""One stage for every signal: live, frozen, averaged and external weights, under any number of views.

Legend: T completion tokens, K support size.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opd_kernels import HeadView
from opd_rollout.types import ScoreRequest, TokenScores
from torch import Tensor

from opd.objective.supports import first_occurrence
from opd.objective.terms import SignalNeeds
from opd.types import Judged, Meter, Prepared

Views = Mapping[str, Sequence[tuple[int, ...] | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A scorer: `scores` in the order of the requests; `head` gives the head behind its hidden states, None where it hands out none.

    read: tokens of the last call (context included) whose scores no model made, because they lay in a file; None where there is no file.
    actors: requests that wait and what its actors do (opd.run.roles), None for a scorer in this process.
    """

    scores: Callable[[Sequence[ScoreRequest]], list[TokenScores]]
    head: Callable[[], HeadView] | None = None
    read: Callable[[], int] | None = None
    actors: Callable[[], tuple[int, Sequence[Any]]] | None = None


class SignalScorer:
    """Scores every answer under every signal that the objective reads (opd.loop.TeacherScorer)."""

    def __init__(self, weights: Mapping[str, Weights], needs: Mapping[str, SignalNeeds]) -> None:
        """weights: signal -> its scorer. Raises ValueError where a signal is missing or cannot deliver what a term asks for."""
        for name, need in needs.items():
            if name not in weights:
                known = ", ".join(sorted(weights)) or "none"
                raise ValueError(f"the objective reads signal {name!r}; declared: {known}. Add signals.{name}")
            if (need.k > 0) + need.student_support + (need.union > 0) > 1:
                raise ValueError(
                    f"signal {name!r} serves two of the supports student_topk, teacher_topk and union; declare a second signal with the same weights"
                )
            if need.hidden and weights[name].head is None:
                raise ValueError(
                    f"signal {name!r} comes from a scorer without hidden states and cannot serve support full; use teacher_topk or student_topk"
                )
        self.weights, self._needs, self._scored = dict(weights), dict(needs), dict(needs)
        self._meters: dict[str, Meter] = {}

    def score(
        self, judged: Sequence[Judged], views: Views, prepared: Sequence[Prepared | None], only: Collection[str] | None = None
    ) -> list[Mapping[str, TokenScores]]:
        """Signal -> scores for each answer, without the signals that have nothing to show it (context None in `views`).

        only: the signals that a term of this step reads; the others are left out.
        """
        self._scored = {name: need for name, need in self._needs.items() if only is None or name in only}
        found: list[dict[str, TokenScores]] = [{} for _ in judged]
        self._meters, num_tokens, num_read = {}, 0, [0] * any(weights.read is not None for weights in self.weights.values())
        joint: list[Tensor | None] = [None] * len(judged)
        if any(need.union for need in self._scored.values()):
            joint, num_tokens = self._joint_ids(judged, views, prepared)
        for name, need in self._scored.items():
            contexts = views[name]
            assert len(contexts) == len(judged) == len(prepared), "one context and one preparation an answer"
            chosen = [index for index, context in enumerate(contexts) if context is not None]
            requests = [_request(judged[index], contexts[index], prepared[index], joint[index], need) for index in chosen]
            scores = self.weights[name].scores(requests)  # also without requests: the passes of a sharded student are collective
            for index, request, one in zip(chosen, requests, scores, strict=True):
                _check_coverage(name, request, one)
                found[index][name] = one
            num_tokens += sum(map(num_positions, requests))
            if (read := self.weights[name].read) is not None:
                num_tokens -= read()
                num_read.append(read())
            self._meters[f"views/{name}"] = Meter(sum=float(len(chosen)), count=float(len(judged)))
        self._meters["tokens/teacher"] = Meter(sum=float(num_tokens), count=1.0)
        if num_read:
            self._meters["tokens/teacher_read"] = Meter(sum=float(sum(num_read)), count=1.0)
        return found

    def _joint_ids(
        self, judged: Sequence[Judged], views: Views, prepared: Sequence[Prepared | None]
    ) -> tuple[list[Tensor | None], int]:
        """The ids of the support "union" of each answer [T, K], and how many tokens passed through teachers for them.

        A pass of every signal for its own likeliest ids, before the one that scores all of them: exact on all sides, at twice the price.
        """
        parts = [[_students_ids(one)] for one in prepared]
        num_tokens = 0
        for name, need in self._scored.items():
            if not need.union:
                continue
            chosen = [index for index, context in enumerate(views[name]) if context is not None]
            asked = [_request(judged[index], views[name][index], None, None, SignalNeeds(k=need.union)) for index in chosen]
            for index, scores in zip(chosen, self.weights[name].scores(asked), strict=True):
                parts[index].append(scores.ids[:, 1:].cpu())
            num_tokens += sum(map(num_positions, asked))
        return [joined_ids(ids) for ids in parts], num_tokens

    def heads(self) -> Mapping[str, HeadView]:
        """Heads of the scored signals with hidden states, good for the coming learner step."""
        heads = {}
        for name, need in self._scored.items():
            make = self.weights[name].head
            if need.hidden and make is not None:
                heads[name] = make()
        return heads

    def meters(self) -> Mapping[str, Meter]:
        """Of the last `score`: tokens that models scored and those read from a file, and the share of answers that each signal had a view for."""
        return self._meters


def num_positions(request: ScoreRequest) -> int:
    """Tokens of a request, context included."""
    return len(request.context_ids) + len(request.completion_ids)


def joined_ids(parts: Sequence[Tensor]) -> Tensor:
    """Columns of ids [T, .] side by side [T, K], every id of a row once: -1 in the place of pads and of those that stood before."""
    ids = torch.cat([part.long() for part in parts], dim=-1)
    return torch.where(first_occurrence(ids), ids, -1)


def _students_ids(prepared: Prepared | None) -> Tensor:
    assert prepared is not None and prepared.topk_ids is not None, "the learner prepares the ids of the supports student_topk and union"
    return prepared.topk_ids.cpu()


def _request(
    judged: Judged, context: tuple[int, ...] | None, prepared: Prepared | None, joint: Tensor | None, need: SignalNeeds
) -> ScoreRequest:
    assert context is not None
    support_ids = joint if need.union else _students_ids(prepared) if need.student_support or need.unpaired else None
    return ScoreRequest(
        context_ids=context, completion_ids=judged.completion.token_ids, support_ids=support_ids, k=need.k, draws=need.draws, hidden=need.hidden
    )


def _check_coverage(name: str, request: ScoreRequest, scores: TokenScores) -> None:
    """Every completion token has a score; a scorer that returned fewer, or other columns, would shift all that follow."""
    length = len(request.completion_ids)
    assert scores.sampled.shape == (length,), f"signal {name!r}: {tuple(scores.sampled.shape)} scores for {length} tokens"
    if request.support_ids is not None:
        width = request.support_ids.shape[1] + request.k
        assert scores.ids.shape == (length, width), f"signal {name!r} answered other ids than were asked for"
    assert not request.draws or scores.ids.shape == (length, request.draws), f"signal {name!r} cannot draw ids"
    assert not request.hidden or (scores.hidden is not None and len(scores.hidden) == length), f"signal {name!r}: hidden states are missing"
