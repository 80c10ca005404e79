"""Truncated supports: pinned top-3 numbers, tails completed exactly, sampled tokens taken out or added, pads and absent views."""

from dataclasses import replace

import pytest
import torch
from opd_kernels import selected_logprobs

from opd.objective.divergences import DIVERGENCES
from opd.objective.supports import Support, categories, first_occurrence, student_topk, teacher_topk
from tests.objective.test_divergences import PARAMETERS

TOP3 = {
    "drop": (0.770411, (0.27928, -0.23332, -0.13228, -0.16157, -0.05378, 0.32354, -0.02187)),
    "stop": (0.770411, (0.18555, -0.27143, -0.06666, -0.08142, -0.02710, 0.27209, -0.01102)),
    "renormalise": (0.688991, (0.11911, -0.40901, 0.0, 0.0, 0.0, 0.28990, 0.0)),
    "bucket": (0.618473, (0.24447, -0.24748, -0.10791, -0.13180, -0.04387, 0.30443, -0.01784)),
}


def top3(name, small, allow=()):
    loss = "stop_gradient_reverse_kl" if name == "stop" else "reverse_kl"
    tail = "drop" if name == "stop" else name
    return small.build({"distill": loss, "support": {"student_topk": {"k": 3, "tail": tail}}, "allow": list(allow)})


@pytest.mark.parametrize("name", TOP3)
def test_pinned_top3_values_and_gradients(small, fixture_logits, name):
    student, teacher = fixture_logits
    token = torch.tensor([2])
    ids = small.top_ids(student, 3, token)
    assert ids.tolist() == [[2, 0, 5, 1]]
    objective = top3(name, small, ["truncated_reverse_kl"])
    found = small.run(objective, student, small.rows(token, {"main": (teacher, ids)}, terms=("distill",)))
    value, gradient = TOP3[name]
    assert found.loss.item() == pytest.approx(value, abs=5e-7)
    torch.testing.assert_close(found.gradient, torch.tensor([gradient], dtype=torch.float64), rtol=0, atol=6e-6)


def test_naive_truncation_pushes_mass_out_even_at_agreement_and_the_stop_gradient_form_does_not(small, fixture_logits):
    student, _ = fixture_logits
    token = torch.tensor([0])
    rows = small.rows(token, {"main": (student.detach(), small.top_ids(student, 3, token))}, terms=("distill",))
    naive = small.run(top3("drop", small, ["truncated_reverse_kl"]), student, rows).gradient
    expected = (0.09373, 0.03811, -0.06562, -0.08014, -0.02668, 0.05144, -0.01085)
    torch.testing.assert_close(naive, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=6e-6)
    assert small.run(top3("stop", small), student, rows).gradient.abs().max().item() < 1e-16


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"expected_advantage", "plackett_luce", "span_likelihood"}))
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_gradient_on_a_support_is_that_of_the_small_distribution(small, name, tail):
    """Dense reference: lump or renormalise probabilities by hand and differentiate."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(6, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    parameters = PARAMETERS.get(name, {})
    token = torch.tensor([0, 3, 8, 1, 1, 5])
    ids = small.top_ids(student, 4, token)
    objective = small.build({"distill": {name: parameters}, "support": {"student_topk": {"k": 4, "tail": tail}}})
    found = small.run(objective, student, small.rows(token, {"main": (teacher, ids)}, terms=("distill",)))
    logits = student.clone().requires_grad_()
    kept = student.topk(4).indices

    def lump(values):
        inside = values.softmax(-1).gather(-1, kept)
        if tail == "renormalise":
            return (inside / inside.sum(-1, keepdim=True)).log()
        return torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], dim=-1).log()

    expected = DIVERGENCES[name](lump(logits), lump(teacher), **parameters).mean()
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(found.gradient, torch.autograd.grad(expected, logits)[0], rtol=0, atol=1e-12)


def test_the_whole_vocabulary_as_top_k_equals_full(small, fixture_logits):
    student, teacher = fixture_logits
    token = torch.tensor([4])
    for name in ("forward_kl", "reverse_kl", "jsd"):
        dense = small.run(
            small.build({"distill": name}), student, small.rows(token, {"main": (teacher, torch.zeros(1, 0).long())}, terms=("distill",))
        )
        for tail in ("bucket", "renormalise"):
            objective = small.build({"distill": name, "support": {"teacher_topk": {"k": 7, "tail": tail}}, "allow": "renormalised_reverse_kl"})
            rows = small.rows(token, {"main": (teacher, small.top_ids(teacher, 7, token))}, terms=("distill",))
            found = small.run(objective, student, rows)
            assert found.loss.item() == pytest.approx(dense.loss.item(), abs=1e-12)
            torch.testing.assert_close(found.gradient, dense.gradient, rtol=0, atol=1e-12)


def test_bucket_is_a_lower_bound_that_rises_with_k(small, fixture_logits):
    student, teacher = fixture_logits
    token = torch.tensor([4])
    values = []
    for k in range(1, 8):
        rows = small.rows(token, {"main": (teacher, small.top_ids(student, k, token))}, terms=("distill",))
        values.append(small.run(small.build({"distill": "reverse_kl", "support": {"student_topk": {"k": k}}}), student, rows).loss.item())
    assert all(b > a - 1e-12 for a, b in zip(values, values[1:], strict=False)) and values[0] < 0.5
    assert values[-1] == pytest.approx(0.7518457948092409, abs=1e-12)


def test_first_occurrence_marks_each_real_id_once():
    ids = torch.tensor([[3, -1, 3, 0, 0], [-1, -1, 2, 1, 2]])
    assert first_occurrence(ids).tolist() == [[True, False, False, True, False], [False, False, True, True, False]]
    assert first_occurrence(torch.zeros((2, 0), dtype=torch.int64)).shape == (2, 0)


def look(small, support: Support, student, token, ids, others=None):
    """Categories of a support for one row whose ids also hold another signal's columns."""
    teachers = {"main": (student, ids)}
    if others is not None:
        teachers["other"] = (student, others)
    rows = small.rows(token, teachers)
    weight = torch.eye(student.shape[1], dtype=student.dtype)
    return categories(support, selected_logprobs(student, weight, rows.ids), rows, rows.signals["main"])


def test_tail_is_exact_with_duplicates_and_other_signals_columns(small):
    student = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = student.softmax(-1)[0]
    on = look(small, teacher_topk(k=3), student, torch.tensor([7]), torch.tensor([[7, 1, 2, 3]]), torch.tensor([[7, 4, 4, 2]]))
    assert on.student_tail.exp().item() == pytest.approx((1 - p[1] - p[2] - p[3]).item(), abs=1e-15)
    assert on.teacher_tail.exp().item() == pytest.approx((1 - p[1] - p[2] - p[3]).item(), abs=1e-15)
    assert on.student.exp().sum().item() == pytest.approx(1.0, abs=1e-14)


def test_sampled_token_stays_when_it_is_in_the_top_k_or_asked_for(small):
    student = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]], dtype=torch.float64)
    p = student.softmax(-1)[0]
    inside = look(small, teacher_topk(k=2), student, torch.tensor([1]), torch.tensor([[1, 0, -1]]))
    assert inside.student_tail.exp().item() == pytest.approx((p[2] + p[3] + p[4]).item(), abs=1e-15)
    outside = look(small, teacher_topk(k=2), student, torch.tensor([4]), torch.tensor([[4, 0, 1]]))
    assert outside.student_tail.exp().item() == pytest.approx((p[2] + p[3] + p[4]).item(), abs=1e-15)
    joined = look(small, student_topk(k=2, sampled=True), student, torch.tensor([4]), torch.tensor([[4, 0, 1]]))
    assert joined.student_tail.exp().item() == pytest.approx((p[2] + p[3]).item(), abs=1e-15)


def test_tiny_tails_do_not_cancel_in_single_precision(small):
    student = torch.tensor([[30.0, 0.0, -1.0, -2.0]])
    on = look(small, student_topk(k=1), student, torch.tensor([1]), torch.tensor([[1, 0]]))
    expected = student.double().log_softmax(-1)[0, 1:].logsumexp(-1)
    assert on.student_tail.item() == pytest.approx(expected.item(), rel=1e-6) and expected.item() < -29


def test_rows_without_a_view_have_zero_loss_and_gradient_whatever_their_pads_hold(small):
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(2, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    token = torch.tensor([1, 2])
    for support in ({"student_topk": {"k": 3}}, {"teacher_topk": {"k": 3, "tail": "renormalise"}}, "sampled"):
        rows = small.rows(token, {"main": (teacher, small.top_ids(student, 3, token))}, terms=("distill",), route={"distill": torch.ones(2)})
        main = rows.signals["main"]
        absent = torch.tensor([True, False])
        broken = replace(
            main,
            available=absent,
            logp=torch.where(absent[:, None], main.logp, torch.nan),
            tail_logp=torch.where(absent, main.tail_logp, torch.nan),
            sampled=torch.where(absent, main.sampled, torch.nan),
        )
        ids = rows.ids.clone()
        ids[1, 1:] = -1
        name = "reverse_kl" if support == "sampled" else "forward_kl"
        found = small.run(small.build({"distill": name, "support": support}), student, replace(rows, signals={"main": broken}, ids=ids))
        alone = small.run(
            small.build({"distill": name, "support": support}),
            student[:1],
            small.rows(token[:1], {"main": (teacher[:1], rows.ids[:1, 1:])}, terms=("distill",)),
        )
        assert found.loss.item() == pytest.approx(alone.loss.item(), abs=1e-14)
        assert found.gradient[1].abs().max().item() == 0.0
        torch.testing.assert_close(found.gradient[:1], alone.gradient, rtol=0, atol=1e-14)
