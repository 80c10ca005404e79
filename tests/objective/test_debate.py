"""Teachers that debate (MAD-OPD, arXiv:2605.01347): shares by stated confidence, and the recipe's loss over dense fp64 logits."""

import math

import pytest
import torch

from opd.credit import GroupOutcome
from opd.objective.routes import RouteInput, confidence_share
from opd.types import Verdict
from tests.objective.dense import Batch, load, log

STATED = ((90, 70), (70, 90), (100, 0), (50, 50), (None, 80), (3, 97), (0, 0), (20, None))  # of the two teachers, about each answer


def tagged(confidence):
    return "So it is 7." if confidence is None else f"So it is 7. <<CONFIDENCE={confidence}>>"


def share(turns, signal="first", **parameters):
    empty = torch.zeros(0)
    group = GroupOutcome(reward=empty, correct=empty, valid=empty, length=empty, truncated=empty, logratio=empty)
    notes = {"debate": "all of it", **{f"debate/{name}": text for name, text in turns.items()}}
    asked = RouteInput(verdict=Verdict(), has_view=True, group=group, member=0, signal=signal, notes=notes)
    return confidence_share(asked, writer="debate", **parameters)


def expected_share(stated, k, tau=1.0):
    if None in stated:
        return 1 / len(stated)
    return math.exp(stated[k] / 100 / tau) / sum(math.exp(c / 100 / tau) for c in stated)


@pytest.fixture
def batch():
    made = Batch.make(signals=("first", "second"))
    for answer, (one, other) in zip(made.answers, STATED, strict=True):
        answer.notes = {"debate": "...", "debate/first": tagged(one), "debate/second": tagged(other)}
    return made


def jsd(logits, teacher):
    p, q = log(logits), log(teacher)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - m)).sum(-1) + 0.5 * (q.exp() * (q - m)).sum(-1)


def mad_opd(answers, shares=expected_share):
    """The mean over answers and their tokens of sum_k w_k JSD(teacher k, student)."""
    total = 0.0
    for answer, stated in zip(answers, STATED, strict=True):
        total = total + sum(shares(stated, k) * jsd(answer.now, answer.teachers[name]).mean() for k, name in enumerate(("first", "second")))
    return total / len(answers)


def test_shares_by_hand():
    assert share({"first": tagged(90), "second": tagged(70)}) == pytest.approx(0.549834, abs=1e-6)
    assert share({"first": tagged(90), "second": tagged(70)}, "second") == pytest.approx(0.450166, abs=1e-6)
    assert share({"first": tagged(100), "second": tagged(0)}) == pytest.approx(math.e / (1 + math.e)), "the largest ratio is e"
    assert share({"first": tagged(90), "second": tagged(70)}, tau=0.1) == pytest.approx(1 / (1 + math.exp(-2)))
    three = {"first": tagged(10), "second": tagged(10), "third": tagged(60)}
    assert share(three, "third") == pytest.approx(math.exp(0.5) / (2 + math.exp(0.5)))


def test_who_says_nothing_of_it_makes_all_equal():
    assert share({"first": tagged(None), "second": tagged(70)}) == share({"first": tagged(99), "second": tagged(101)}) == 0.5
    assert share({"first": "90", "second": "confidence: 70"}) == 0.5
    assert share({"first": f"{tagged(10)} no: {tagged(90)}", "second": tagged(70)}) == pytest.approx(0.549834, abs=1e-6), "the last tag counts"
    assert share({"second": tagged(70), "third": tagged(70)}) == 0.0 == share({}), "who did not speak teaches nothing here"


def test_a_recipe_is_its_papers_loss(batch):
    batch.expect(load("mad_opd")[1], mad_opd, atol=1e-8)  # routes travel in fp32
    with pytest.raises(AssertionError):
        batch.expect(load("mad_opd")[1], lambda answers: mad_opd(answers, shares=lambda stated, k: 0.5), atol=1e-8)


def test_without_shares_it_is_another_method(batch):
    whole, plain = (batch.run(objective)[1] for objective in (load("mad_opd")[1], load("mad_opd", without=["0.route", "1.route"])[1]))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, plain, strict=True)) > 1e-3


def test_code_takes_reverse_kl(batch):
    def loss(answers):
        total = 0.0
        for answer, stated in zip(answers, STATED, strict=True):
            p = log(answer.now)
            for k, name in enumerate(("first", "second")):
                total = total + expected_share(stated, k) * (p.exp() * (p - log(answer.teachers[name]))).sum(-1).mean()
        return total / len(answers)

    batch.expect(load("mad_opd", t0__distill="reverse_kl", t1__distill="reverse_kl")[1], loss, atol=1e-7)


def test_teachers_that_agree_are_one_teacher_whatever_they_say(batch):
    for answer in batch.answers:
        answer.teachers["second"] = answer.teachers["first"]
    found, gradients, _ = batch.run(load("mad_opd")[1])
    single = Batch(batch.answers)
    for answer in single.answers:
        answer.teachers["main"] = answer.teachers["first"]
    expected, others, _ = single.run(load("gkd")[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_an_answer_without_a_debate_leaves_the_denominator(batch):
    batch.answers[2].notes, batch.answers[2].teachers = {}, {}
    gradients = batch.run(load("mad_opd")[1])[1]
    assert float(gradients[2].abs().max()) == 0.0
    kept = [n for n in range(len(STATED)) if n != 2]
    stated = [STATED[n] for n in kept]

    def loss(answers):
        total = 0.0
        for answer, one in zip([answers[n] for n in kept], stated, strict=True):
            total = total + sum(expected_share(one, k) * jsd(answer.now, answer.teachers[name]).mean() for k, name in enumerate(("first", "second")))
        return total / len(kept)

    batch.expect(load("mad_opd")[1], loss, atol=1e-8)


def test_its_loss_and_gradient_are_bounded_also_where_teachers_contradict_the_student(batch):
    for answer in batch.answers:
        for sign, name in ((60.0, "first"), (-60.0, "second")):
            answer.teachers[name] = -answer.now.sign() * sign
    loss, gradients, samples = batch.run(load("mad_opd")[1])
    assert 0 <= float(loss) <= math.log(2)
    for gradient, sample in zip(gradients, samples, strict=True):
        per_token = gradient.abs() * len(samples) * len(sample.judged.completion.token_ids)
        assert float(per_token.max()) <= 2.0
