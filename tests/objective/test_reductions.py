"""Methods that must coincide: the same tensors through both, equal to 1e-10 in fp64."""

from dataclasses import replace

import pytest
import torch

from opd.objective import Setting, build_objective
from tests.objective.dense import Answer, Batch

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


def through(spec, batch, **options):
    from_recipe = [spec] if isinstance(spec, dict) else spec
    return batch.run(build_objective(from_recipe, Setting(signals=("main", "reference"), group=4, source="student")), **options)


def alike(one, other, factor=1.0, value=True, atol=1e-10):
    if value:
        torch.testing.assert_close(one[0], other[0] * factor, rtol=0, atol=atol)
    for first, second in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(first, second * factor, rtol=0, atol=atol)


GRPO = {"policy": "ppo_clip", "advantage": "group_centered"}
OPD = {"policy": "reinforce", "advantage": "teacher_logratio"}
COINCIDE = {  # (one, other): losses and gradients agree to 1e-10 in fp64, whatever the batch
    "IW-OPD(gamma 0) is OPD": ({**OPD, "advantage": ["teacher_logratio", {"early_tokens_first": {"gamma": 0.0}}]}, OPD),
    "ExOPD(scale 1) is OPD": ({**OPD, "advantage": {"extrapolated_logratio": {"scale": 1.0}}}, OPD),
    "MiniLLM's return with discount 0 and its own part is OPD": (
        {**OPD, "advantage": {"future_logratio": {"discount": 0.0, "own": True, "normalise": "none"}}},
        OPD,
    ),
    "REOPOLD without a floor in reach is OPD": ({**OPD, "advantage": {"teacher_logratio": {"mixture": 1 - 1e-12}}}, OPD),
    "a selection of everything is none": ({**GRPO, "weight": {"top_entropy": {"share": 1.0}}}, GRPO),
    "an opener of everything is none": ({**GRPO, "weight": {"opener": {"share": 1.0}}}, GRPO),
    "mean-one weights of one value are none": (
        {"distill": "jsd", "weight": {"batch_confidence": {"beta": 0.0}}},
        {"distill": "jsd"},
    ),
    "KDRL without the teacher is GRPO": ([GRPO, {"reference_kl": "k2", "signal": "main", "coef": 0.0}], GRPO),
    "AlignDistil between equal models is reverse KL": (
        {"distill": "reverse_kl", "support": {"student_topk": {"k": 3}}, "target": {"extrapolate": {"reference": "main"}}},
        {"distill": "reverse_kl", "support": {"student_topk": {"k": 3}}},
    ),
    "TAID at share 1 is its divergence": (
        {"distill": "forward_kl", "support": {"teacher_topk": {"k": 3}}, "target": {"geometric": {"share": {"taid": {"start": 1.0, "steps": 9}}}}},
        {"distill": "forward_kl", "support": {"teacher_topk": {"k": 3}}},
    ),
    "a top-k of the whole vocabulary is full (forward)": (
        {"distill": "forward_kl", "support": {"teacher_topk": {"k": 7}}},
        {"distill": "forward_kl"},
    ),
    "a top-k of the whole vocabulary is full (jsd)": ({"distill": "jsd", "support": {"student_topk": {"k": 7}}}, {"distill": "jsd"}),
    "a skew of nothing is the forward KL": ({"distill": {"skew_forward_kl": {"alpha": 1e-13}}}, {"distill": "forward_kl"}),
    "penalties of coefficient 0 are none": ({**GRPO, "shape": {"kl_penalty": {"coef": 0.0}}}, GRPO),
    "constant reduction is a sum over answers x length": (
        {**GRPO, "reduce": {"constant": {"length": 22 / 8}}},
        GRPO,  # 22 tokens in 8 answers
    ),
}


@pytest.mark.parametrize("name", COINCIDE)
def test_methods_that_must_coincide(name):
    one, other = COINCIDE[name]
    batch = Batch.make()
    if name.startswith("REOPOLD"):  # the floor tends to -1 as the mixture tends to 1, so teachers below a ratio of exp(-1) are out of its reach
        for a in batch.answers:
            a.teachers["main"] = a.old + 0.1 * a.teachers["main"]
    alike(through(one, batch), through(other, batch))


def on_policy(seed=0):
    """A batch at rollout weights: old, engine and now are one policy."""
    batch = Batch.make(seed)
    for a in batch.answers:
        a.old = a.engine = a.now
    return batch


@pytest.mark.parametrize("surrogate", ["reinforce", "ppo_clip", {"cispo": {"high": 1e6}}, {"ppo_clip": {"dual": 3.0}}])
def test_at_ratio_one_all_surrogates_are_reinforce(surrogate):
    batch = on_policy()
    alike(through({**GRPO, "policy": surrogate}, batch), through({**GRPO, "policy": "reinforce"}, batch))


def test_gspo_at_ratio_one_is_reinforce_with_a_mean_over_answers():
    batch = on_policy()
    one, other = ({**GRPO, "policy": policy, "reduce": "sequence_mean"} for policy in ("sequence_clip", "reinforce"))
    alike(through(one, batch), through(other, batch))


def test_engine_corrections_vanish_where_engine_and_learner_agree():
    batch = on_policy()
    icepop = {"engine_ratio": {"low": 0.5, "high": 5.0, "outside": "mask"}}
    for weight in ({"engine_ratio": {"high": 2.0}}, icepop, "sampler_ratio", "staleness_ratio"):
        alike(through({**GRPO, "weight": weight}, batch), through(GRPO, batch))


def test_leave_one_out_is_the_centred_advantage_scaled():
    batch = Batch.make()
    alike(through({**GRPO, "advantage": "leave_one_out"}, batch), through(GRPO, batch), factor=4 / 3)


def test_minillm_is_its_two_parts_and_with_its_own_part_once_more_the_reverse_kl():
    """Enumerated over one-token answers: exact part + sampled own part have twice the reverse KL's gradient in expectation."""
    g = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(1, VOCABULARY, dtype=torch.float64, generator=g) for _ in range(2))
    own = {"policy": "reinforce", "advantage": {"future_logratio": {"own": True}}, "name": "policy"}
    total = torch.zeros(1, VOCABULARY, dtype=torch.float64)
    for y in range(VOCABULARY):
        answer = Answer(0, 0.0, torch.tensor([y]), student, student, student, {"main": teacher})
        found = through([{"distill": "reverse_kl"}, own], Batch([answer]))
        total += student.softmax(-1)[0, y] * found[1][0]
    exact = through({"distill": "reverse_kl"}, Batch([answer]))
    torch.testing.assert_close(total, 2 * exact[1][0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "spec",
    [
        GRPO,
        OPD,
        {"nll": {}},
        {"distill": "jsd"},
        {"distill": "reverse_kl", "support": {"student_topk": {"k": 3}}, "weight": {"soft_or": {"share": 0.5}}},
        {**GRPO, "advantage": ["raw_reward", "batch_whitened"], "weight": {"top_entropy": {"share": 0.5}}, "reduce": "sequence_mean"},
        {**GRPO, "policy": "sequence_clip", "reduce": "sequence_mean"},
    ],
)
def test_masked_equals_subset(spec):
    """Answers whose tokens are all masked change nothing about the others' loss and gradients, also where the whole batch is compared."""
    batch = Batch.make()
    small_batch = Batch([a for a in batch.answers if a.group == 0])
    masked = Batch([replace(a, masked=a.group == 1) for a in batch.answers])
    alone, beside = through(spec, small_batch), through(spec, masked)
    torch.testing.assert_close(alone[0], beside[0], rtol=0, atol=1e-10)
    for one, other in zip(alone[1], beside[1], strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert all(float(g.abs().max()) == 0.0 for g in beside[1][len(alone[1]) :])
