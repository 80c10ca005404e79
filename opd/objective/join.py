"""What is known of each answer, joined into one immutable record: group credit, token credit, routes. Host side, no gradients."""

from collections.abc import Mapping, Sequence

import torch
from opd_rollout.types import TokenScores
from torch import Tensor

from opd.credit import GroupOutcome, SequenceSignals
from opd.objective.compose import kept_positions, length_field
from opd.objective.routes import RouteInput
from opd.objective.terms import Objective, Term
from opd.types import Judged, Prepared, Sample


def join(
    judged: Sequence[Judged], prepared: Sequence[Prepared | None], scores: Sequence[Mapping[str, TokenScores]], objective: Objective
) -> list[Sample]:
    """One sample an answer, in order. `scores` lacks a signal where the answer has no view for it.

    Answers without a verdict (status abstain or error) get no credit, leave their group's baseline, and leave terms with group credit.
    """
    assert len(judged) == len(prepared) == len(scores), "one entry an answer"
    outcomes, places = _groups(judged)
    credits = {(term.name, group): term.credit(outcome) for term in objective.terms if term.credit is not None for group, outcome in outcomes.items()}
    samples = []
    for index, answer in enumerate(judged):
        group, place = answer.group, places[index]
        advantage, route, fields = {}, {}, {}
        for term in objective.terms:
            given = float(credits[term.name, group][place]) if term.credit is not None else 0.0
            asked = RouteInput(verdict=answer.verdict, has_view=term.view_signal in scores[index], group=outcomes[group], member=place)
            route[term.name] = term.route(asked) * _applies(term, answer, scores[index])
            if term.kind == "surrogate":
                advantage[term.name] = _advantage(term, answer, prepared[index], scores[index], given)
            if term.reduce.kind != "token_mean":
                fields[length_field(term.name)] = _lengths(term, answer)
        samples.append(Sample(judged=answer, scores=scores[index], advantage=advantage, route=route, prepared=prepared[index], fields=fields))
    return samples


def _groups(judged: Sequence[Judged]) -> tuple[dict[int, GroupOutcome], list[int]]:
    """Outcomes by group number, and each answer's place within its group's tensors."""
    members: dict[int, list[Judged]] = {}
    places = []
    for answer in judged:
        group = members.setdefault(answer.group, [])
        places.append(len(group))
        group.append(answer)
    return {number: group_outcome(group) for number, group in members.items()}, places


def group_outcome(answers: Sequence[Judged]) -> GroupOutcome:
    """The outcome of one prompt's answers, in the order given."""
    return GroupOutcome(
        reward=torch.tensor([float(a.verdict.reward) for a in answers], dtype=torch.float64),
        correct=torch.tensor([a.verdict.correct for a in answers]),
        valid=torch.tensor([a.verdict.status == "score" for a in answers]),
        length=torch.tensor([len(a.completion.token_ids) for a in answers]),
        truncated=torch.tensor([a.completion.finish == "length" for a in answers]),
    )


def _applies(term: Term, answer: Judged, scores: Mapping[str, TokenScores]) -> bool:
    judged = term.credit is None or answer.verdict.status == "score"
    return judged and term.signals <= scores.keys()


def _advantage(term: Term, answer: Judged, prepared: Prepared | None, scores: Mapping[str, TokenScores], group_credit: float) -> Tensor:
    mask = answer.completion.loss_mask
    if term.token_credit is None:
        return torch.where(mask, group_credit, 0.0).to(torch.float32)
    if not term.signals <= scores.keys():
        return torch.zeros(mask.shape)
    student_logp = answer.completion.logprobs if prepared is None else prepared.old_logp
    signals = SequenceSignals(student_logp=student_logp, scores=scores, group_credit=group_credit, loss_mask=mask)
    return term.token_credit(signals)


def _lengths(term: Term, answer: Judged) -> Tensor:
    mask = answer.completion.loss_mask
    counted = kept_positions(term, torch.arange(len(mask), device=mask.device), mask).sum()
    return counted.to(torch.float32).expand(len(mask)).contiguous()
