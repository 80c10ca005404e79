"""Methods that must coincide: the same tensors through both, equal to 1e-10 in fp64."""

from dataclasses import replace

import pytest
import torch

VOCABULARY = 7


def same(first, second):
    torch.testing.assert_close(first.loss, second.loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(first.gradient, second.gradient, rtol=0, atol=1e-10)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(11)
    return tuple(torch.randn(4, VOCABULARY, dtype=torch.float64, generator=generator) for _ in range(2))


def rows_for(small, student, teacher, token=None, **changes):
    token = torch.tensor([0, 3, 3, 6]) if token is None else token
    ids = small.top_ids(student, VOCABULARY, token)
    return small.rows(token, {"main": (teacher, ids)}, terms=("distill", "policy"), sequence=torch.tensor([0, 0, 0, 1]), **changes)


def test_distribution_forms_of_the_reverse_kl_are_one(small, pair):
    student, teacher = pair
    rows = rows_for(small, student, teacher, old_logp=None)
    everything = {"student_topk": {"k": VOCABULARY}}
    full = small.run(small.build({"distill": "reverse_kl"}), student, rows)
    same(full, small.run(small.build({"distill": "reverse_kl", "support": everything}), student, rows))
    same(full, small.run(small.build({"distill": "reverse_kl", "support": everything, "weight": "staleness_ratio"}), student, rows))
    dropped = {"student_topk": {"k": VOCABULARY, "tail": "drop"}}
    same(full, small.run(small.build({"distill": "stop_gradient_reverse_kl", "support": dropped}), student, rows))
    same(full, small.run(small.build({"distill": "stop_gradient_reverse_kl"}), student, rows))


@pytest.mark.parametrize(
    "spec",
    [
        {"distill": "reverse_kl", "support": "sampled", "name": "policy"},
        {"reference_kl": "k2", "signal": "main", "name": "policy"},
        {"policy": "reinforce", "advantage": "teacher_logratio"},
        {"policy": "reinforce", "advantage": "teacher_logratio", "weight": "sampler_ratio"},
        {"policy": "ppo_clip", "advantage": "teacher_logratio"},
    ],
)
def test_sampled_forms_have_the_reverse_kls_expected_gradient(small, spec):
    """Every token of the vocabulary as the sample of a row, weighted with its probability through the route."""
    generator = torch.Generator().manual_seed(12)
    one, other = (torch.randn(1, VOCABULARY, dtype=torch.float64, generator=generator) for _ in range(2))
    student, teacher = one.expand(VOCABULARY, -1).contiguous(), other.expand(VOCABULARY, -1).contiguous()
    token = torch.arange(VOCABULARY)
    p, logp, target = one.softmax(-1)[0], one.log_softmax(-1)[0], other.log_softmax(-1)[0]
    rows = small.rows(token, {"main": (teacher, token[:, None])}, terms=("policy",), behaviour_logp=logp)
    rows = replace(rows, route={"policy": p}, advantage={"policy": target - logp})
    sampled = small.run(small.build(spec), student, rows, {"policy": 1.0, "*": 1.0})
    exact = small.run(small.build({"distill": "reverse_kl"}), one, small.rows(token[:1], {"main": (other, token[:1, None])}, terms=("distill",)))
    torch.testing.assert_close(sampled.gradient.sum(0, keepdim=True), exact.gradient, rtol=0, atol=1e-10)


def test_k3_and_k1_do_not_have_it(small):
    generator = torch.Generator().manual_seed(12)
    one, other = (torch.randn(1, VOCABULARY, dtype=torch.float64, generator=generator) for _ in range(2))
    token = torch.arange(VOCABULARY)
    rows = small.rows(token, {"main": (other.expand(VOCABULARY, -1).contiguous(), token[:, None])}, terms=("policy",))
    rows = replace(rows, route={"policy": one.softmax(-1)[0]})
    gradients = {}
    for name in ("k1", "k3"):
        spec = {"reference_kl": name, "signal": "main", "name": "policy", "allow": [f"{name}_loss"]}
        student = one.expand(VOCABULARY, -1).contiguous()
        gradients[name] = small.run(small.build(spec), student, rows, {"policy": 1.0, "*": 1.0}).gradient.sum(0, keepdim=True)
    forward = small.run(small.build({"distill": "forward_kl"}), one, small.rows(token[:1], {"main": (other, token[:1, None])}, terms=("distill",)))
    torch.testing.assert_close(gradients["k3"], forward.gradient, rtol=0, atol=1e-10)
    assert gradients["k1"].abs().max().item() < 1e-15


def test_an_unreached_clip_is_no_clip(small, pair):
    student, teacher = pair
    rows = rows_for(small, student, teacher)
    same(
        small.run(small.build({"distill": {"forward_kl": {"entry_clip": 1e6}}}), student, rows),
        small.run(small.build({"distill": "forward_kl"}), student, rows),
    )


def test_a_geometric_target_by_hand(small, pair):
    """Lumped to the student's top 3 and the rest, mixed in log space, renormalised and held constant."""
    student, teacher = pair
    token = torch.tensor([0, 3, 3, 6])
    rows = small.rows(token, {"main": (teacher, small.top_ids(student, 3, token))}, terms=("distill",))
    spec = {"distill": "forward_kl", "support": {"student_topk": {"k": 3}}, "target": {"geometric": {"share": 0.25}}}
    found = small.run(small.build(spec), student, rows)
    logits = student.clone().requires_grad_()
    kept = student.topk(3).indices
    p, q = (values.softmax(-1).gather(-1, kept) for values in (logits, teacher))
    p, q = (torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], dim=-1) for inside in (p, q))
    target = p.detach() ** 0.75 * q**0.25
    target = target / target.sum(-1, keepdim=True)
    expected = (target * (target / p).log()).sum(-1).mean()
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(found.gradient, torch.autograd.grad(expected, logits)[0], rtol=0, atol=1e-12)


def test_a_whole_share_of_the_teacher_is_the_teacher_and_none_is_the_student(small, pair):
    student, teacher = pair
    rows = rows_for(small, student, teacher)
    spec = {"distill": "jsd", "support": {"student_topk": {"k": 3}}}
    rows = small.rows(rows.token, {"main": (teacher, small.top_ids(student, 3, rows.token))}, terms=("distill",))
    plain = small.run(small.build(spec), student, rows)
    same(plain, small.run(small.build({**spec, "target": {"geometric": {"share": 1.0}}}), student, rows))
    assert small.run(small.build({**spec, "target": {"geometric": {"share": 0.0}}}), student, rows).gradient.abs().max() < 1e-15
    half = small.run(small.build({**spec, "target": {"geometric": {"share": 0.5}}}), student, rows).loss.item()
    assert 0 < half < plain.loss.item()


HYBRID = [
    {"policy": {"ppo_clip": {"high": 0.28}}, "advantage": "group_centered", "reduce": {"token_mean": {"over": "all"}}},
    {"distill": "jsd", "support": {"student_topk": {"k": 3}}, "reduce": {"token_mean": {"over": "all"}}},
]


def test_the_hybrid_reduces_to_either_branch_and_shares_one_denominator(small, pair):
    student, teacher = pair
    token = torch.tensor([0, 3, 3, 6])
    rows = small.rows(token, {"main": (teacher, small.top_ids(student, 3, token))}, terms=("policy", "distill"), sequence=torch.tensor([0, 0, 0, 1]))
    rows = replace(rows, advantage={"policy": torch.tensor([0.5, 0.5, 0.5, -0.5]).double()})
    reinforced, distilled = torch.ones(4).double(), torch.zeros(4).double()
    whole = {
        name: small.run(small.build({k: v for k, v in spec.items() if k != "reduce"}), student, rows)
        for name, spec in zip(("policy", "distill"), HYBRID, strict=True)
    }
    all_policy = replace(rows, route={"policy": reinforced, "distill": distilled})
    same(small.run(small.build(*HYBRID), student, all_policy), whole["policy"])
    all_distilled = replace(rows, route={"policy": distilled, "distill": reinforced})
    same(small.run(small.build(*HYBRID), student, all_distilled), whole["distill"])
    first = torch.tensor([1.0, 1.0, 1.0, 0.0]).double()
    split = small.run(small.build(*HYBRID), student, replace(rows, route={"policy": first, "distill": 1 - first}))
    assert split.divisors == {"policy": 4.0, "distill": 4.0, "*": 4.0}
    torch.testing.assert_close(split.gradient[:3], whole["policy"].gradient[:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(split.gradient[3:], whole["distill"].gradient[3:], rtol=0, atol=1e-12)
