"""Privileged self-distillation methods, from their recipe to the gradient, against numbers by hand and dense fp64 formulas."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd.build.system import objective_of
from opd.config.load import load_recipe
from opd.credit import SequenceSignals
from opd.evidence import agreement, class_contrast, consensus, consensus_gap, evidence, margin, position_ramp
from opd.objective import join, targets
from opd.pooling import alone
from tests.objective.dense import Batch, log
from tests.objective.dense import load as dense_load

FOLDER = Path(__file__).parents[2] / "recipes" / "methods"


def load(name):
    return objective_of(load_recipe(str(FOLDER / f"{name}.yaml")))


def gradient(function, logits):
    """Of the sum over rows of function(student log-probs [N, V])."""
    logits = logits.detach().requires_grad_()
    [found] = torch.autograd.grad(function(logits.log_softmax(-1)).sum(), logits)
    return found


def sequence(student, advantage=None, **views):
    """One answer whose tokens have these log-probs under the student and under each view."""
    scores = {name: SimpleNamespace(sampled=value) for name, value in views.items()}
    given = torch.zeros_like(student) if advantage is None else advantage
    return SequenceSignals(student_logp=student, scores=scores, advantage=given, loss_mask=torch.ones(len(student), dtype=torch.bool))


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# OPSD (arXiv:2601.18734): the variants differ in divergence and support alone


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("opsd", lambda p, q: (q.exp() * (q - p)).clamp_max(0.05).sum(-1)),
        ("opsd_reverse", lambda p, q: (p.exp() * (p - q)).sum(-1)),
        ("opsd_jsd", lambda p, q: sum(0.5 * (one.exp() * (one - ((p.exp() + q.exp()) / 2).log())).sum(-1) for one in (p, q))),
    ],
)
def test_opsd_on_the_whole_vocabulary(small, fixture_logits, name, formula):
    student, teacher = fixture_logits
    token = torch.tensor([1])
    found = small.run(load(name), student, small.rows(token, {"main": (teacher, token[:, None])}, terms=("distill",)))
    target = teacher.log_softmax(-1)
    close(found.loss, formula(student.detach().log_softmax(-1), target).sum())
    close(found.gradient, gradient(lambda logp: formula(logp, target), student))


def test_opsd_clip_gradient_is_the_published_one(small, fixture_logits):
    student, teacher = fixture_logits
    token = torch.tensor([1])
    found = small.run(load("opsd"), student, small.rows(token, {"main": (teacher, token[:, None])}, terms=("distill",)))
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    keep = q * (q.log() - p.log()) < 0.05
    close(found.gradient, p * (keep * q).sum() - keep * q)


def test_opsd_on_the_teachers_top_renormalises_both_sides(small):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, 80, dtype=torch.float64, generator=generator) for _ in range(2))
    token = torch.tensor([0, 7, 79, 3])
    rows = small.rows(token, {"main": (teacher, small.top_ids(teacher, 64, token))}, terms=("distill",))
    found = small.run(load("opsd_topk"), student, rows)
    ids = teacher.topk(64).indices
    inside = teacher.log_softmax(-1).gather(-1, ids).log_softmax(-1)

    def renormalised(logp):
        return (inside.exp() * (inside - logp.gather(-1, ids).log_softmax(-1))).sum(-1) / 4

    close(found.loss, renormalised(student.log_softmax(-1)).sum())
    close(found.gradient, gradient(renormalised, student))
    outside = torch.ones_like(student).scatter(-1, ids, 0.0).bool()
    assert found.gradient[outside].abs().max() < 1e-15, "nothing pushes on the tail: renormalised, not a bucket"


def test_opsd_sampled_has_the_reverse_kls_gradient_in_expectation(small, fixture_logits):
    student, teacher = fixture_logits
    token, count = torch.arange(7), 7
    logp, target = student.detach().log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    rows = small.rows(
        token, {"main": (teacher.expand(count, -1).contiguous(), token[:, None])},
        advantage={"policy": target - logp}, route={"policy": logp.exp()},
    )  # fmt: skip
    found = small.run(load("opsd_sampled"), student.expand(count, -1).contiguous(), rows, {"policy": 1.0, "*": 1.0})
    close(found.gradient.sum(0, keepdim=True), gradient(lambda p: (p.exp() * (p - teacher.log_softmax(-1))).sum(-1), student))


@pytest.mark.parametrize("name", ["opsd", "opsd_reverse", "opsd_jsd", "opsd_topk"])
def test_a_teacher_that_sees_nothing_more_teaches_nothing(small, name):
    logits = torch.randn(3, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    token = torch.tensor([1, 2, 69])
    rows = small.rows(token, {"main": (logits, small.top_ids(logits, 64, token))}, terms=("distill",))
    found = small.run(load(name), logits, rows)
    close(found.loss, torch.zeros((), dtype=torch.float64))
    close(found.gradient, torch.zeros_like(logits))


# RLSD (arXiv:2604.03128) and CEPO (2605.19436): evidence for the right answer scales the verifier's advantage and never turns it


@pytest.mark.parametrize(("given", "wanted"), [(1.0, 1.25), (-1.0, -0.75)])
def test_cepo_by_hand(given, wanted):
    one = torch.tensor([0.6, 0.2, 0.2]).double().log()
    s = sequence(torch.full((3,), 0.1).log(), advantage=torch.full((3,), given), plus=one, minus=torch.full((3,), 0.2).double().log())
    weighed = evidence(s, signal="plus", reference="minus", clip=0.5)
    mixed = 0.5 * s.advantage + 0.5 * weighed
    assert mixed.tolist() == pytest.approx([wanted, given, given]), "P+ 0.6, P- 0.2, lambda 0.5; without a difference nothing changes"


def test_rlsd_is_cepo_with_the_student_as_the_negative():
    generator = torch.Generator().manual_seed(1)
    student, plus, given = (torch.randn(6, generator=generator) for _ in range(3))
    s = sequence(student, advantage=given, plus=plus, copy=student)
    assert torch.equal(evidence(s, signal="plus", clip=0.5), evidence(s, signal="plus", reference="copy", clip=0.5))
    assert torch.equal(evidence(s, signal="plus", clip=0.5).sign(), given.sign())


def grpo_std(answers):
    """Group-centred rewards over the unbiased deviation, one an answer."""
    out = []
    for a in answers:
        rewards = torch.tensor([b.reward for b in answers if b.group == a.group], dtype=torch.float64)
        out.append((a.reward - rewards.mean()) / (rewards.std() + 1e-6))
    return out


@pytest.mark.parametrize(("name", "negative"), [("rlsd", None), ("cepo", "negative")])
@pytest.mark.parametrize(("step", "share"), [(0, 0.5), (10, 0.3), (25, 0.0), (40, 0.0)])
def test_evidence_methods_fade_to_grpo(name, negative, step, share):
    batch = Batch.make(signals=("main", "negative") if negative else ("main",))

    def formula(answers):
        total = 0.0
        for a, advantage in zip(answers, grpo_std(answers), strict=True):
            below = a.at(a.teachers[negative]) if negative else a.at(a.old)
            weight = (advantage.sign() * (a.at(a.teachers["main"]) - below)).exp().clamp(0.5, 1.5)
            credit = advantage * ((1 - share) + share * weight)
            r = (a.at(a.now) - a.at(a.old)).exp()
            total = total - torch.minimum(r * credit, r.clamp(0.8, 1.28) * credit).mean() / len(answers)
        return total

    _, objective = dense_load(name)
    batch.expect(objective, formula, step=step)
    if share:
        _, plain = dense_load("grpo", t0__policy={"ppo_clip": {"low": 0.2, "high": 0.28}})
        with pytest.raises(AssertionError):
            batch.expect(plain, formula)


# AVSD (arXiv:2605.20643)


def test_avsd_by_hand():
    views = {name: torch.tensor([p]).double().log() for name, p in (("whole", 0.20), ("part", 0.30), ("answer", 0.08))}
    s = sequence(torch.tensor([0.10]).double().log(), **views)
    assert consensus(s, signals=list(views)).item() == pytest.approx(0.60708, abs=1e-5)
    assert consensus(s, signals=list(views), residual=False).item() == pytest.approx(0.52287, abs=1e-5)


def test_avsd_reduces_to_one_view_and_its_residual_never_turns_the_sign():
    generator = torch.Generator().manual_seed(2)
    student, one, two, three = (torch.randn(50, generator=generator).double() for _ in range(4))
    s = sequence(student, one=one, copy=one, two=two, three=three)
    for views in (["one"], ["one", "copy"]):
        close(consensus(s, signals=views).double(), one - student, atol=1e-6)
    whole, agreed = consensus(s, signals=["one", "two", "three"]), consensus(s, signals=["one", "two", "three"], residual=False)
    assert torch.equal(whole.sign(), agreed.sign()) and ((whole - agreed).abs() <= agreed.abs() + 1e-6).all()
    mirrored = sequence(student, up=student + 0.7, down=student - 0.7)
    assert consensus(mirrored, signals=["up", "down"]).abs().max() < 1e-6, "views that contradict each other say nothing"


def test_avsd_from_recipe_to_gradient():
    names = ("whole", "part", "answer")

    def formula(answers):
        total, tokens = 0.0, sum(len(a.tokens) for a in answers)
        for a in answers:
            p = torch.stack([a.at(a.teachers[name]) for name in names])
            geometric, gap = p.mean(0), p.mean(0) - a.at(a.old)
            extra = p.logsumexp(0) - math.log(3) - geometric
            gate = gap.abs() / ((p - a.at(a.old)).abs().mean(0) + 1e-8) * gap.abs() / (gap.abs() + extra + 1e-8)
            logp = a.at(a.now)
            total = total - ((gap + gate * extra) * (1 + logp - logp.detach())).sum() / tokens
        return total

    _, objective = dense_load("avsd")
    batch = Batch.make(signals=names)
    batch.expect(objective, formula)
    _, plain = dense_load("avsd", t0__advantage={"consensus": {"signals": list(names), "residual": False}})
    with pytest.raises(AssertionError):
        batch.expect(plain, formula)


def test_avsd_dense_target_by_hand():
    """Candidates of 0.20, 0.30, 0.08 against 0.10, and the rest: the published log q* = -1.69551 before it is normalised."""
    student = torch.tensor([[0.10, 0.90]]).double().log()
    views = [torch.tensor([[p, 1 - p]]).double().log() for p in (0.20, 0.30, 0.08)]
    target = targets.consensus(student, *views, signals=["part", "answer"])
    rest = student[0, 1] + consensus_gap(torch.stack([v[:, 1] for v in views]), student[:, 1])[0]
    raw = torch.stack([torch.tensor(-1.69551).double(), rest])
    close(target[0], raw.log_softmax(-1), atol=1e-5)
    close(targets.consensus(student, views[0], views[0], signals=["copy"]), views[0], atol=1e-6)


def test_avsd_dense_from_recipe_to_gradient():
    names = ("whole", "part", "answer")

    def formula(answers):
        total, tokens = 0.0, sum(len(a.tokens) for a in answers)
        for a in answers:
            for t, token in enumerate(a.tokens.tolist()):
                sides = (a.old, *(a.teachers[name] for name in names))
                ids = sorted({token}.union(*(z[t].topk(3).indices.tolist() for z in sides)))
                p, *views = ((log(z)[t, ids]).log_softmax(-1) for z in (a.now, *(a.teachers[name] for name in names)))
                views, s = torch.stack(views), p.detach()
                geometric, gap = views.mean(0), views.mean(0) - s
                extra = (views.logsumexp(0) - math.log(3) - geometric).clamp_min(0.0)
                gate = gap.abs() / ((views - s).abs().mean(0) + 1e-8) * gap.abs() / (gap.abs() + extra + 1e-8)
                q = (geometric + gate * extra).log_softmax(-1)
                m = torch.logaddexp(q, p) - math.log(2)
                total = total + (0.5 * q.exp() * (q - m)).sum() + (0.5 * p.exp() * (p - m)).sum()
        return total / tokens

    _, objective = dense_load("avsd_dense")
    batch = Batch.make(signals=names)
    batch.expect(objective, formula, atol=1e-9)
    _, plain = dense_load("avsd_dense", without=("0.target",))
    with pytest.raises(AssertionError):
        batch.expect(plain, formula)


# PW-OPSD (arXiv:2605.21606)


def test_pw_opsd_ramp_by_hand():
    mask = torch.ones(1024, dtype=torch.bool)
    [weight] = position_ramp([sequence(torch.zeros(1024))], alone, floor=0.25, middle=0.3, width=0.1)
    assert weight.mean().item() == pytest.approx(0.77142, abs=1e-5)
    at = [weight[round(f * 1024 - 0.5) if f else 0].item() for f in (0.0, 0.1, 0.3, 0.5)]
    assert at == pytest.approx([0.2856, 0.3394, 0.6250, 0.9106], abs=2e-3) and weight[-1].item() == pytest.approx(0.9993, abs=1e-4)
    padded = replace(sequence(torch.zeros(1030)), loss_mask=torch.cat([torch.zeros(6, dtype=torch.bool), mask]))
    close(position_ramp([padded], alone)[0][6:], weight)


def test_pw_opsd_is_opsd_over_answers_where_its_floor_is_one(small):
    _, objective = dense_load("pw_opsd")
    batch = Batch.make(signals=("main",))

    def formula(answers, floor=0.25):
        total = 0.0
        for a in answers:
            p, q = a.now.log_softmax(-1), a.teachers["main"].log_softmax(-1)
            place = (torch.arange(len(a.tokens)).double() + 0.5) / len(a.tokens)
            weight = floor + (1 - floor) * torch.sigmoid((place - 0.3) / 0.1)
            total = total + (weight * (q.exp() * (q - p)).clamp_max(0.05).sum(-1)).mean() / len(answers)
        return total

    batch.expect(objective, formula)
    _, flat = dense_load("pw_opsd", without=["0.weight"])
    batch.expect(flat, lambda answers: formula(answers, floor=1.0))
    with pytest.raises(AssertionError):
        batch.expect(flat, formula)


# OPSD of the privileged-information paper (arXiv:2602.04942)


def centred(answers):
    return [a.reward - sum(b.reward for b in answers if b.group == a.group) / sum(b.group == a.group for b in answers) for a in answers]


def test_opsd_pi_adds_the_reverse_kl_to_the_reward():
    batch = Batch.make(signals=("main",))

    def formula(answers, beta=0.5):
        total, tokens = 0.0, sum(len(a.tokens) for a in answers)
        for a, advantage in zip(answers, centred(answers), strict=True):
            logp, p, q = a.at(a.now), a.now.log_softmax(-1), a.teachers["main"].log_softmax(-1)
            whole = (logp.detach() - a.at(a.old)).mean().exp()
            r = whole * (logp - logp.detach()).exp()
            total = total - torch.minimum(r * advantage, r.clamp(0.8, 1.2) * advantage).sum() / tokens
            total = total + beta * (p.exp() * (p - q)).sum() / tokens
        return total

    _, objective = dense_load("opsd_pi")
    batch.expect(objective, formula)
    _, weightless = dense_load("opsd_pi", t1__coef=0.0)
    batch.expect(weightless, lambda answers: formula(answers, beta=0.0))
    with pytest.raises(AssertionError):
        batch.expect(weightless, formula)


# OPSDC (arXiv:2603.05433), VLA-OPD (2603.26666), SD-Zero's second phase (2604.12002)


def test_opsdc_is_the_reverse_kl_to_the_brief_view():
    def formula(answers):
        tokens = sum(len(a.tokens) for a in answers)
        parts = [(a.now.log_softmax(-1), a.teachers["main"].log_softmax(-1)) for a in answers]
        return sum((p.exp() * (p - q)).sum() for p, q in parts) / tokens

    recipe, objective = dense_load("opsdc")
    Batch.make(signals=("main",)).expect(objective, formula)
    assert "concisely" in str(recipe.view) and recipe.signals["main"].weights == "live"


def test_vla_opd_takes_the_raw_log_ratio():
    def formula(answers):
        tokens = sum(len(a.tokens) for a in answers)
        return -sum(((a.at(a.teachers["main"]) - a.at(a.old)) * (1 + a.at(a.now) - a.at(a.now).detach())).sum() for a in answers) / tokens

    _, objective = dense_load("vla_opd")
    Batch.make(signals=("main",)).expect(objective, formula)


@pytest.mark.parametrize("forward", [0.5, 1.0, 0.0])
def test_sd_zero_mixes_both_directions_on_the_teachers_top(forward):
    def formula(answers):
        total, tokens = 0.0, sum(len(a.tokens) for a in answers)
        for a in answers:
            ids = a.teachers["main"].topk(3).indices
            p, q = (z.log_softmax(-1).gather(-1, ids).log_softmax(-1) for z in (a.now, a.teachers["main"]))
            total = total + (forward * q.exp() * (q - p) + (1 - forward) * p.exp() * (p - q)).sum() / tokens
        return total

    _, objective = dense_load("sd_zero", t0__coef=forward, t1__coef=1 - forward)
    Batch.make(signals=("main",)).expect(objective, formula)
    if forward == 0.5:
        recipe, as_it_is = dense_load("sd_zero")
        Batch.make(signals=("main",)).expect(as_it_is, formula)
        assert recipe.view == "revision"


# UniSD's agreement and margin (arXiv:2605.06597)


def test_agreement_of_identical_views_is_no_weight_and_a_constant_one_changes_nothing():
    one, two = torch.randn(5), torch.randn(3)
    answers = [sequence(one, a=one, b=one), sequence(two, a=two, b=two)]
    for level in ("token", "answer"):
        for weight in agreement(answers, alone, signals=["a", "b"], level=level):
            close(weight, torch.ones_like(weight))


def test_agreement_by_hand_with_mean_one_over_the_batch():
    answers = [sequence(torch.zeros(len(gap)), a=torch.zeros(len(gap)), b=torch.tensor(gap)) for gap in ([0.0, 2.0], [1.0])]
    variance = torch.tensor([0.0, 2.0, 0.5]).double()  # unbiased, over the two views
    raw = 1 / (1 + 2.0 * variance / 2.0)  # the 95 % quantile of three values is the largest
    found = torch.cat(agreement(answers, alone, signals=["a", "b"], gamma=2.0))
    close(found, raw / raw.mean())
    by_answer = torch.cat(agreement(answers, alone, signals=["a", "b"], gamma=2.0, level="answer"))
    raw = torch.tensor([0.25, 0.25, 0.25]).double().mul(-2.0).exp()  # means over the answer: (0, 1) and (0, 1)
    close(by_answer, raw / raw.mean())


def test_agreement_of_answers_is_not_divided_by_itself():
    wide, near = sequence(torch.zeros(2), a=torch.zeros(2), b=torch.full((2,), 3.0)), sequence(torch.zeros(2), a=torch.zeros(2), b=torch.zeros(2))
    one, other = agreement([wide, near], alone, signals=["a", "b"], level="answer")
    assert one[0] < 0.5 < 1.5 < other[0], "the published code divides each answer's weight by itself and so does nothing"


def test_margin_has_the_gradient_of_its_hinge():
    generator = torch.Generator().manual_seed(4)
    student, plus, minus = (torch.randn(200, generator=generator).double() for _ in range(3))
    logp = student.clone().requires_grad_()
    hinge = (0.5 + (logp - plus).abs() - (logp - minus).abs()).relu()
    hinge.sum().backward()
    found = margin(sequence(student, plus=plus, minus=minus), signal="plus", reference="minus", margin=0.5)
    close(found.double(), -logp.grad)
    assert (hinge == 0).any() and torch.equal(found[hinge == 0], torch.zeros_like(found[hinge == 0]))


def test_weights_over_a_batch_do_not_depend_on_how_ranks_split_it():
    answers = [sequence(torch.zeros(3), a=torch.randn(3), b=torch.randn(3)) for _ in range(4)]
    whole = agreement(answers, alone, signals=["a", "b"], gamma=1.0)
    values = []
    agreement(answers[:1], lambda own: values.append(own) or own, signals=["a", "b"], gamma=1.0)
    spread = torch.cat([torch.stack([x.scores["a"].sampled, x.scores["b"].sampled]).double().var(0) for x in answers])
    raw = 1 / (1 + spread / spread.sort().values[11])
    pools = iter([spread, raw.clamp_min(0.01)])
    [part] = agreement(answers[:1], lambda own: next(pools), signals=["a", "b"], gamma=1.0)
    close(part, whole[0])
    assert len(values) == 2


# UniSD from recipe to gradient


def unisd_formula(answers, contrast=0.1, match=0.1, agree=True):
    tokens, raws = sum(len(a.tokens) for a in answers), []
    for a in answers:
        views = torch.stack([a.at(a.teachers[name]) for name in ("main", "second", "third")])
        raws.append(views.var(0))
    every = torch.cat(raws).sort().values
    unit = every[int(0.95 * len(every))]
    weights = [1 / (1 + (v / unit).clamp_max(10.0)) if agree else torch.ones_like(v) for v in raws]
    mean, total = torch.cat(weights).mean(), 0.0
    for a, weight in zip(answers, weights, strict=True):
        p, q, logp = a.now.log_softmax(-1), a.teachers["main"].log_softmax(-1), a.at(a.now)
        total = total + (weight / mean * (q.exp() * (q - p)).sum(-1)).sum() / tokens
        near, far = (a.at(a.old) - a.at(a.teachers[name]) for name in ("main", "negative"))
        slope = torch.where(0.5 + near.abs() - far.abs() > 0, near.sign() - far.sign(), 0.0)
        total = total + contrast * (slope * (1 + logp - logp.detach())).sum() / tokens
        total = total + match * (a.now - a.teachers["main"]).square().mean(-1).sum() / tokens
    return total


def test_unisd_is_the_sum_of_its_parts():
    batch = Batch.make(signals=("main", "second", "third", "negative"))
    _, objective = dense_load("unisd")
    batch.expect(objective, unisd_formula)
    for without, changes in ({"t1__coef": 0.0}, {"contrast": 0.0}), ({"t2__coef": 0.0}, {"match": 0.0}):
        _, part = dense_load("unisd", **without)
        batch.expect(part, lambda answers, changes=changes: unisd_formula(answers, **changes))
        with pytest.raises(AssertionError):
            batch.expect(part, unisd_formula)
    _, trusting = dense_load("unisd", without=["0.weight"])
    batch.expect(trusting, lambda answers: unisd_formula(answers, agree=False))
    with pytest.raises(AssertionError):
        batch.expect(trusting, unisd_formula)


def test_unisd_clip_stops_tokens_after_the_sum():
    def formula(answers, clip=0.3):
        total, tokens = 0.0, sum(len(a.tokens) for a in answers)
        for a in answers:
            ids = a.old.topk(3).indices
            p, q = (z.log_softmax(-1) for z in (a.now, a.teachers["main"]))
            outside = torch.ones_like(p).scatter(-1, ids, 0.0).bool()
            p, q = (torch.cat([z.gather(-1, ids), torch.where(outside, z, -torch.inf).logsumexp(-1, keepdim=True)], -1) for z in (p, q))
            total = total + (q.exp() * (q - p)).sum(-1).clamp_max(clip).sum() / tokens
        return total

    batch = Batch.make(signals=("main",))
    _, objective = dense_load("unisd_clip", t0__distill={"forward_kl": {"token_clip": 0.3}})
    batch.expect(objective, formula)
    _, free = dense_load("unisd_clip", t0__distill="forward_kl")
    batch.expect(free, lambda answers: formula(answers, clip=torch.inf))
    with pytest.raises(AssertionError):
        batch.expect(free, formula)
    with pytest.raises(ValueError, match="token_clip bounds a token's divergence.*Legal: support: {student_topk"):
        dense_load("unisd_clip", t0__support="full")


# SRPO (arXiv:2604.02288)


def srpo_formula(answers, beta=1.0):
    """One denominator; the sibling's view exists where the batch gives the answer a `main` teacher."""
    tokens, total, routed = sum(len(a.tokens) for a in answers), 0.0, []
    for a in answers:
        q = a.teachers["main"].log_softmax(-1) if a.reward <= 0.5 and "main" in a.teachers else None
        routed.append(None if q is None else (beta * (q.exp() * q).sum(-1)).exp())
    chosen = [w for w in routed if w is not None]
    mean = torch.cat(chosen).mean() if chosen else 1.0
    for a, advantage, weight in zip(answers, centred(answers), routed, strict=True):
        r = (a.at(a.now) - a.at(a.old)).exp()
        if weight is None:
            total = total - torch.minimum(r * advantage, r.clamp(0.8, 1.28) * advantage).sum() / tokens
            continue
        ids = a.old.topk(3).indices
        p, q = (z.log_softmax(-1) for z in (a.now, a.teachers["main"]))
        outside = torch.ones_like(p).scatter(-1, ids, 0.0).bool()
        p, q = (torch.cat([z.gather(-1, ids), torch.where(outside, z, -torch.inf).logsumexp(-1, keepdim=True)], -1) for z in (p, q))
        m = ((p.exp() + q.exp()) / 2).log()
        jsd = 0.5 * (p.exp() * (p - m)).sum(-1) + 0.5 * (q.exp() * (q - m)).sum(-1)
        total = total + (r.detach().clamp_max(2.0) * weight / mean * jsd).sum() / tokens
    return total


def siblings(answers):
    """`main` only where another answer of the group is right, as the view peer_success has it."""
    for a in answers:
        if not any(b.group == a.group and b is not a and b.reward > 0.5 for b in answers):
            a.teachers = {}


def test_srpo_from_recipe_to_gradient():
    batch = Batch.make(signals=("main",))
    siblings(batch.answers)
    _, objective = dense_load("srpo")
    batch.expect(objective, srpo_formula)
    _, even = dense_load("srpo", t1__weight=[{"staleness_ratio": {"cap": 2.0}}, {"batch_confidence": {"beta": 0.0}}])
    batch.expect(even, lambda answers: srpo_formula(answers, beta=0.0))
    _, hybrid = dense_load("hybrid")
    batch.expect(hybrid, lambda answers: srpo_formula(answers, beta=0.0))
    with pytest.raises(AssertionError):
        batch.expect(hybrid, srpo_formula)


@pytest.mark.parametrize("reward", [1.0, 0.0])
def test_srpo_is_reinforcement_alone_where_all_are_right_or_nobody_is(reward):
    batch = Batch.make(signals=("main",), rewards=(reward,) * 8)
    siblings(batch.answers)
    _, objective = dense_load("srpo")
    loss, gradients, _ = batch.run(objective)
    assert loss == 0 and not any(g.any() for g in gradients), "equal rewards: no advantage, and nobody wrong with a right sibling"


def test_srpo_weights_by_hand():
    _, objective = dense_load("srpo")
    [weigh] = objective.terms[1].fields
    entropies = torch.tensor([0.1, 0.5, 2.0, 1.0])
    answer = replace(sequence(torch.zeros(4)), scores={"main": SimpleNamespace(entropy=entropies)})
    [found] = weigh([answer], alone)
    close(found, torch.tensor([1.79658, 1.20428, 0.26871, 0.73043]).double(), atol=1e-5)


# HDPO


def test_hdpo_distils_failed_groups_only():
    def formula(answers):
        tokens = sum(len(a.tokens) for a in answers)
        failed = [a for a in answers if not any(b.reward > 0.5 for b in answers if b.group == a.group)]
        total, count = 0.0, sum(len(a.tokens) for a in failed)
        for a, advantage in zip(answers, grpo_std(answers), strict=True):
            r = (a.at(a.now) - a.at(a.old)).exp()
            advantage = advantage.nan_to_num()
            total = total - torch.minimum(r * advantage, r.clamp(0.8, 1.2) * advantage).sum() / tokens
        for a in failed:
            p, q = a.now.log_softmax(-1), a.teachers["main"].log_softmax(-1)
            total = total + (p.exp() * (p - q)).sum() / count
        return total

    batch = Batch.make(signals=("main",), rewards=(1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    _, objective = dense_load("hdpo")
    batch.expect(objective, formula)
    _, everywhere = dense_load("hdpo", without=["1.route"])
    with pytest.raises(AssertionError):
        batch.expect(everywhere, formula)


# Learning under a view: pi-Distill (arXiv:2602.04942) and VPD (2605.15113)


def under_views(signals, seed=11, **more):
    """A batch whose student also reads the view, with other logits."""
    batch = Batch.make(signals=signals, **more)
    generator = torch.Generator().manual_seed(seed)
    for a in batch.answers:
        a.inside = torch.randn(a.now.shape, dtype=torch.float64, generator=generator)
    return batch


def kl(one, other):
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_pi_distill_moves_teacher_and_student_each_by_its_own_half():
    batch = under_views(("main", "student"))
    for a in batch.answers:
        a.source = "view"

    def formula(answers, alpha=0.5, beta=0.25):
        total, tokens = 0.0, sum(len(a.tokens) for a in answers)
        for a, advantage in zip(answers, centred(answers), strict=True):
            for share, logits in ((alpha, a.inside), (1 - alpha, a.now)):
                logp = a.at(logits)
                r = (logp.detach() - a.at(a.engine)).mean().exp() * (logp - logp.detach()).exp()
                total = total - share * torch.minimum(r * advantage, r.clamp(0.8, 1.2) * advantage).sum() / tokens
            total = total + alpha * beta * kl(a.inside, a.teachers["student"]).sum() / tokens
            total = total + (1 - alpha) * beta * kl(a.teachers["main"], a.now).sum() / tokens
        return total

    recipe, objective = dense_load("pi_distill")
    batch.expect(objective, formula)
    assert recipe.rollout.source == {"view": "main"} and recipe.signals["main"].weights == recipe.signals["student"].weights == "live"
    _, teacher_only = dense_load("pi_distill", t0__coef=1.0, t1__coef=0.25, t2__coef=0.0, t3__coef=0.0)
    batch.expect(teacher_only, lambda answers: formula(answers, alpha=1.0))
    _, gradients, _ = batch.run(teacher_only)
    assert not any(g.any() for g in gradients) and any(g.any() for g in batch.inside_gradients)
    _, student_only = dense_load("pi_distill", t0__coef=0.0, t1__coef=0.0, t2__coef=1.0, t3__coef=0.25)
    batch.expect(student_only, lambda answers: formula(answers, alpha=0.0))
    assert not any(g.any() for g in batch.inside_gradients)
    _, aloof = dense_load("pi_distill", t1__context="", t3__coef=0.125)
    with pytest.raises(AssertionError):
        batch.expect(aloof, formula)


def test_answers_sampled_under_a_view_keep_their_ratio_where_no_term_learns_there():
    batch = under_views(("main", "student"))
    for a in batch.answers:
        a.source = "view"

    def formula(answers):
        ratios = [(a.at(a.now) - a.at(a.engine)).exp() for a in answers]
        losses = [-torch.minimum(r * one, r.clamp(0.8, 1.2) * one).mean() for r, one in zip(ratios, centred(answers), strict=True)]
        return torch.stack(losses).mean()

    batch.expect(dense_load("grpo", t0__advantage="group_centered")[1], formula)


def test_pi_distill_without_privileged_information_is_reinforcement():
    batch = under_views(("main", "student"))
    for a in batch.answers:
        a.source, a.inside, a.teachers = "view", a.now.clone(), {"main": a.now.clone(), "student": a.now.clone()}
    _, objective = dense_load("pi_distill", t0__coef=0.5, t2__coef=0.5)
    loss, gradients, _ = batch.run(objective)
    _, plain = dense_load("pi_distill", t0__coef=0.0, t1__coef=0.0, t2__coef=1.0, t3__coef=0.0)
    alone_loss, alone_gradients, _ = batch.run(plain)
    batch.run(objective)
    close(loss, alone_loss)
    for one, inside, whole in zip(gradients, batch.inside_gradients, alone_gradients, strict=True):
        close(one + inside, whole)


def bco(answers, beta=0.1):
    """Of the student under the view, its reference held at rollout weights."""
    rewards = [beta * (a.at(a.inside) - a.at(a.old)).sum() for a in answers]
    right = torch.stack([r for r, a in zip(rewards, answers, strict=True) if a.reward > 0.5])
    wrong = torch.stack([r for r, a in zip(rewards, answers, strict=True) if a.reward <= 0.5])
    middle = (0.5 * (right.mean() + wrong.mean())).detach()
    return -torch.nn.functional.logsigmoid(right - middle).mean() - torch.nn.functional.logsigmoid(middle - wrong).mean()


def test_vpd_alternates_between_its_steps():
    batch = under_views(("main",), drift=0.0)
    for a in batch.answers:
        a.teachers["main"] = a.inside.clone()  # the teacher is the student itself under the view

    def reverse(answers):
        return sum(kl(a.now, a.teachers["main"]).sum() for a in answers) / sum(len(a.tokens) for a in answers)

    _, objective = dense_load("vpd")
    for step in (0, 1, 2, 3, 4, 6, 10, 12):
        batch.expect(objective, reverse, step=step)
        assert not any(g.any() for g in batch.inside_gradients)
    loss, gradients, _ = batch.run(objective, step=5)
    assert batch.run(objective, step=11)[0] == loss
    batch.run(objective, step=5)
    free = [replace(a, inside=a.inside.clone().requires_grad_()) for a in batch.answers]
    bco(free).backward()
    for a, found in zip(free, batch.inside_gradients, strict=True):
        close(found, a.inside.grad)
    assert not any(g.any() for g in gradients)


def test_vpd_contrast_by_hand():
    plus, minus = (sequence(torch.zeros(1).double(), advantage=torch.tensor([s]), main=torch.tensor([10.0 * s]).double()) for s in (1.0, -1.0))
    one, other = class_contrast([plus, minus], alone, beta=0.1)  # r = +1 and -1, d = 0: slope beta sigma(-1), times 2 answers over 1 of each
    slope = 0.1 / (1 + math.e) * 2
    assert (one.item(), other.item()) == pytest.approx((slope, -slope))
    assert [w.item() for w in class_contrast([plus], alone)] == [0.0], "one class: no step"
    shifted = [replace(s, scores={"main": SimpleNamespace(sampled=s.scores["main"].sampled + 30.0)}) for s in (plus, minus)]
    assert [w.item() for w in class_contrast(shifted, alone, beta=0.1)] == pytest.approx([slope, -slope]), "d moves with all rewards"


def test_an_answer_without_the_view_is_left_out_of_the_terms_under_it(small):
    batch = under_views(("main",), drift=0.0)
    _, objective = dense_load("vpd", t0__coef=1.0)  # both at once
    objective = objective.at(5, {})
    whole = batch.samples(objective)
    judged = [s.judged for s in whole if not s.context]
    prepared = [s.prepared for s in whole if not s.context]
    scores = [s.scores for s in whole if not s.context]
    views = {"main": [(9, 1, 2) if n % 2 else None for n in range(len(judged))]}
    scores = [s if n % 2 else {} for n, s in enumerate(scores)]
    samples = join(judged, prepared, scores, objective, views=views)
    assert [s.context for s in samples] == ["", *["", "main", ""] * 3, "", "main"]
    inside = [s for s in samples if s.context]
    assert {s.judged.prompt_ids for s in inside} == {(9, 1, 2)} and {s.route["distill"] for s in inside} == {0.0}
    assert {s.route["policy"] for s in samples if not s.context} == {0.0} and {s.route["policy"] for s in inside} == {1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t1__context": "mian"}, "learns under the view of 'mian' .did you mean 'main'"),
        ({"t0__support": {"student_topk": {"k": 3}}, "t0__context": "main"}, "top-k ids are chosen in its own context"),
    ],
)
def test_illegal_contexts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dense_load("vpd", **changes)


def test_off_policy_terms_need_a_ratio():
    with pytest.raises(ValueError, match="sampled under the view of 'main'.*without a ratio.*ppo_clip"):
        dense_load("pi_distill", t2__policy="reinforce")
    dense_load("pi_distill", t0__policy="reinforce")
    dense_load("pi_distill", t2__policy="reinforce", t2__weight="sampler_ratio")


# TRACE (arXiv:2605.10194)


def test_trace_by_hand():
    """Ten tokens, the fourth and fifth marked, KL 0.4 and 0.2 there: lambda x mean x 2/10."""
    _, objective = dense_load("trace")
    for step, share in ((5, 0.5), (10, 0.5), (25, 0.25), (40, 0.0), (60, 0.0)):
        now = {term.name: term.coef for term in objective.at(step, {}).terms}  # without those that weigh nothing
        assert (now["policy"], now.get("policy_2", 0.0), now.get("distill", 0.0)) == pytest.approx((1.0, 1 - share / 0.5, share))
    distill = objective.terms[2]
    mask = torch.zeros(10, dtype=torch.bool).index_fill(0, torch.tensor([3, 4]), True)
    answer = replace(sequence(torch.zeros(10)), marks={"spans": mask})
    [weight] = distill.fields[0]([answer], alone)
    kl_t = torch.tensor([9.0, 9, 9, 0.4, 0.2, 9, 9, 9, 9, 9]).double()
    assert (weight * kl_t).sum() / 10 == pytest.approx(0.06) and distill.reduce.kind == "sequence_mean"
    assert distill.dense.entry_clip == 0.05
    [outside] = objective.terms[0].fields[0]([answer], alone)
    [inside] = objective.terms[1].fields[0]([answer], alone)
    assert torch.equal(outside + inside, torch.ones(10).double()), "GRPO covers every token once the annealing is over"
    [nobody] = objective.terms[0].fields[0]([sequence(torch.zeros(10))], alone)
    assert nobody.min() == 1.0, "an answer that nobody marked is GRPO's"


@pytest.mark.parametrize("step", [0, 20, 50])
def test_trace_from_recipe_to_gradient(step):
    batch = Batch.make(signals=("main",))
    for n, a in enumerate(batch.answers):
        right = a.reward > 0.5
        a.marks = {"spans": torch.arange(len(a.tokens)) % 2 == n % 2} if right else {}
        a.teachers = a.teachers if right else {}
    share = 0.5 - 0.5 * min(max((step - 10) / 30, 0), 1)

    def formula(answers, marks=lambda a: a.marks):
        tokens, total = sum(len(a.tokens) for a in answers), 0.0
        shown = [a for a in answers if a.teachers]
        for a, advantage in zip(answers, grpo_std(answers), strict=True):
            r = (a.at(a.now) - a.at(a.old)).exp()
            on = marks(a).get("spans", torch.zeros(len(a.tokens), dtype=torch.bool)).double()
            total = total - ((1 - on * share / 0.5) * torch.minimum(r * advantage, r.clamp(0.8, 1.28) * advantage)).sum() / tokens
            if a.teachers:
                p, q = a.now.log_softmax(-1), a.teachers["main"].log_softmax(-1)
                total = total + share * (on * (q.exp() * (q - p)).clamp_max(0.05).sum(-1)).mean() / len(shown)
        return total

    _, objective = dense_load("trace")
    batch.expect(objective, formula, step=step)
    if share:
        with pytest.raises(AssertionError):
            batch.expect(objective, lambda answers: formula(answers, marks=lambda a: {}), step=step)
