"""One stage for every signal: live, frozen, averaged and external weights, under any number of views.

Legend: T completion tokens, K support size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opd_kernels import HeadView
from opd_rollout.types import ScoreRequest, TokenScores

from opd.objective.terms import SignalNeeds
from opd.types import Judged, Meter, Prepared

Views = Mapping[str, Sequence[tuple[int, ...] | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A scorer: `scores` in the order of the requests; `head` gives the head behind its hidden states, None where it hands out none."""

    scores: Callable[[Sequence[ScoreRequest]], list[TokenScores]]
    head: Callable[[], HeadView] | None = None


class SignalScorer:
    """Scores every answer under every signal that the objective reads (opd.loop.TeacherScorer)."""

    def __init__(self, weights: Mapping[str, Weights], needs: Mapping[str, SignalNeeds]) -> None:
        """weights: signal -> its scorer. Raises ValueError where a signal is missing or cannot deliver what a term asks for."""
        for name, need in needs.items():
            if name not in weights:
                known = ", ".join(sorted(weights)) or "none"
                raise ValueError(f"the objective reads signal {name!r}; declared: {known}. Add signals.{name}")
            if need.k and need.student_support:
                raise ValueError(
                    f"signal {name!r} serves both a student_topk and a teacher_topk support; declare a second signal with the same weights"
                )
            if need.hidden and weights[name].head is None:
                raise ValueError(
                    f"signal {name!r} comes from a scorer without hidden states and cannot serve support full; use teacher_topk or student_topk"
                )
        self.weights, self._needs = dict(weights), dict(needs)
        self._meters: dict[str, Meter] = {}

    def score(
        self, judged: Sequence[Judged], views: Views, prepared: Sequence[Prepared | None]
    ) -> list[Mapping[str, TokenScores]]:
        """Signal -> scores for each answer, without the signals that have nothing to show it (context None in `views`)."""
        found: list[dict[str, TokenScores]] = [{} for _ in judged]
        self._meters, num_tokens = {}, 0
        for name, need in self._needs.items():
            contexts = views[name]
            assert len(contexts) == len(judged) == len(prepared), "one context and one preparation an answer"
            chosen = [index for index, context in enumerate(contexts) if context is not None]
            requests = [_request(judged[index], contexts[index], prepared[index], need) for index in chosen]
            scores = self.weights[name].scores(requests)  # also without requests: the passes of a sharded student are collective
            for index, request, one in zip(chosen, requests, scores, strict=True):
                _check_coverage(name, request, one)
                found[index][name] = one
            num_tokens += sum(len(request.context_ids) + len(request.completion_ids) for request in requests)
            self._meters[f"views/{name}"] = Meter(sum=float(len(chosen)), count=float(len(judged)))
        self._meters["tokens/teacher"] = Meter(sum=float(num_tokens), count=1.0)
        return found

    def heads(self) -> Mapping[str, HeadView]:
        """Heads of the signals with hidden states, good for the coming learner step."""
        heads = {}
        for name, need in self._needs.items():
            make = self.weights[name].head
            if need.hidden and make is not None:
                heads[name] = make()
        return heads

    def meters(self) -> Mapping[str, Meter]:
        """Of the last `score`: tokens scored (context included) and the share of answers that each signal had a view for."""
        return self._meters


def _request(judged: Judged, context: tuple[int, ...] | None, prepared: Prepared | None, need: SignalNeeds) -> ScoreRequest:
    assert context is not None
    support_ids = None
    if need.student_support:
        assert prepared is not None and prepared.topk_ids is not None, "the learner prepares the ids of a student_topk support"
        support_ids = prepared.topk_ids
    return ScoreRequest(
        context_ids=context, completion_ids=judged.completion.token_ids, support_ids=support_ids, k=need.k, draws=need.draws, hidden=need.hidden
    )


def _check_coverage(name: str, request: ScoreRequest, scores: TokenScores) -> None:
    """Every completion token has a score; a scorer that returned fewer, or other columns, would shift all that follow."""
    length = len(request.completion_ids)
    assert scores.sampled.shape == (length,), f"signal {name!r}: {tuple(scores.sampled.shape)} scores for {length} tokens"
    if request.support_ids is not None:
        assert scores.ids.shape == request.support_ids.shape, f"signal {name!r} answered other ids than were asked for"
    assert not request.draws or scores.ids.shape == (length, request.draws), f"signal {name!r} cannot draw ids"
    assert not request.hidden or (scores.hidden is not None and len(scores.hidden) == length), f"signal {name!r}: hidden states are missing"
