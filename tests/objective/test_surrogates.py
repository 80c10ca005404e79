"""Policy surrogates and weights by hand."""

import math
from dataclasses import replace

import pytest
import torch

from opd.objective.divergences import reverse_kl
from opd.objective.surrogates import ppo_clip, reinforce
from opd.objective.weights import (
    TokenStatistics,
    engine_ratio,
    prefix,
    sampler_ratio,
    skip_first,
    staleness_ratio,
    student_confidence,
    teacher_confidence,
)


def one(surrogate, log_ratio, advantage, **parameters):
    """(loss, gradient in log p, clipped) of one token whose old log-prob is -1."""
    logp = torch.tensor([-1.0 + log_ratio], dtype=torch.float64, requires_grad=True)
    loss, clipped = surrogate(logp, torch.tensor([-1.0], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64), **parameters)
    loss.sum().backward()
    return loss.item(), logp.grad.item(), bool(clipped) if clipped is not None else None


R = {name: math.log(value) for name, value in {"1.5": 1.5, "1.25": 1.25, "0.5": 0.5, "4": 4.0}.items()}


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "parameters", "loss", "gradient", "clipped"),
    [
        (0.0, 2.0, {}, -2.0, -2.0, False),
        (R["1.5"], 2.0, {}, -2.4, 0.0, True),
        (R["1.25"], 2.0, {"high": 0.28}, -2.5, -2.5, False),
        (R["1.5"], 2.0, {"high": 0.28}, -2.56, 0.0, True),
        (R["1.5"], -2.0, {}, 3.0, 3.0, False),
        (R["0.5"], -2.0, {}, 1.6, 0.0, True),
        (R["0.5"], 2.0, {}, -1.0, -1.0, False),
        (R["4"], -2.0, {"dual": 3.0}, 6.0, 0.0, True),
        (R["4"], -2.0, {}, 8.0, 8.0, False),
        (R["1.5"], 0.0, {}, 0.0, 0.0, False),
    ],
)
def test_ppo_clip_by_hand(log_ratio, advantage, parameters, loss, gradient, clipped):
    found = one(ppo_clip, log_ratio, advantage, **parameters)
    assert found == (pytest.approx(loss, abs=1e-12), pytest.approx(gradient, abs=1e-12), clipped)


def test_at_ratio_one_ppo_is_reinforce_in_value_and_gradient():
    for advantage in (-1.3, 0.4):
        assert one(ppo_clip, 0.0, advantage)[:2] == pytest.approx(one(reinforce, 0.0, advantage)[:2], abs=1e-15)


def test_reinforce_ignores_the_old_policy_and_ppo_does_not():
    assert one(reinforce, R["1.25"], 2.0)[:2] == (-2.0, -2.0)
    assert one(ppo_clip, R["1.25"], 2.0, high=0.3)[:2] == pytest.approx((-2.5, -2.5))


def test_expected_policy_gradient_of_the_teacher_ratio_is_the_reverse_kl(fixture_logits):
    """Sum over the vocabulary of p(y) x the gradient of the surrogate at y, for REINFORCE and PPO at ratio one."""
    student, teacher = fixture_logits
    logp, target = student.log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    expected = torch.autograd.grad(reverse_kl(logp, target), student, retain_graph=True)[0]
    for surrogate in (reinforce, ppo_clip):
        losses, _ = surrogate(logp, logp.detach(), target - logp.detach())
        found = torch.autograd.grad((logp.detach().exp() * losses).sum(), student, retain_graph=True)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_importance_weight_restores_the_gradient_under_another_sampler(fixture_logits):
    student, teacher = fixture_logits
    logp, target = student.log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    sampler = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1], dtype=torch.float64)
    losses, _ = reinforce(logp, logp.detach(), target - logp.detach())
    weight = (logp.detach() - sampler.log()).exp()
    found = torch.autograd.grad((sampler * weight * losses).sum(), student, retain_graph=True)[0]
    expected = torch.autograd.grad(reverse_kl(logp, target), student)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.fixture
def now(small):
    """p = .2 .4, p_old = .1 .4, sampler .4 .1."""
    token = torch.tensor([0, 1])
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    rows = small.rows(token, {"main": (teacher, token[:, None])}, behaviour_logp=torch.tensor([0.4, 0.1]).double().log())
    return TokenStatistics(
        student_logp=torch.tensor([0.2, 0.4]).double().log(),
        old_logp=torch.tensor([0.1, 0.4]).double().log(),
        entropy=torch.tensor([0.0, 1.0]).double(),
        rows=rows,
        signal=rows.signals["main"],
    )


@pytest.mark.parametrize(
    ("weight", "parameters", "expected"),
    [
        (staleness_ratio, {"cap": 1.5}, (1.5, 1.0)),
        (staleness_ratio, {}, (2.0, 1.0)),
        (engine_ratio, {}, (0.25, 2.0)),
        (engine_ratio, {"low": 0.5, "high": 5.0, "outside": "mask"}, (0.0, 4.0)),
        (engine_ratio, {"low": 0.5, "high": 5.0}, (0.5, 4.0)),
        (sampler_ratio, {}, (0.5, 4.0)),
        (sampler_ratio, {"cap": 2.0}, (0.5, 2.0)),
        (teacher_confidence, {"beta": 2.0}, (0.25, 0.25)),
        (student_confidence, {"beta": 1.0}, (1.0, math.exp(-1))),
    ],
)
def test_weights_by_hand(now, weight, parameters, expected):
    assert weight(now, **parameters).tolist() == pytest.approx(expected, abs=1e-7)


def test_huge_ratios_stay_finite(now):
    assert staleness_ratio(replace(now, old_logp=torch.full((2,), -900.0)), cap=1e30).isfinite().all()


def test_gates_by_position():
    position = torch.arange(4)
    assert skip_first(position, tokens=3).tolist() == [False, False, False, True]
    assert prefix(position, tokens=1).tolist() == [True, False, False, False]
