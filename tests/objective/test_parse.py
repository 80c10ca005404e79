"""Bad recipes: every message names the place, what is wrong and the nearest valid thing. Good ones: defaults and functions of one's own."""

import math

import pytest
import torch

from opd.config.choices import parameters_of, resolve
from opd.objective import build_objective


def own_weight(now, *, strength: float = 1.0):
    return torch.full_like(now.student_logp, strength)


def own_divergence(student_logp, teacher_logp):
    return (student_logp - teacher_logp).square().sum(-1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"distil": "forward_kl"}, r"objective.0: unknown key 'distil' \(did you mean 'distill'\?\)"),
        (
            {"distill": "forwad_kl"},
            r"objective.0.distill: unknown name 'forwad_kl' \(did you mean 'forward_kl'\?\); valid: expected_advantage, forward_kl",
        ),
        ({"distill": {"jsd": {"mixx": 0.5}}}, r"objective.0.distill: jsd: unknown parameter 'mixx' \(did you mean 'mix'\?\)"),
        ({"distill": {"jsd": {"mix": 1.0}}}, r"jsd.mix is 1.0; it must be a number above 0 and below 1"),
        ({"distill": {"jsd": {"mix": "half"}}}, r"jsd.mix is 'half'; it must be a number"),
        ({"distill": {"jsd": {"mix": True}}}, r"jsd.mix is True; it must be a number"),
        ({"distill": {"jsd": 0.5}}, r"jsd takes named parameters, not 0.5"),
        ({"distill": {"jsd": {}, "forward_kl": {}}}, r"is not a choice"),
        ({"distill": "skew_forward_kl"}, r"skew_forward_kl: needs alpha"),
        ({"distill": {"forward_kl": {"entry_clip": -1}}}, r"entry_clip is -1; it must be a number at least 0 or null"),
        ({"distill": "jsd", "support": {"student_topk": {"tail": "bucket"}}}, r"objective.0.support: student_topk: needs k"),
        ({"distill": "jsd", "support": {"student_topk": {"k": 0}}}, r"k is 0; it must be a whole number at least 1"),
        (
            {"distill": "jsd", "support": {"student_topk": {"k": 4, "tail": "cut"}}},
            r"tail is 'cut'; it must be bucket \| renormalise \| drop",
        ),
        ({"distill": "jsd", "support": "topk"}, r"unknown name 'topk'.*valid: full, sampled, spans, student_topk, teacher_sample, teacher_topk"),
        ({"distill": "jsd", "advantage": "group_centered"}, r"unknown key 'advantage'"),
        (
            {"distill": "jsd", "policy": "reinforce"},
            r"needs exactly one of distill, policy, nll, student_entropy, reference_kl, match; found distill, policy",
        ),
        ({"coef": 1.0}, r"needs exactly one of .*; found none"),
        ({"policy": "ppo_clip"}, r"a policy term needs an advantage: group_centered, leave_one_out"),
        ({"policy": "ppo", "advantage": "group_centered"}, r"unknown name 'ppo' \(did you mean 'ppo_clip'\?\)"),
        ({"policy": {"ppo_clip": {"dual": 1.0}}, "advantage": "raw_reward"}, r"dual is 1.0; it must be a number above 1 or null"),
        ({"nll": {"smooth": 0.1}}, r"nll takes no parameters"),
        (
            {"nll": {}, "weight": ["ones", "staleness"]},
            r"weight: unknown name 'staleness' \(did you mean 'staleness_ratio'\?\)",
        ),
        ({"nll": {}, "route": "corect"}, r"did you mean 'correct'"),
        ({"nll": {}, "reduce": "mean"}, r"objective.0.reduce: unknown name 'mean'.*valid: constant, sequence_mean, token_mean"),
        ({"nll": {}, "reduce": "constant"}, r"constant: needs length"),
        ({"nll": {}, "coef": {"linear": {"start": 1.0}}}, r"objective.0.coef: linear: needs end, steps"),
        ({"nll": {}, "coef": True}, r"objective.0.coef: True is not a choice"),
        ({"nll": {}, "allow": ["k3_los"]}, r"objective.0.allow: unknown name 'k3_los' \(did you mean 'k3_loss'\?\)"),
        ({"nll": {}, "name": "a/b"}, r"objective.0.name: 'a/b' must be a plain word"),
        ({"nll": {}, "weight": {"fn": "nowhere:weight"}}, r"cannot import 'nowhere'"),
        ({"nll": {}, "weight": {"fn": "math:nothing"}}, r"module 'math' has no function 'nothing'"),
        ({"nll": {}, "weight": {"fn": "math.exp"}}, r"write package.module:function"),
        ("forward_kl", r"a term is a mapping such as"),
    ],
)
def test_bad_terms_are_refused_with_the_place_and_the_fix(spec, message):
    with pytest.raises(ValueError, match=message):
        build_objective([spec])


def test_an_objective_needs_terms():
    with pytest.raises(ValueError, match="no terms"):
        build_objective([])


def test_two_terms_may_not_share_a_name():
    with pytest.raises(ValueError, match="no other term has"):
        build_objective([{"nll": {}, "name": "same"}, {"nll": {}, "name": "same"}])


def test_documented_defaults():
    distill, policy, anchor = build_objective(
        [{"distill": "forward_kl"}, {"policy": "ppo_clip", "advantage": "group_centered"}, {"reference_kl": "k2"}]
    ).terms
    assert (distill.signal, distill.support.kind, distill.reduce.kind, distill.reduce.over) == ("main", "full", "token_mean", "routed")
    assert (distill.route.__name__, policy.route.__name__, anchor.route.__name__) == ("has_view", "everything", "has_view")
    assert distill.weights == policy.weights == () and distill.coef(3, {}) == 1.0 and anchor.signal == "reference"
    assert policy.signal is None and policy.signals == frozenset()
    assert parameters_of(policy.loss) == {"low": 0.2, "high": 0.2, "dual": None}


def test_functions_of_ones_own(small):
    student = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token = torch.tensor([0, 1])
    rows = small.rows(token, {"main": (student.flip(-1), small.top_ids(student, 2, token))}, terms=("distill",))
    spec = {"distill": {"fn": f"{__name__}:own_divergence"}, "support": {"student_topk": {"k": 2}}}
    plain = small.run(small.build(spec), student, rows)
    doubled = small.run(small.build({**spec, "weight": {"fn": f"{__name__}:own_weight", "strength": 2.0}}), student, rows)
    assert doubled.loss.item() == pytest.approx(2 * plain.loss.item()) and plain.loss.item() > 0
    with pytest.raises(ValueError, match="unknown parameter 'strenght'.*did you mean 'strength'"):
        small.build({"nll": {}, "weight": {"fn": f"{__name__}:own_weight", "strenght": 2.0}})


def test_infinite_numbers_are_refused():
    with pytest.raises(ValueError, match="strength is inf; it must be a number"):
        resolve({"fn": f"{__name__}:own_weight", "strength": math.inf}, {}, "weight")
