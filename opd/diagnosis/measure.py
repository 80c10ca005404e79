"""A diagnosis: the student's rollouts, each candidate's scores of them, the success rates after its tokens, and the figures made of these.

Legend: T tokens of an answer, C tried tokens of a node, K tokens of a top-k list, S nodes.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
from opd_kernels import HeadView, selected_logprobs, topk_logprobs
from opd_rollout.types import ScoreRequest, TokenScores
from torch import Tensor

from opd.build.system import Parts
from opd.config.recipe import Recipe
from opd.diagnosis import alignment
from opd.diagnosis.branches import Branch, Judge, Success, exact_success, sampled_success
from opd.diagnosis.config import Settings
from opd.text import chat
from opd.types import Judged

TOP = (1, 2, 4, 8, 16, 32, 64)
EXACT_K = 8
LARGEST_SLACK = 0.05  # of an enumerated success rate; where it would be larger, "auto" samples


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a candidate thinks of one answer. q [T, K]: its probabilities of the student's top-k; top [T] its likeliest token; entropy [T] nats;
    logp [T] of the answer's tokens; own [T, K] its own top-k mass, cumulated."""

    q: Tensor
    top: Tensor
    entropy: Tensor
    logp: Tensor
    own: Tensor


@dataclass(slots=True, kw_only=True)
class Node:
    """A prefix of a question's answers. right, wrong: how many answers with that verdict pass through it; place: (answer, token) where it was read.

    ids: tried tokens, p their probabilities; u their success; seen: candidate -> (probabilities of ids, likeliest token, entropy).
    """

    question: str
    prefix: tuple[int, ...]
    place: tuple[int, int]
    fraction: float
    entropy: float
    ids: tuple[int, ...]
    p: Tensor
    right: int = 0
    wrong: int = 0
    seen: dict[str, tuple[Tensor, int, float]] = field(default_factory=dict)
    u: dict[int, Success] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything that the figures are made of."""

    judged: Sequence[Judged]
    student: Sequence[TokenScores]
    seen: Mapping[str, Sequence[Seen | None]]
    nodes: Sequence[Node]
    exact: bool


@torch.no_grad()
def measure(parts: Parts, recipe: Recipe, settings: Settings) -> Measured:
    """Rollouts, scores and success rates. Raises ValueError where no answer has a token at which the student hesitates."""
    judged = [one for one in parts.source.collect(0) if one.completion.token_ids]
    if not judged:
        raise ValueError("every answer of the student is empty: there is nothing to diagnose")
    size = min(TOP[-1], len(parts.tokenizer))
    requests = [ScoreRequest(context_ids=one.prompt_ids, completion_ids=one.completion.token_ids, k=size) for one in judged]
    student = parts.learner.teacher_pass(requests, "live")
    views = parts.views(judged)
    scores = parts.scorer.score(judged, views, [None] * len(judged))
    heads = parts.scorer.heads()
    seen = {
        name: [see(found[name], heads[name], mine, size) if name in found else None for found, mine in zip(scores, student, strict=True)]
        for name in parts.scorer.weights
    }
    nodes = choose_nodes(judged, student, seen, settings)
    if not nodes:
        raise ValueError(
            f"the student gives no second token a probability of {settings.least} on these answers: there is nothing that a teacher could change; "
            "raise sampling.temperature, choose harder questions, or lower diagnose.least"
        )
    exact = exact_is_possible(recipe) if settings.success == "auto" else settings.success == "exact"
    exact = find_success(nodes, judged, parts, recipe, settings, exact=exact)
    return Measured(judged=judged, student=student, seen=seen, nodes=nodes, exact=exact)


def exact_is_possible(recipe: Recipe) -> bool:
    """Whether enumeration is cheap and means what is sampled: a short embedded task, no top-p and no top-k."""
    return bool(recipe.data.task) and recipe.sampling.top_p == 1.0 and recipe.sampling.top_k == 0


def ranked(scores: TokenScores) -> tuple[Tensor, Tensor]:
    """(ids [T, K], probabilities [T, K]) of a top-k with the answer's own token, likeliest first, each once; 0 and probability 0 fill up."""
    twice = (scores.ids[:, 1:] == scores.ids[:, :1]).any(1)
    p = torch.where(scores.ids >= 0, scores.logp.exp(), 0.0)
    p[:, 0] = torch.where(twice, 0.0, p[:, 0])
    order = p.argsort(dim=1, descending=True, stable=True)[:, : scores.ids.shape[1] - 1]
    return scores.ids.gather(1, order).clamp_min(0), p.gather(1, order)


def see(scores: TokenScores, head: HeadView, student: TokenScores, size: int) -> Seen:
    """A teacher's view of one answer on the student's and on its own top-k."""
    assert scores.hidden is not None
    options: dict[str, Any] = {"temperature": scores.temperature, **head.keywords()}
    ids, p = ranked(student)
    on_student = selected_logprobs(scores.hidden, head.weight, torch.where(p > 0, ids, -1), **options)
    own = topk_logprobs(scores.hidden, head.weight, size, **options)
    return Seen(q=on_student.logp.exp(), top=own.ids[:, 0], entropy=own.entropy, logp=scores.sampled, own=own.logp.exp().cumsum(-1))


def choose_nodes(
    judged: Sequence[Judged], student: Sequence[TokenScores], seen: Mapping[str, Sequence[Seen | None]], settings: Settings
) -> list[Node]:
    """For each question the prefixes whose second token has at least `least`, at most `nodes`, largest entropy first; each once."""
    found: dict[str, dict[tuple[int, ...], Node]] = defaultdict(dict)
    for number, (one, scores) in enumerate(zip(judged, student, strict=True)):
        tokens, here = one.completion.token_ids, found[one.prompt.id]
        ids_TK, top_TK = ranked(scores)
        for place in range(len(tokens)):
            prefix, p = tokens[:place], top_TK[place]
            if p[1] < settings.least:
                continue
            if prefix not in here:
                ids = ids_TK[place]
                count = min(settings.tokens, int((p >= settings.least).sum()))
                here[prefix] = Node(
                    question=one.prompt.id, prefix=prefix, place=(number, place), fraction=(place + 0.5) / len(tokens),
                    entropy=float(scores.entropy[place]), ids=tuple(ids[:count].tolist()), p=p[:count].double(),
                    seen={
                        name: (q.q[place, :count].double(), int(q.top[place]), float(q.entropy[place]))
                        for name, all_of in seen.items() for q in [all_of[number]] if q is not None
                    },
                )  # fmt: skip
            if one.verdict.status == "score":
                here[prefix].right += one.verdict.correct
                here[prefix].wrong += not one.verdict.correct
    return [node for nodes in found.values() for node in sorted(nodes.values(), key=lambda node: -node.entropy)[: settings.nodes]]


def find_success(nodes: Sequence[Node], judged: Sequence[Judged], parts: Parts, recipe: Recipe, settings: Settings, *, exact: bool) -> bool:
    """Fill in the success rate after every tried token and every candidate's likeliest one; returns whether they are enumerated.

    Raises ValueError where enumeration was asked for and is too large.
    """
    asked = [(node, token) for node in nodes for token in dict.fromkeys((*node.ids, *(top for _, top, _ in node.seen.values())))]
    branches = []
    for node, token in asked:
        one = judged[node.place[0]]
        branches.append(Branch(prompt=one.prompt, prompt_ids=one.prompt_ids, tokens=(*node.prefix, token)))
    decode = partial(chat.decode, parts.tokenizer)
    judge = Judge(verify=parts.problems.verify, decode=decode, stop_ids=parts.stop_ids, max_tokens=recipe.sampling.max_tokens)
    rates = None
    if exact:
        score = partial(parts.learner.teacher_pass, weights="live")
        rates = exact_success(branches, score, judge, k=min(EXACT_K, len(parts.tokenizer)))
        if rates and settings.success == "auto" and max(rate.slack for rate in rates) > LARGEST_SLACK:
            rates = None
        if rates is None and settings.success == "exact":
            raise ValueError("too many paths to enumerate: set diagnose.success=sampled, or fewer diagnose.problems and diagnose.nodes")
    exact = rates is not None
    if rates is None:
        options: dict[str, Any] = {"rollouts": settings.branches, "temperature": recipe.sampling.temperature, "seed": recipe.seed}
        rates = sampled_success(branches, parts.engine.generate, judge, **options)
    for (node, token), rate in zip(asked, rates, strict=True):
        node.u[token] = rate
    return exact


# --- figures -----------------------------------------------------------------------------------------------------------------------------


def aligned(node: Node, candidate: str, loss: str) -> tuple[float | None, float, float, float]:
    """(cosine, inner product, |ideal|^2, |loss gradient|^2) at a node, on the tried tokens, both sides renormalised."""
    q, _, _ = node.seen[candidate]
    p, q = alignment.renormalised(node.p), alignment.renormalised(q.clamp_min(1e-12))
    rates = [node.u[token] for token in node.ids]
    u = torch.tensor([rate.rate for rate in rates], dtype=torch.float64)
    halves = [torch.tensor([rate.halves[half] for rate in rates], dtype=torch.float64) for half in (0, 1)]
    ideal, own = alignment.ideal_gradient(p, u), alignment.GRADIENTS[loss](p, q)
    return alignment.cosine(ideal, own), float((ideal * own).sum()), alignment.half_square(p, *halves), float((own * own).sum())


def alignment_of(measured: Measured, candidate: str, loss: str, only: str = "all") -> dict[str, Any]:
    """Pooled alignment of a candidate with its interval over questions, the mean cosine of nodes, and how many nodes count.

    only: "right" or "wrong" weighs each node by the answers with that verdict that pass through it, "all" by both.
    """
    nodes = [node for node in measured.nodes if candidate in node.seen]
    weights = [float({"right": node.right, "wrong": node.wrong, "all": node.right + node.wrong}[only]) for node in nodes]
    items = [aligned(node, candidate, loss) for node in nodes]
    sums = list(_by_question(nodes, weights, items).values())

    def statistic(chosen: Sequence[int]) -> float | None:
        return _pooled([sums[n] for n in chosen])

    cosines = [(weight, item[0]) for weight, item in zip(weights, items, strict=True) if item[0] is not None and weight > 0]
    total = sum(weight for weight, _ in cosines)
    return {
        "pooled": statistic(range(len(sums))),
        "interval": alignment.interval(range(len(sums)), statistic),
        "mean_cosine": sum(weight * value for weight, value in cosines) / total if total else None,
        "nodes": len(cosines),
    }


Sums = tuple[float, float, float]


def _by_question(nodes: Sequence[Node], weights: Sequence[float], items: Sequence[tuple[float | None, float, float, float]]) -> dict[str, Sums]:
    """Question -> weighted sums of inner product, |ideal|^2 and |loss gradient|^2: all that a pooled cosine needs."""
    sums: dict[str, Sums] = defaultdict(lambda: (0.0, 0.0, 0.0))
    for node, weight, (_, dot, ideal, own) in zip(nodes, weights, items, strict=True):
        a, b, c = sums[node.question]
        sums[node.question] = (a + weight * dot, b + weight * ideal, c + weight * own)
    return dict(sums)


def _pooled(sums: Sequence[Sums]) -> float | None:
    return alignment.pooled([one[0] for one in sums], [one[1] for one in sums], [one[2] for one in sums])


def surer(measured: Measured, best: str, other: str, loss: str) -> float | None:
    """Share of bootstrap draws (of questions, the same for both) in which `best` is better aligned than `other`; both where both have a view."""
    nodes = [node for node in measured.nodes if best in node.seen and other in node.seen]
    weights = [float(node.right + node.wrong) for node in nodes]
    both = [list(_by_question(nodes, weights, [aligned(node, name, loss) for node in nodes]).values()) for name in (best, other)]

    def statistic(chosen: Sequence[int]) -> float | None:
        values = [_pooled([sums[n] for n in chosen]) for sums in both]
        return None if values[0] is None or values[1] is None else values[0] - values[1]

    draws = [value for value in alignment.bootstrap(range(len(both[0])), statistic, draws=1000, seed=1) if value is not None]
    return fmean(float(value > 0) for value in draws) if draws else None


def viability(measured: Measured, candidate: str) -> dict[str, Any]:
    """How often the student succeeds after the candidate's likeliest token, beside its own likeliest and its usual choice; what foretells it.

    After the branch-viability probe of PW-OPSD (arXiv:2605.21606): AUROC of the position and of the teacher's certainty for a viable branch.
    """
    nodes = [node for node in measured.nodes if candidate in node.seen]
    if not nodes:
        return {}
    rates = [node.u[node.seen[candidate][1]].rate for node in nodes]
    usual = [float((alignment.renormalised(node.p) * torch.tensor([node.u[t].rate for t in node.ids])).sum()) for node in nodes]
    viable = [rate > 0.5 for rate in rates]
    thirds = [[rate for node, rate in zip(nodes, rates, strict=True) if int(3 * node.fraction) == part] for part in range(3)]
    return {
        "teacher_token": fmean(rates),
        "student_token": fmean(node.u[node.ids[0]].rate for node in nodes),
        "usual": fmean(usual),
        "by_position": [fmean(part) if part else None for part in thirds],
        "auroc_position": alignment.auroc([node.fraction for node in nodes], viable),
        "auroc_certainty": alignment.auroc([-node.seen[candidate][2] for node in nodes], viable),
    }


def perplexity(measured: Measured, candidate: str) -> dict[str, float | None]:
    """exp of the mean negative log-prob of the student's tokens on right and on wrong answers, for candidate and student; and whether the
    candidate's mean log-ratio to the student tells right answers from wrong ones (AUROC)."""
    found: dict[str, list[float]] = defaultdict(list)
    ratios, labels = [], []
    for one, mine, his in zip(measured.judged, measured.student, measured.seen[candidate], strict=True):
        if his is None or one.verdict.status != "score":
            continue
        verdict = "right" if one.verdict.correct else "wrong"
        found[verdict] += his.logp.tolist()
        found[f"student_{verdict}"] += mine.sampled.tolist()
        ratios.append(float((his.logp - mine.sampled).mean()))
        labels.append(one.verdict.correct)
    names = ("right", "wrong", "student_right", "student_wrong")
    return {**{name: math.exp(-fmean(found[name])) if found[name] else None for name in names}, "auroc_right": alignment.auroc(ratios, labels)}


def captured(measured: Measured, candidate: str) -> dict[str, list[float]]:
    """Mean teacher mass within its own k likeliest tokens, and within the student's k likeliest, for the k in `k`."""
    seen = [one for one in measured.seen[candidate] if one is not None]
    if not seen:
        return {"k": [], "own": [], "student": []}
    own, student = torch.cat([one.own for one in seen]), torch.cat([one.q.cumsum(-1) for one in seen])
    sizes = [k for k in TOP if k <= own.shape[1]]
    return {"k": [float(k) for k in sizes], **{n: [float(t[:, k - 1].mean()) for k in sizes] for n, t in (("own", own), ("student", student))}}


def histogram(measured: Measured) -> dict[str, Any]:
    """Pass rates of the questions, and what PACED would make of them."""
    answers: dict[str, list[bool]] = defaultdict(list)
    for one in measured.judged:
        if one.verdict.status == "score":
            answers[one.prompt.id].append(one.verdict.correct)
    rates = list(alignment.pass_rates(answers).values())
    if not rates:
        raise ValueError("the verifier gave no verdict on any answer: nothing can be said about success")
    counts = [0] * 10
    for rate in rates:
        counts[min(9, int(10 * rate))] += 1
    return {"rates": rates, "counts": counts, "mean": fmean(rates), "paced": alignment.paced(rates)}
