"""Values and gradients of the divergences and sampled estimators: pinned fp64 numbers, one gradient identity, exact enumeration."""

import math

import pytest
import torch

from opd.objective.divergences import (
    DIVERGENCES,
    forward_kl,
    held_skew_reverse_kl,
    jsd,
    k1,
    k2,
    k3,
    k3_with_ratio,
    plackett_luce,
    reverse_kl,
    sampled_reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    stop_gradient_reverse_kl,
)

PINNED = [
    (reverse_kl, {}, 0.7518457948092409, 0.44636940554541776),
    (stop_gradient_reverse_kl, {}, 0.7518457948092409, 0.44636940554541776),
    (forward_kl, {}, 0.8321983825361869, 0.46930197790072736),
    (jsd, {"mix": 0.5}, 0.17079623, 0.09262),
    (jsd, {"mix": 0.1}, 0.06841026, 0.037031),
    (jsd, {"mix": 0.01}, 0.00813543, 0.004544),
    (jsd, {"mix": 0.001}, 0.00083027, 0.000468),
    (jsd, {"mix": 0.9}, 0.06475426, 0.036919),
    (jsd, {"mix": 0.99}, 0.00740297, 0.00437),
    (jsd, {"mix": 0.999}, 0.00075068, 0.000445),
]


def gradient(value, logits):
    return torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]


@pytest.mark.parametrize(("divergence", "parameters", "value", "norm"), PINNED)
def test_pinned_values_and_gradient_norms(fixture_logits, divergence, parameters, value, norm):
    student, teacher = fixture_logits
    found = divergence(student.log_softmax(-1), teacher.log_softmax(-1), **parameters)
    assert found.item() == pytest.approx(value, abs=1e-8 if value < 0.7 else 1e-14)
    assert gradient(found, student).norm().item() == pytest.approx(norm, abs=5e-6 if value < 0.7 else 1e-14)


def scores(name, p, q, mix=0.3, alpha=0.2):
    """f of dD/dz = p (f - mean of f under p), written out per divergence."""
    lp, lq = p.log(), q.log()
    skew_forward, skew_reverse = alpha * q + (1 - alpha) * p, alpha * p + (1 - alpha) * q
    return {
        "forward_kl": -q / p,
        "reverse_kl": lp - lq,
        "stop_gradient_reverse_kl": lp - lq,
        "jsd": (1 - mix) * (lp - (mix * q + (1 - mix) * p).log()),
        "skew_forward_kl": -(1 - alpha) * q / skew_forward,
        "skew_reverse_kl": lp - skew_reverse.log() - alpha * p / skew_reverse,
        "held_skew_reverse_kl": lp - skew_reverse.log(),
        "expected_advantage": -lq,
        "rank_distance": (p - q).sign(),
    }[name]


PARAMETERS = {"jsd": {"mix": 0.3}, **dict.fromkeys(("skew_forward_kl", "skew_reverse_kl", "held_skew_reverse_kl"), {"alpha": 0.2})}


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"plackett_luce", "span_likelihood"}))
def test_one_gradient_identity_for_every_divergence(name):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    found = gradient(DIVERGENCES[name](student.log_softmax(-1), teacher.log_softmax(-1), **PARAMETERS.get(name, {})), student)
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    f = scores(name, p, q)
    expected = p * (f - (p * f).sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("divergence", "name", "alpha"), [(skew_forward_kl, "forward", 0.2), (skew_reverse_kl, "reverse", 0.7)])
def test_skewed_divergences_against_their_definition(fixture_logits, divergence, name, alpha):
    p, q = (logits.detach().softmax(-1) for logits in fixture_logits)
    first, second = (q, p) if name == "forward" else (p, q)
    expected = (first * (first / (alpha * first + (1 - alpha) * second)).log()).sum()
    assert divergence(p.log(), q.log(), alpha=alpha).item() == pytest.approx(expected.item(), abs=1e-14)


def test_entry_clip_keeps_negative_entries_and_stops_the_clipped_ones(fixture_logits):
    student, teacher = fixture_logits
    q = teacher.softmax(-1)
    clipped = forward_kl(student.log_softmax(-1), teacher.log_softmax(-1), entry_clip=0.05)
    assert clipped.item() == pytest.approx(-0.07223631, abs=1e-8)
    entries = q * (teacher.log_softmax(-1) - student.detach().log_softmax(-1))
    keep = entries < 0.05
    p = student.detach().softmax(-1)
    expected = p * (keep * q).sum(-1, keepdim=True) - keep * q
    torch.testing.assert_close(gradient(clipped, student), expected, rtol=0, atol=1e-14)
    unclipped = forward_kl(student.log_softmax(-1), teacher.log_softmax(-1), entry_clip=1e9)
    assert unclipped.item() == pytest.approx(0.8321983825361869, abs=1e-14)


def test_the_teachers_order_is_what_plackett_luce_wants():
    order = torch.tensor([[3.0, 2.0, 1.0]]).double().log_softmax(-1)
    same, reverse = (torch.tensor([z]).double().log_softmax(-1) for z in ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]))
    assert plackett_luce(same, order).item() < plackett_luce(reverse, order).item()
    by_hand = -math.log(math.exp(3) / (math.exp(3) + math.exp(2) + math.exp(1))) - math.log(math.exp(2) / (math.exp(2) + math.exp(1)))
    assert plackett_luce(same, order).item() == pytest.approx(by_hand, abs=1e-12)
    equal = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    found = gradient(plackett_luce(equal.log_softmax(-1), torch.tensor([[4.0, 3.0, 2.0, 1.0]]).double()), equal)
    assert (-found[0]).tolist() == pytest.approx([0.75, 0.41666667, -0.08333333, -1.08333333])  # the released code has it upside down
    padded = torch.tensor([[3.0, 2.0, 1.0]]).double()
    with_pad = torch.cat([padded, torch.full((1, 1), -1e4).double()], -1)
    pads_last = torch.cat([order, torch.full((1, 1), -1e4).double()], -1)
    assert plackett_luce(with_pad, pads_last).item() == pytest.approx(plackett_luce(padded, order).item(), abs=1e-12)


def test_a_held_mixture_changes_the_gradient_and_not_the_value(fixture_logits):
    student, teacher = fixture_logits
    lp, lq = student.log_softmax(-1), teacher.log_softmax(-1)
    free, held = skew_reverse_kl(lp, lq, alpha=0.1), held_skew_reverse_kl(lp, lq, alpha=0.1)
    assert free.item() == pytest.approx(held.item(), abs=1e-15)
    assert (gradient(free, student) - gradient(held, student)).norm() > 1e-2


def test_skewed_divergences_are_bounded():
    p, q = torch.tensor([[0.0, -1e4]]).double(), torch.tensor([[-1e4, 0.0]]).double()
    assert skew_forward_kl(p, q, alpha=0.1).item() == pytest.approx(-math.log(0.1), abs=1e-12)
    assert skew_forward_kl(q, q, alpha=0.1).item() == pytest.approx(0.0, abs=1e-12)
    p, q = torch.tensor([[0.7, 0.3]]).double().log(), torch.tensor([[0.2, 0.8]]).double().log()
    assert skew_forward_kl(p, q, alpha=1e-9).item() == pytest.approx(forward_kl(p, q).item(), abs=1e-7)


def test_k3_with_the_live_ratio_has_the_reverse_kls_value_and_gradient(fixture_logits):
    student, teacher = fixture_logits
    lp, lq = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(
        enumerate_gradient(k3_with_ratio, student, teacher), gradient(reverse_kl(lp, lq), student), rtol=0, atol=1e-15
    )
    assert (lp.detach().exp() * k3_with_ratio(lp.detach(), lq)).sum().item() == pytest.approx(0.7518457948092409, abs=1e-14)


def test_jsd_is_bounded_and_reaches_both_ends():
    disjoint_p, disjoint_q = torch.tensor([[0.0, -1e4]], dtype=torch.float64), torch.tensor([[-1e4, 0.0]], dtype=torch.float64)
    for mix in (0.1, 0.5, 0.9):
        bound = -mix * math.log(mix) - (1 - mix) * math.log(1 - mix)
        assert jsd(disjoint_p, disjoint_q, mix=mix).item() == pytest.approx(bound, abs=1e-12)
    p, q = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log(), torch.tensor([[0.2, 0.8]], dtype=torch.float64).log()
    assert jsd(p, q, mix=0.001).item() / 0.001 == pytest.approx(forward_kl(p, q).item(), rel=3e-3)
    assert jsd(p, q, mix=0.999).item() / 0.001 == pytest.approx(reverse_kl(p, q).item(), rel=3e-3)


def enumerate_gradient(estimator, student, teacher):
    """Exact expectation over the sampled token of the gradient of estimator(log p(y), log q(y))."""
    lp, lq = student.log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    losses = torch.stack([estimator(lp[y], lq[y]) for y in range(lp.shape[0])])
    return gradient(lp.detach().exp() * losses, student)


def test_sampled_estimators_have_the_gradients_they_claim(fixture_logits):
    student, teacher = fixture_logits
    lp, lq = student.log_softmax(-1), teacher.log_softmax(-1)
    reverse, forward = gradient(reverse_kl(lp, lq), student), gradient(forward_kl(lp, lq), student)
    torch.testing.assert_close(enumerate_gradient(sampled_reverse_kl, student, teacher), reverse, rtol=0, atol=1e-15)
    torch.testing.assert_close(enumerate_gradient(k2, student, teacher), reverse, rtol=0, atol=1e-15)
    torch.testing.assert_close(enumerate_gradient(k3, student, teacher), forward, rtol=0, atol=1e-15)
    torch.testing.assert_close(enumerate_gradient(k1, student, teacher), torch.zeros_like(forward), rtol=0, atol=1e-15)


def test_sampled_estimators_values(fixture_logits):
    student, teacher = fixture_logits
    lp, lq = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    for estimator in (sampled_reverse_kl, k1, k3):
        assert (lp.exp() * estimator(lp, lq)).sum().item() == pytest.approx(0.7518457948092409, abs=1e-14)
    assert k2(torch.tensor(-1.0), torch.tensor(-3.0)).item() == 2.0
    assert k3(torch.tensor(-1.0), torch.tensor(-1.0)).item() == 0.0


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_pads_and_impossible_tokens_give_finite_values_and_gradients(name):
    parameters = PARAMETERS.get(name, {})
    student = torch.tensor([[-0.1, -2.3, -1e4], [-0.5, -1e4, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, -0.1, -1e4], [-0.2, -1e4, -1e4]])
    value = DIVERGENCES[name](student, teacher, **parameters)
    assert value.isfinite().all() and gradient(value, student).isfinite().all()
