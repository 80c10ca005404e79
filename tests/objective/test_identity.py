"""dL/dz = p (f - mean of f under p) for every divergence on every support, through the real vocabulary operations (fp64)."""

import pytest
import torch

from opd.objective.divergences import DENSE, DIVERGENCES
from tests.objective.test_divergences import PARAMETERS, scores

K, V, N = 3, 7, 5
SUPPORTS = {
    "full": "full",
    "student_topk_bucket": {"student_topk": {"k": K, "tail": "bucket"}},
    "student_topk_renormalise": {"student_topk": {"k": K, "tail": "renormalise"}},
    "student_topk_all": {"student_topk": {"k": V, "tail": "bucket"}},
    "union_bucket": {"union": {"k": K, "tail": "bucket"}},
    "union_renormalise": {"union": {"k": K, "tail": "renormalise"}},
    "teacher_topk_bucket": {"teacher_topk": {"k": K, "tail": "bucket"}},
    "teacher_topk_renormalise": {"teacher_topk": {"k": K, "tail": "renormalise"}},
    "teacher_topk_with_sampled": {"teacher_topk": {"k": K, "tail": "bucket", "sampled": True}},
}
PROPER = [name for name in DIVERGENCES if name not in ("expected_advantage", "plackett_luce", "span_likelihood", "rank_distance")]
PAIRS = [(d, s) for d in PROPER for s in SUPPORTS if s != "full" or d in DENSE]


def expected(name, student, teacher, chosen, tail):
    """The gradient [N, V] written out: categories are the chosen ids and, with a bucket, all others as one."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    inside_p, inside_q = torch.where(chosen, p, 0.0), torch.where(chosen, q, 0.0)
    if tail == "renormalise":
        p, q = inside_p / inside_p.sum(-1, keepdim=True), inside_q / inside_q.sum(-1, keepdim=True)
        f = torch.where(chosen, scores(name, p.clamp_min(1e-300), q.clamp_min(1e-300)), 0.0)
        return p * (f - (p * f).sum(-1, keepdim=True))
    rest_p, rest_q = 1 - inside_p.sum(-1, keepdim=True), 1 - inside_q.sum(-1, keepdim=True)
    of_rest = scores(name, rest_p.clamp_min(1e-300), rest_q.clamp_min(1e-300))
    f = torch.where(chosen, scores(name, p, q), of_rest)
    return p * (f - (p * f).sum(-1, keepdim=True))


@pytest.mark.parametrize(("divergence", "support"), PAIRS)
def test_gradient_identity_on_every_support(small, divergence, support):
    g = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(N, V, dtype=torch.float64, generator=g) for _ in range(2))
    token = torch.randint(V, (N,), generator=g)
    choice = SUPPORTS[support]
    parameters = {} if choice == "full" else next(iter(choice.values()))
    if choice == "full":
        ids, chosen = token[:, None], torch.ones(N, V, dtype=torch.bool)
    else:
        owners = (student, teacher) if "union" in choice else (student,) if "student_topk" in choice else (teacher,)
        top = torch.cat([owner.topk(parameters["k"], dim=-1).indices for owner in owners], -1)
        ids = torch.cat([token[:, None], torch.where(top == token[:, None], -1, top)], -1)
        chosen = torch.zeros(N, V, dtype=torch.bool).scatter(-1, top, True)
        if parameters.get("sampled") or "union" in choice:
            chosen = chosen.scatter(-1, token[:, None], True)
    spec = {"distill": {divergence: PARAMETERS.get(divergence, {})}, "support": choice, "reduce": {"constant": {"length": 1}}}
    if support == "teacher_topk_renormalise" and divergence.endswith("reverse_kl"):
        spec["allow"] = "renormalised_reverse_kl"
    rows = small.rows(token, {"main": (teacher, ids)}, terms=("distill",))
    found = small.run(small.build(spec), student, rows, {"distill": 1.0, "*": 1.0})
    torch.testing.assert_close(found.gradient, expected(divergence, student, teacher, chosen, parameters.get("tail")), rtol=0, atol=1e-12)


def test_the_identity_of_a_policy_gradient_and_of_an_advantage_on_candidates(small):
    """f = -A at the sampled token over p; f = -A(v) for the linear form, 0 beyond the candidates."""
    g = torch.Generator().manual_seed(6)
    student, up, down = (torch.randn(N, V, dtype=torch.float64, generator=g) for _ in range(3))
    token, p = torch.randint(V, (N,), generator=g), student.softmax(-1)
    rows = small.rows(token, {"main": (up, token[:, None])}, terms=("policy",))
    sampled = small.run(small.build({"policy": "reinforce", "advantage": "teacher_logratio"}), student, rows, {"policy": 1.0, "*": 1.0})
    hot = torch.nn.functional.one_hot(token, V).double()
    f = -hot / p
    torch.testing.assert_close(sampled.gradient, p * (f - (p * f).sum(-1, keepdim=True)), rtol=0, atol=1e-12)
    top = student.topk(K, dim=-1).indices
    ids = torch.cat([token[:, None], torch.where(top == token[:, None], -1, top)], -1)
    chosen = torch.zeros(N, V, dtype=torch.bool).scatter(-1, top, True)
    advantage = torch.where(chosen, up.log_softmax(-1) - down.log_softmax(-1), 0.0)
    spec = {"distill": "expected_advantage", "support": {"student_topk": {"k": K, "tail": "drop"}}, "target": "log_ratio"}
    rows = small.rows(token, {"main": (up, ids), "reference": (down, ids)}, terms=("distill",))
    linear = small.run(small.build(spec), student, rows, {"distill": 1.0, "*": 1.0})
    assert linear.loss.item() == pytest.approx(-(p * advantage).sum().item(), abs=1e-12)
    torch.testing.assert_close(linear.gradient, p * (-advantage + (p * advantage).sum(-1, keepdim=True)), rtol=0, atol=1e-12)


def test_the_students_entropy_is_exact_over_the_vocabulary(small):
    g = torch.Generator().manual_seed(7)
    student, token = torch.randn(N, V, dtype=torch.float64, generator=g), torch.zeros(N, dtype=torch.int64)
    rows = small.rows(token, {}, terms=("student_entropy",))
    found = small.run(small.build({"student_entropy": {}, "coef": -0.5}), student, rows)
    free = student.clone().requires_grad_()
    wanted = -0.5 * -(free.softmax(-1) * free.log_softmax(-1)).sum(-1).mean()
    assert found.loss.item() == pytest.approx(wanted.item(), abs=1e-12)
    torch.testing.assert_close(found.gradient, torch.autograd.grad(wanted, free)[0], rtol=0, atol=1e-12)
