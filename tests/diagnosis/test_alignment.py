"""Gradients against autograd and by hand; the estimators against enumeration."""

import itertools
import math

import pytest
import torch

from opd.diagnosis.alignment import (
    GRADIENTS,
    auroc,
    cosine,
    half_square,
    ideal_gradient,
    interval,
    paced,
    pass_rates,
    pooled,
    renormalised,
    reverse_kl_gradient,
)


def dense(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, generator=generator, dtype=torch.float64)
    q = torch.randn(size, generator=generator, dtype=torch.float64).softmax(-1)
    u = torch.rand(size, generator=generator, dtype=torch.float64)
    return z, q, u


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_autograd(seed):
    z, q, u = dense(seed)
    values = {
        "success": lambda p: (p * u).sum(),
        "reverse_kl": lambda p: -(p * (p.log() - q.log())).sum(),
        "forward_kl": lambda p: -(q * (q.log() - p.log())).sum(),
    }
    for name, value in values.items():
        leaf = z.clone().requires_grad_()
        value(leaf.softmax(-1)).backward()
        p = z.softmax(-1)
        own = ideal_gradient(p, u) if name == "success" else GRADIENTS[name](p, q)
        torch.testing.assert_close(own, leaf.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [0.1, 1.0, 30.0])
def test_a_teacher_that_tilts_by_success_is_aligned_perfectly(k):
    z, _, u = dense(7)
    p = z.softmax(-1)
    q = renormalised(p * (k * u).exp())
    torch.testing.assert_close(reverse_kl_gradient(p, q), k * ideal_gradient(p, u), rtol=0, atol=1e-13)
    assert cosine(ideal_gradient(p, u), reverse_kl_gradient(p, q)) == pytest.approx(1.0)
    away = renormalised(p * (-k * u).exp())
    assert cosine(ideal_gradient(p, u), reverse_kl_gradient(p, away)) == pytest.approx(-1.0)


def test_nothing_to_compare_is_said():
    p, equal = torch.tensor([0.5, 0.5]), torch.tensor([0.3, 0.3])
    assert cosine(ideal_gradient(p, equal), torch.ones(2)) is None and cosine(torch.ones(2), reverse_kl_gradient(p, p)) is None
    assert pooled([0.0], [0.0], [1.0]) is None and pooled([], [], []) is None
    assert pooled([3.0, 0.0], [4.0, 0.0], [4.0, 5.0]) == pytest.approx(3.0 / math.sqrt(4 * 9))


def test_the_square_from_two_halves_is_unbiased():
    """Expectation over all outcomes of two Bernoulli draws a token, a half each; the plain square is biased."""
    p, u = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64)
    unbiased = naive = 0.0
    for outcome in itertools.product([0, 1], repeat=6):
        first, second = torch.tensor(outcome[:3]).double(), torch.tensor(outcome[3:]).double()
        chance = float(torch.cat([torch.where(x == 1, u, 1 - u) for x in (first, second)]).prod())
        unbiased += chance * half_square(p, first, second)
        naive += chance * float(ideal_gradient(p, (first + second) / 2).square().sum())
    truth = float(ideal_gradient(p, u).square().sum())
    assert unbiased == pytest.approx(truth, abs=1e-14) and naive > 1.2 * truth


def test_auroc_by_hand():
    assert auroc([1, 2, 3, 4], [False, False, True, True]) == 1.0
    assert auroc([1, 1], [True, False]) == 0.5 and auroc([1, 2], [True, True]) is None
    assert auroc([3, 1, 2], [True, True, False]) == 0.5


def test_paced_by_hand():
    rates = pass_rates({"a": [True, False], "b": [True, True], "c": [False, False, False, True], "d": []})
    assert rates == {"a": 0.5, "b": 1.0, "c": 0.25}
    found = paced(list(rates.values()))
    assert found["zero"] == pytest.approx(1 / 3) and found["mean"] == pytest.approx((0.25 + 0.1875) / 3)
    assert found["effective"] == pytest.approx((0.4375**2) / (0.25**2 + 0.1875**2) / 3)
    assert paced([0.0, 1.0])["effective"] == 0.0


def test_intervals_resample_whole_groups():
    groups = [n // 10 for n in range(100)]  # ten groups whose ten values are equal: ten values, not a hundred
    values = [float(n // 10) for n in range(100)]
    low, high = interval(groups, lambda chosen: sum(values[n] for n in chosen) / len(chosen))
    assert 2.4 < low < 3.2 and 5.8 < high < 6.6  # 4.5 -+ 1.96 * 2.87 / sqrt(10)
    assert interval([0], lambda chosen: None) is None
