"""dL/dz = p (f - mean of f under p) for every divergence on every support, through the real vocabulary operations (fp64).

Every pair of the two tables is here: either its gradient is checked, or the recipe that asks for it does not load.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from opd_kernels import PAD_LOGP

from opd.objective.divergences import DENSE, DIVERGENCES
from opd.objective.legality import BIASED
from opd.objective.supports import SUPPORTS
from tests.objective.test_divergences import PARAMETERS, scores

K, V, N = 3, 7, 5
TOPK = ("student_topk", "teacher_topk", "union")
CHOICES = {
    "full": "full",
    "sampled": "sampled",
    "spans": "spans",
    "teacher_sample": {"teacher_sample": {"draws": 8}},
    "unpaired": {"unpaired": {"k": K}},
    **{f"{kind}_{tail}": {kind: {"k": K, "tail": tail}} for kind in TOPK for tail in ("bucket", "renormalise", "drop")},
    "student_topk_all": {"student_topk": {"k": V, "tail": "bucket"}},
    "student_topk_with_sampled": {"student_topk": {"k": K, "tail": "bucket", "sampled": True}},
    "teacher_topk_with_sampled": {"teacher_topk": {"k": K, "tail": "bucket", "sampled": True}},
}
ON_CATEGORIES = [name for name in CHOICES if name not in ("full", "sampled", "spans", "teacher_sample", "unpaired")]


def supports_of(divergence):
    """Where a recipe with this divergence loads."""
    if divergence == "span_likelihood":
        return ["spans"]
    if divergence == "plackett_luce":
        return ["student_topk_drop", "teacher_topk_drop", "union_drop"]
    if divergence == "expected_advantage":
        return [name for name in ON_CATEGORIES if name.startswith(("student_topk", "union"))]
    whole = ["full"] if divergence in DENSE else []
    alone = ["sampled"] if divergence == "reverse_kl" else []
    drawn = ["teacher_sample"] if divergence == "forward_kl" else []
    ranked = ["unpaired"] if divergence == "rank_distance" else []
    return [*whole, *alone, *drawn, *ranked, *ON_CATEGORIES]


LEGAL = [(divergence, support) for divergence in DIVERGENCES for support in supports_of(divergence)]
REFUSED = sorted(set(product(DIVERGENCES, CHOICES)) - set(LEGAL))


def spec_of(divergence, choice):
    target = {"target": "log_ratio"} if divergence == "expected_advantage" else {}
    parameters = PARAMETERS.get(divergence, {})
    return {"distill": {divergence: parameters}, "support": choice, "reduce": {"constant": {"length": 1}}, "allow": list(BIASED), **target}


def test_both_tables_are_whole():
    assert {name if isinstance(choice, str) else next(iter(choice)) for name, choice in CHOICES.items()} == set(SUPPORTS)
    assert len(LEGAL) + len(REFUSED) == len(DIVERGENCES) * len(CHOICES) and len(LEGAL) > 90


@pytest.mark.parametrize(("divergence", "support"), REFUSED)
def test_a_pair_without_a_gradient_to_check_does_not_load(small, divergence, support):
    with pytest.raises(ValueError, match="Legal: "):
        small.build(spec_of(divergence, CHOICES[support]))


def slope_of(name, p, q):
    """f [N, K], the loss's slope in each category's probability p, for a teacher q. p and q sum to one unless the tail was dropped."""
    if name == "plackett_luce":
        order = torch.where(p > 0, q, -1.0).argsort(-1, descending=True)  # the teacher's order of the candidates
        ranked = p.gather(-1, order)
        after = ranked.flip(-1).cumsum(-1).flip(-1)
        share = torch.where(ranked > 0, 1 / after.clamp_min(1e-300), 0.0).cumsum(-1)  # sum over ranks up to this one of 1 / the mass at or after it
        return torch.zeros_like(p).scatter(-1, order, share - 1 / ranked.clamp_min(1e-300))
    constant = 1.0 if name in ("reverse_kl", "skew_reverse_kl", "held_skew_reverse_kl") else 0.0  # of p log p; without effect where p sums to one
    return scores(name, p.clamp_min(1e-300), q.clamp_min(1e-300)) + constant


def expected(name, student, teacher, chosen, tail):
    """The gradient [N, V] written out for teacher logits, or a pair of them whose log-ratio is the target; chosen [N, V] are the ids."""
    p, inside = student.softmax(-1), chosen.double()
    teachers = [z.softmax(-1) for z in (teacher if isinstance(teacher, tuple) else (teacher,))]
    masses = [(one * inside).sum(-1, keepdim=True) for one in (p, *teachers)]
    if tail == "renormalise":
        p, *teachers = (one * inside / mass for one, mass in zip((p, *teachers), masses, strict=True))
    q = teachers[0] if len(teachers) == 1 else teachers[0] / teachers[1].clamp_min(1e-300)
    f = torch.where(chosen, slope_of(name, p * inside, q), 0.0)
    if tail == "bucket":
        rest, *others = (1 - mass for mass in masses)
        of_rest = slope_of(name, rest, others[0] if len(others) == 1 else others[0] / others[1])
        f = torch.where(chosen, f, of_rest)
    return p * (f - (p * f).sum(-1, keepdim=True))


def chosen_ids(choice, student, teachers, token):
    """(ids [N, k + 1] as a scorer gives them, the support's own [N, V] bool)."""
    [(kind, parameters)] = choice.items()
    owners = {"student_topk": (student,), "teacher_topk": teachers[:1], "union": (student, *teachers)}[kind]
    top = torch.cat([owner.topk(parameters["k"], dim=-1).indices for owner in owners], -1)
    chosen = torch.zeros(N, V, dtype=torch.bool).scatter(-1, top, True)
    if parameters.get("sampled") or kind == "union":
        chosen = chosen.scatter(-1, token[:, None], True)
    return torch.cat([token[:, None], torch.where(top == token[:, None], -1, top)], -1), chosen


@pytest.fixture
def case():
    """(student, teacher, reference) [N, V] fp64 logits and the sampled tokens [N]."""
    g = torch.Generator().manual_seed(5)
    student, teacher, reference = (torch.randn(N, V, dtype=torch.float64, generator=g) for _ in range(3))
    return student, teacher, reference, torch.randint(V, (N,), generator=g)


def check(small, divergence, support, student, rows, wanted):
    found = small.run(small.build(spec_of(divergence, CHOICES[support])), student, rows, {"distill": 1.0, "*": 1.0})
    torch.testing.assert_close(found.gradient, wanted, rtol=0, atol=1e-12)
    assert wanted.abs().max() > 1e-3


WRITTEN_OUT_BELOW = ("full", "sampled", "spans", "teacher_sample", "unpaired")


@pytest.mark.parametrize(("divergence", "support"), [pair for pair in LEGAL if pair[1] not in WRITTEN_OUT_BELOW])
def test_gradient_identity_on_candidates(small, case, divergence, support):
    student, teacher, reference, token = case
    pair = (teacher, reference) if divergence == "expected_advantage" else (teacher,)
    ids, chosen = chosen_ids(CHOICES[support], student, pair, token)
    rows = small.rows(token, {name: (z, ids) for name, z in zip(("main", "reference"), pair, strict=False)}, terms=("distill",))
    [(_, parameters)] = CHOICES[support].items()
    wanted = expected(divergence, student, pair if len(pair) > 1 else teacher, chosen, parameters["tail"])
    check(small, divergence, support, student, rows, wanted)


@pytest.mark.parametrize("divergence", [divergence for divergence, support in LEGAL if support == "full"])
def test_gradient_identity_on_the_whole_vocabulary(small, case, divergence):
    student, teacher, _, token = case
    rows = small.rows(token, {"main": (teacher, token[:, None])}, terms=("distill",))
    everything = torch.ones(N, V, dtype=torch.bool)
    check(small, divergence, "full", student, rows, expected(divergence, student, teacher, everything, None))


def test_gradient_identity_of_the_sampled_token(small, case):
    """f is log p - log q at the sampled token over its p, 0 elsewhere."""
    student, teacher, _, token = case
    p, hot = student.softmax(-1), torch.nn.functional.one_hot(token, V).double()
    f = hot / p * (student.log_softmax(-1) - teacher.log_softmax(-1))
    rows = small.rows(token, {"main": (teacher, token[:, None])}, terms=("distill",))
    check(small, "reverse_kl", "sampled", student, rows, p * (f - (p * f).sum(-1, keepdim=True)))


def test_gradient_identity_of_draws(small, case):
    """f is minus the share of the draws over p: the forward KL's with the teacher's estimate in its place."""
    student, teacher, _, token = case
    ids = torch.tensor([[0, 1, 4], [2, 3, -1], [6, -1, -1], [1, 2, 5], [0, 5, 6]])
    counts = torch.tensor([[5, 2, 1], [4, 4, 0], [8, 0, 0], [1, 1, 6], [3, 3, 2]]).double()
    rows = small.rows(token, {"main": (teacher, ids)}, terms=("distill",))
    logp = torch.where(ids >= 0, (counts / 8).clamp_min(1e-300).log(), PAD_LOGP)
    signal = replace(rows.signals["main"], logp=logp, tail_logp=torch.full((N,), PAD_LOGP, dtype=torch.float64))
    p, share = student.softmax(-1), torch.zeros(N, V + 1, dtype=torch.float64).scatter(-1, ids % (V + 1), counts / 8)[:, :V]
    f = -share / p
    check(small, "forward_kl", "teacher_sample", student, replace(rows, signals={"main": signal}), p * (f - (p * f).sum(-1, keepdim=True)))


def test_gradient_identity_of_spans(small, case):
    """The loss's slope in the log-prob of a whole run reaches every token of the run as a policy gradient: f is the slope over p there."""
    student, teacher, _, token = case
    span, tau = torch.tensor([0, 0, 1, -1, 2]), 100.0
    ours, theirs = (z.log_softmax(-1).gather(-1, token[:, None])[:, 0] for z in (student, teacher))
    slope = torch.zeros(N, dtype=torch.float64)
    for number in (0, 1, 2):
        p, q = ((side[span == number].sum() / tau).exp() for side in (ours, theirs))
        slope[span == number] = -(q - (1 - q) * p / (1 - p)) / tau
    last = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    rows = small.rows(token, {"main": (teacher, token[:, None])}, terms=("distill",))
    rows = replace(rows, fields={**rows.fields, "span/distill": span.double(), "keep/distill": last})
    p, f = student.softmax(-1), torch.nn.functional.one_hot(token, V) / student.softmax(-1) * slope[:, None]
    check(small, "span_likelihood", "spans", student, rows, p * (f - (p * f).sum(-1, keepdim=True)))


def test_the_identity_of_a_policy_gradient(small, case):
    """f = -A at the sampled token over p."""
    student, teacher, _, token = case
    p, hot = student.softmax(-1), torch.nn.functional.one_hot(token, V).double()
    rows = small.rows(token, {"main": (teacher, token[:, None])}, terms=("policy",))
    sampled = small.run(small.build({"policy": "reinforce", "advantage": "teacher_logratio"}), student, rows, {"policy": 1.0, "*": 1.0})
    f = -hot / p
    torch.testing.assert_close(sampled.gradient, p * (f - (p * f).sum(-1, keepdim=True)), rtol=0, atol=1e-12)


def test_the_value_of_an_advantage_on_candidates(small, case):
    student, up, down, token = case
    ids, chosen = chosen_ids(CHOICES["student_topk_drop"], student, (up, down), token)
    rows = small.rows(token, {"main": (up, ids), "reference": (down, ids)}, terms=("distill",))
    linear = small.run(small.build(spec_of("expected_advantage", CHOICES["student_topk_drop"])), student, rows, {"distill": 1.0, "*": 1.0})
    advantage = torch.where(chosen, up.log_softmax(-1) - down.log_softmax(-1), 0.0)
    assert linear.loss.item() == pytest.approx(-(student.softmax(-1) * advantage).sum().item(), abs=1e-12)


def test_the_students_entropy_is_exact_over_the_vocabulary(small):
    g = torch.Generator().manual_seed(7)
    student, token = torch.randn(N, V, dtype=torch.float64, generator=g), torch.zeros(N, dtype=torch.int64)
    rows = small.rows(token, {}, terms=("student_entropy",))
    found = small.run(small.build({"student_entropy": {}, "coef": -0.5}), student, rows)
    free = student.clone().requires_grad_()
    wanted = -0.5 * -(free.softmax(-1) * free.log_softmax(-1)).sum(-1).mean()
    assert found.loss.item() == pytest.approx(wanted.item(), abs=1e-12)
    torch.testing.assert_close(found.gradient, torch.autograd.grad(wanted, free)[0], rtol=0, atol=1e-12)


def test_gradient_identity_of_unpaired_tokens(small, case):
    """The student's own candidates in the columns behind the teacher's: the tokens that only one of two tokenizers has."""
    student, teacher, _, token = case
    paired, _ = chosen_ids({"teacher_topk": {"k": K}}, student, (teacher,), token)
    alone = student.topk(K, dim=-1).indices
    rows = small.rows(token, {"main": (teacher, torch.cat([paired, alone], -1))}, terms=("distill",))
    chosen = torch.zeros(N, V, dtype=torch.bool).scatter(-1, alone, True)
    check(small, "rank_distance", "unpaired", student, rows, expected("rank_distance", student, teacher, chosen, "drop"))
