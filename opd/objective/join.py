"""What is known of each answer, joined into one immutable record: credit, routes, weights of a batch. Host side, no gradients.

Legend: T completion tokens of one answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from opd_rollout.types import TokenScores
from torch import Tensor

from opd.config.choices import parameters_of, what_it_reads
from opd.credit import AnswerFacts, GroupOutcome, SequenceSignals
from opd.objective.compose import IN_VIEW, keep_field, kept_tokens, length_field, span_field, weight_field
from opd.objective.routes import RouteInput
from opd.objective.terms import Objective, Term
from opd.pooling import Pool, alone
from opd.text.align import last_of_span, single
from opd.types import Judged, Prepared, Sample

Views = Mapping[str, Sequence[tuple[int, ...] | None]]
DATASET, VIEW = "dataset", "view"  # who wrote an answer: see opd.source
"""Source of an answer that the student sampled while it read a signal's view."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """One term's numbers for every answer, in order; advantages is None for terms without."""

    routes: list[float]
    advantages: list[Tensor] | None
    fields: list[dict[str, Tensor]]


def join(
    judged: Sequence[Judged],
    prepared: Sequence[Prepared | None],
    scores: Sequence[Mapping[str, TokenScores]],
    objective: Objective,
    pool: Pool = alone,
    views: Views | None = None,
) -> list[Sample]:
    """One sample an answer, in order. `scores` lacks a signal where the answer has no view for it.

    Where terms learn under a signal's view, each answer that has one is followed by a second sample, with that view for its prompt: the
    same tokens, read by the student in another context. Old log-probs of answers that were sampled under a view are those of whoever sampled.

    Answers without a verdict (status abstain or error) get no credit, leave their group's baseline, and leave terms with group credit.
    pool: values of this rank -> of all ranks, for statistics over the batch; called equally often on every rank.
    """
    assert len(judged) == len(prepared) == len(scores), "one entry an answer"
    scores = [{name: _on_host(one) for name, one in by_signal.items()} for by_signal in scores]
    known = [_signals(*one) for one in zip(judged, prepared, scores, strict=True)]
    shown = {name: (views or {})[name] for name in objective.contexts}
    here = {term.name: [not term.context or shown[term.context][index] is not None for index in range(len(judged))] for term in objective.terms}
    columns = {term.name: _columns(term, judged, known, here[term.name], pool) for term in objective.terms}
    samples = []
    for index, answer in enumerate(judged):
        advantage = {name: found.advantages[index] for name, found in columns.items() if found.advantages is not None}
        route = {name: found.routes[index] for name, found in columns.items()}
        fields = {name: value for found in columns.values() for name, value in found.fields[index].items()}
        one = Sample(judged=answer, scores=scores[index], advantage=advantage, route=route, prepared=prepared[index], fields=fields)
        samples += _in_contexts(one, objective, {name: contexts[index] for name, contexts in shown.items()})
    return samples


def _in_contexts(sample: Sample, objective: Objective, contexts: Mapping[str, tuple[int, ...] | None]) -> list[Sample]:
    """The sample in the student's own context and in every view that a term learns under; each term's route is 0 in the others."""
    completion = sample.judged.completion
    if not contexts:
        if completion.source != VIEW or sample.prepared is None:
            return [sample]
        return [replace(sample, prepared=replace(sample.prepared, old_logp=completion.logprobs))]
    old_logp = completion.logprobs if sample.prepared is None or completion.source == VIEW else sample.prepared.old_logp
    found = []
    for context in ("", *sorted(contexts)):
        ids = contexts.get(context)
        if context and ids is None:
            continue
        fields = {**sample.fields, IN_VIEW: torch.full(old_logp.shape, float(bool(context)))}
        for term in objective.terms:
            if term.context != context:
                fields[keep_field(term.name)] = torch.zeros(old_logp.shape)
            else:
                fields.setdefault(keep_field(term.name), torch.ones(old_logp.shape))
        found.append(
            replace(
                sample,
                judged=sample.judged if ids is None else replace(sample.judged, prompt_ids=ids),
                route={term.name: sample.route[term.name] if term.context == context else 0.0 for term in objective.terms},
                prepared=Prepared(old_logp=old_logp, entropy=old_logp) if sample.prepared is None else replace(sample.prepared, old_logp=old_logp),
                fields=fields,
                context=context,
            )
        )
    return found


def _on_host(scores: TokenScores) -> TokenScores:
    """All but the hidden states, which stay where the learner reads them."""
    small = {name: getattr(scores, name).cpu() for name in ("sampled", "ids", "logp", "tail_logp", "entropy")}
    return replace(scores, **small)


def _signals(answer: Judged, prepared: Prepared | None, scores: Mapping[str, TokenScores]) -> SequenceSignals:
    mask = answer.completion.loss_mask.cpu()
    logp = (answer.completion.logprobs if prepared is None else prepared.old_logp).cpu()
    return SequenceSignals(
        student_logp=logp,
        scores=scores,
        advantage=torch.zeros(mask.shape, dtype=logp.dtype),
        loss_mask=mask,
        entropy=None if prepared is None else prepared.entropy.cpu(),
        topk_logp=None if prepared is None or prepared.topk_logp is None else prepared.topk_logp.cpu(),
        behaviour_logp=answer.completion.logprobs.cpu(),
        versions=answer.completion.versions,
        marks=answer.marks,
    )


def _columns(term: Term, judged: Sequence[Judged], known: Sequence[SequenceSignals], here: Sequence[bool], pool: Pool) -> _Columns:
    """Routes, then advantages, then the weights that join makes: each may depend on those before. here: whether the term's context exists."""
    groups, places = _groups(term, judged, known)
    plain = {number: group_outcome(answers) for number, (answers, _) in groups.items()}  # routes go by the verifier's rewards
    pairs = term.credit is not None and "own_logp" in what_it_reads(term.credit)
    ratios = _logratios(term, judged, known) if pairs else {}
    outcomes = {number: group_outcome(*group, pairs=pairs, logratio=ratios.get(number)) for number, group in groups.items()}
    likelihoods = _likelihoods(term, judged, known)
    routes = []
    for answer, signals, place, present in zip(judged, known, places, here, strict=True):
        asked = RouteInput(
            verdict=answer.verdict,
            has_view=term.view_signal in signals.scores,
            group=plain[answer.group],
            member=place,
            source=answer.completion.source,
            domain=answer.prompt.domain,
            signal=term.view_signal,
            notes=answer.notes,
            **likelihoods.get(answer.group, {}),
        )
        routes.append(term.route(asked) * (present and _applies(term, answer, signals)))
    learned = [index for index, route in enumerate(routes) if route > 0]
    advantages = None
    if term.kind == "surrogate":
        credited = {number: term.credit(outcome) for number, outcome in outcomes.items()} if term.credit is not None else {}
        given = [float(credited[a.group][place]) if credited else 0.0 for a, place in zip(judged, places, strict=True)]
        known = [replace(s, advantage=s.advantage.masked_fill(s.loss_mask, value)) for s, value in zip(known, given, strict=True)]
        known = _chained(term, known, learned, pool)
        advantages = [signals.advantage for signals in known]
    return _Columns(routes=routes, advantages=advantages, fields=_fields(term, known, learned, pool))


def _groups(
    term: Term, judged: Sequence[Judged], known: Sequence[SequenceSignals]
) -> tuple[dict[int, tuple[list[Judged], list[float]]], list[int]]:
    """(answers, shaped rewards) by group number, and each answer's place within its group's tensors."""
    members: dict[int, tuple[list[Judged], list[float]]] = {}
    places = []
    for answer, signals in zip(judged, known, strict=True):
        answers, rewards = members.setdefault(answer.group, ([], []))
        places.append(len(answers))
        answers.append(answer)
        rewards.append(float(answer.verdict.reward) + _shaping(term, answer, signals))
    return members, places


def _likelihoods(term: Term, judged: Sequence[Judged], known: Sequence[SequenceSignals]) -> dict[int, dict[str, Tensor]]:
    """Mean log-probs a loss token of each group's answers, by group number; nothing unless the route reads them."""
    if "likelihood" not in what_it_reads(term.route):
        return {}
    found: dict[int, dict[str, list[Tensor]]] = {}
    for answer, signals in zip(judged, known, strict=True):
        scores = signals.scores.get(term.view_signal)
        means = found.setdefault(answer.group, {"student_logp": [], "signal_logp": []})
        means["student_logp"].append(signals.student_logp[signals.loss_mask].double().mean())
        means["signal_logp"].append(torch.tensor(torch.nan).double() if scores is None else scores.sampled[signals.loss_mask].double().mean())
    return {group: {name: torch.stack(values) for name, values in means.items()} for group, means in found.items()}


def _logratios(term: Term, judged: Sequence[Judged], known: Sequence[SequenceSignals]) -> dict[int, Tensor]:
    """Summed log student - log reference of each group's answers, by group number, for a credit that compares pairs; NaN without a view."""
    reference = parameters_of(term.credit)["reference"] if term.credit else ""
    found: dict[int, list[Tensor]] = {}
    for answer, signals in zip(judged, known, strict=True):
        scores = signals.scores.get(reference)
        gap = torch.full_like(signals.student_logp, torch.nan) if scores is None else signals.student_logp - scores.sampled
        found.setdefault(answer.group, []).append(torch.where(signals.loss_mask, gap, 0.0).double().sum())
    return {group: torch.stack(values) for group, values in found.items()}


def _shaping(term: Term, answer: Judged, signals: SequenceSignals) -> float:
    if not term.shape or not term.signals <= signals.scores.keys():
        return 0.0
    facts = AnswerFacts(length=len(answer.completion.token_ids), text=answer.text, sequence=signals)
    return sum(shaping(facts) for shaping in term.shape)


def group_outcome(
    answers: Sequence[Judged], rewards: Sequence[float] | None = None, *, pairs: bool = False, logratio: Tensor | None = None
) -> GroupOutcome:
    """The outcome of one prompt's answers, in the order given; `rewards` in the place of the verdicts' where a term shapes them.

    An answer of the data beside the student's is none of its outcomes, unless `pairs` are compared. logratio: see GroupOutcome.
    """
    sampled = any(a.completion.source != DATASET for a in answers)
    rewards = [a.verdict.reward for a in answers] if rewards is None else rewards
    return GroupOutcome(
        reward=torch.tensor(rewards, dtype=torch.float64),
        correct=torch.tensor([a.verdict.correct for a in answers]),
        valid=torch.tensor([a.verdict.status == "score" and (pairs or not sampled or a.completion.source != DATASET) for a in answers]),
        length=torch.tensor([len(a.completion.token_ids) for a in answers]),
        truncated=torch.tensor([a.completion.finish == "length" for a in answers]),
        logratio=torch.zeros(len(answers), dtype=torch.float64) if logratio is None else logratio,
    )


def _applies(term: Term, answer: Judged, signals: SequenceSignals) -> bool:
    judged = term.credit is None or answer.verdict.status == "score"
    return judged and term.signals <= signals.scores.keys()


def _chained(term: Term, known: Sequence[SequenceSignals], learned: Sequence[int], pool: Pool) -> list[SequenceSignals]:
    """The answers with the advantages that the term's token credits made of what came before; 0 where the term does not apply."""
    out = [s if index in set(learned) else replace(s, advantage=torch.zeros_like(s.advantage)) for index, s in enumerate(known)]
    for function in term.token_credits:
        chosen = [out[index] for index in learned]
        found = function(chosen, pool) if "batch" in what_it_reads(function) else [function(one) for one in chosen]
        for index, advantage in zip(learned, found, strict=True):
            out[index] = replace(out[index], advantage=advantage.to(out[index].advantage))
    return out


def _aligned(term: Term, signals: SequenceSignals) -> tuple[Tensor, Tensor]:
    """(span of each token under the term's signal, the tokens that the term may learn from): of another tokenizer, what can be compared."""
    length = len(signals.loss_mask)
    numbers, keep = torch.full((length,), -1), torch.ones(length, dtype=torch.bool)
    for name in sorted(term.signals & signals.scores.keys()):
        found = signals.scores[name].span
        own = torch.arange(length) if found is None else found
        numbers = own if name == term.signal else numbers
        chosen = last_of_span(own) if term.support and term.support.kind == "spans" else single(own) if term.support else own >= 0
        keep = keep & chosen
    return numbers, keep


def _fields(term: Term, known: Sequence[SequenceSignals], learned: Sequence[int], pool: Pool) -> list[dict[str, Tensor]]:
    """The term's own columns of every answer: weights and selections made for the batch, and how many tokens count."""
    out: list[dict[str, Tensor]] = [{} for _ in known]
    gated = [replace(s, loss_mask=kept_tokens(term, torch.arange(len(s.loss_mask)), s.loss_mask, {})) for s in known]
    weight = [torch.ones_like(s.advantage) for s in known]
    kept = [s.loss_mask for s in gated]
    for function in term.fields:
        for index, value in zip(learned, function([gated[index] for index in learned], pool), strict=True):
            if value.dtype == torch.bool:
                kept[index] = kept[index] & value
            else:
                weight[index] = weight[index] * value.to(weight[index])
    on_spans = bool(term.support and term.support.kind == "spans")
    aligned = on_spans or any(s.scores[name].span is not None for s in known for name in term.signals & s.scores.keys())
    for index, columns in enumerate(out):
        if aligned:
            numbers, keep = _aligned(term, known[index])
            kept[index] = kept[index] & keep
            columns[keep_field(term.name)] = kept[index]
            if term.support and term.support.kind == "spans":
                columns[span_field(term.name)] = numbers
        if term.fields:
            columns[keep_field(term.name)] = kept[index]
            columns[weight_field(term.name)] = torch.where(kept[index], weight[index], 0.0)
        if term.reduce.kind != "token_mean":
            columns[length_field(term.name)] = kept[index].sum().to(weight[index]).expand(len(kept[index])).contiguous()
    return out
