"""Which recipes load: a table of legal pairs, and one of illegal pairs with what the message must say."""

import re

import pytest

from opd.objective import Setting, build_objective

TEACHER = Setting(signals=("main",), group=8, source="student", vocabulary=50)


def distill(loss, support="full", **more):
    return {"distill": loss, "support": support, **more}


def topk(side, k, tail="bucket"):
    return {f"{side}_topk": {"k": k, "tail": tail}}


UNION = {"union": {"k": 8, "tail": "bucket"}}
GROUPED = {"policy": "ppo_clip", "advantage": "group_centered"}
RATIO = {"policy": "reinforce", "advantage": "teacher_logratio", "weight": "sampler_ratio"}
ALONE = Setting(signals=(), group=8, source="student")

DRAWN = Setting(signals=("main",), group=8, source="student", sampler=True)
BOTH = Setting(signals=("main", "reference"), group=8, source="student")

CURIOUS = {"policy": "squared_error", "advantage": {"curious_teacher": {"k": 8}}}
IMITATED = Setting(signals=("main",), group=1, source="dataset", vocabulary=50)

LEGAL = [
    (CURIOUS, IMITATED, ()),
    (distill({"forward_kl": {"entry_clip": 0.05}}), TEACHER, ()),
    (distill("reverse_kl", topk("student", 8)), TEACHER, ()),
    (distill("reverse_kl", topk("teacher", 8)), TEACHER, ()),
    (distill("reverse_kl", topk("student", 8, "renormalise")), TEACHER, ()),
    (distill("forward_kl", topk("teacher", 8, "renormalise")), TEACHER, ()),
    (distill("forward_kl", topk("teacher", 50)), TEACHER, ()),
    (distill("jsd", topk("teacher", 2, "renormalise")), TEACHER, ()),
    (distill("jsd", topk("student", 1)), TEACHER, ()),
    (distill("reverse_kl", UNION, target="extrapolate", weight="extrapolation_budget"), BOTH, ()),
    (distill("reverse_kl", {"union": {"k": 8, "tail": "renormalise"}}), TEACHER, ()),
    (distill("jsd", UNION, target={"consensus": {"signals": ["reference"]}}), BOTH, ()),
    (distill("stop_gradient_reverse_kl", topk("student", 8, "drop")), TEACHER, ()),
    (distill("stop_gradient_reverse_kl"), TEACHER, ()),
    (distill("reverse_kl", "sampled"), TEACHER, ()),
    (distill("jsd", topk("student", 8), target={"geometric": {"share": 0.5}}), TEACHER, ()),
    (distill("reverse_kl", topk("teacher", 8, "drop"), allow=["truncated_reverse_kl"]), TEACHER, ("truncated_reverse_kl",)),
    (distill("reverse_kl", topk("teacher", 8, "renormalise"), allow="renormalised_reverse_kl"), TEACHER, ("renormalised_reverse_kl",)),
    (distill("jsd", topk("student", 8, "drop"), allow=["truncated_jsd"]), TEACHER, ("truncated_jsd",)),
    (distill("reverse_kl", allow=["k3_loss"]), TEACHER, ()),
    ({"reference_kl": "k2", "signal": "main"}, TEACHER, ()),
    ({"reference_kl": "k3", "signal": "main", "allow": ["k3_loss"]}, TEACHER, ("k3_loss",)),
    ({"reference_kl": "k1", "signal": "main", "allow": ["k1_loss"]}, TEACHER, ("k1_loss",)),
    (GROUPED, ALONE, ()),
    (RATIO, TEACHER, ()),
    ({"nll": {}}, Setting(signals=(), group=1, source="dataset"), ()),
    (distill("jsd"), Setting(signals=("main",), group=1, source="mixed"), ()),
    ({"policy": "reinforce", "advantage": "raw_reward"}, Setting(signals=(), group=1, source="student"), ()),
    (GROUPED, Setting(), ()),
    ({**GROUPED, "shape": {"overlong": {}}}, Setting(signals=(), group=8, source="student", max_tokens=64), ()),
    ({**GROUPED, "shape": [{"kl_penalty": {"coef": 0.1, "signal": "main"}}]}, TEACHER, ()),
    ({**GROUPED, "shape": [{"kl_penalty": {"coef": 0.1, "signal": "main", "kind": "k3"}}], "allow": ["k3_reward"]}, TEACHER, ("k3_reward",)),
    ({**GROUPED, "policy": "sequence_clip"}, ALONE, ()),
    ({**GROUPED, "policy": "cispo", "weight": [{"engine_ratio": {"high": 2.0}}, {"top_entropy": {"share": 0.2}}]}, ALONE, ()),
    ({**GROUPED, "advantage": ["group_centered", "teacher_logratio", "batch_whitened"]}, TEACHER, ()),
    ({"policy": "reinforce", "advantage": ["raw_reward", "batch_whitened"]}, Setting(signals=(), group=1, source="student"), ()),
    (distill("span_likelihood", "spans"), TEACHER, ()),
    (distill("plackett_luce", topk("student", 8, "drop"), weight={"opener": {"share": 0.1}}), TEACHER, ()),
    (distill("reverse_kl", topk("student", 8), weight={"soft_or": {"share": 0.5}}), TEACHER, ()),
    (distill("reverse_kl", topk("student", 8), target={"extrapolate": {}}), BOTH, ()),
    (distill("expected_advantage", topk("student", 8, "drop"), target="log_ratio"), BOTH, ()),
    (distill({"held_skew_reverse_kl": {"alpha": 0.1}}, topk("teacher", 8), weight="confidence_gap"), TEACHER, ()),
    ({"student_entropy": {}, "coef": -0.01}, ALONE, ()),
    (distill("forward_kl", {"teacher_sample": {"draws": 50}}), TEACHER, ()),
    (distill("reverse_kl"), DRAWN, ()),
    ({**GROUPED, "weight": {"engine_ratio": {"high": 5.0}}}, DRAWN, ()),
    ({**GROUPED, "route": "from_student"}, Setting(signals=(), group=4, source="mixed"), ()),
    ({"policy": "reinforce", "advantage": {"pair_preference": {"reference": "main"}}}, Setting(signals=("main",), group=4, source="mixed"), ()),
    ({"nll": {}, "route": "from_dataset"}, Setting(signals=(), group=1, source="mixed"), ()),
    ({"nll": {}, "route": "correct_by_student_perplexity"}, ALONE, ()),
    ({"reference_kl": "k3_with_ratio", "signal": "main", "weight": "staleness_ratio"}, TEACHER, ()),
]


@pytest.mark.parametrize(("spec", "setting", "allowed"), LEGAL)
def test_legal_terms_load_and_report_the_biased_forms_that_they_use(spec, setting, allowed):
    assert build_objective([spec], setting).allowed == allowed


DATA = Setting(signals=("main",), group=1, source="dataset")
MIXED = Setting(signals=("main",), group=4, source="mixed")

ILLEGAL = [
    (distill("reverse_kl", topk("teacher", 8, "drop")), TEACHER, "no divergence", "tail: bucket", "allow: [truncated_reverse_kl]"),
    (distill("reverse_kl", topk("student", 8, "drop")), TEACHER, "no divergence", "stop_gradient_reverse_kl", "truncated_reverse_kl"),
    (distill("stop_gradient_reverse_kl", topk("teacher", 8, "drop")), TEACHER, "no divergence", "student_topk", "truncated_reverse_kl"),
    (distill("forward_kl", topk("teacher", 8, "drop")), TEACHER, "no divergence", "renormalise", "allow: [truncated_forward_kl]"),
    (
        distill("reverse_kl", topk("teacher", 8, "drop"), allow=["k3_loss"]),
        TEACHER,
        "no divergence",
        "tail: bucket",
        "truncated_reverse_kl",
    ),
    (distill("reverse_kl", topk("teacher", 8, "renormalise")), TEACHER, "lets it stay there", "student_topk", "renormalised_reverse_kl"),
    ({"reference_kl": "k3", "signal": "main"}, TEACHER, "forward KL's gradient", "reference_kl: k2", "allow: [k3_loss]"),
    ({"reference_kl": "k1", "signal": "main"}, TEACHER, "expected gradient zero", "reference_kl: k2", "allow: [k1_loss]"),
    (distill("forward_kl", topk("teacher", 1, "renormalise")), TEACHER, "always zero", "k of at least 2", None),
    ({**CURIOUS, "advantage": "teacher_logratio"}, TEACHER, "which advantages are not", "curious_teacher", None),
    ({**CURIOUS, "policy": "reinforce"}, TEACHER, "is no advantage", "squared_error", None),
    ({**CURIOUS, "advantage": {"curious_teacher": {"k": 51}}}, IMITATED, "the vocabulary has 50", "at most 50", None),
    (distill("forward_kl", topk("teacher", 51)), TEACHER, "the vocabulary has 50", "at most 50", None),
    (distill({"forward_kl": {"entry_clip": 0.05}}, topk("teacher", 8)), TEACHER, "entry_clip", "support: full", None),
    (distill("forward_kl", "sampled"), TEACHER, "sampled token alone", "distill: reverse_kl", None),
    (distill({"reverse_kl": {"entry_clip": 0.1}}, "sampled"), TEACHER, "entry_clip", "support: full", None),
    (distill("jsd", "full", target={"geometric": {"share": 0.5}}), TEACHER, "sum to one", "student_topk", None),
    (distill("reverse_kl"), ALONE, "does not declare the signal 'main'", "teacher: and view:", None),
    (distill("reverse_kl", signal="mian"), TEACHER, "did you mean 'main'?", "signals:", None),
    (RATIO, ALONE, "does not declare the signal 'main'", "grpo", None),
    ({"reference_kl": "k2"}, TEACHER, "signal 'reference'", "signals:", None),
    ({**GROUPED, "route": "not_wrong_with_view"}, ALONE, "routes by the views", "route: all", None),
    (GROUPED, Setting(signals=(), group=1, source="student"), "group is 1", "group: 2 or more", None),
    (distill("jsd", route="all_failed"), Setting(signals=("main",), group=1), "all_failed compares", "group: 2 or more", None),
    (GROUPED, Setting(signals=(), group=4, source="dataset"), "a ratio means nothing", "rollout.source: student", None),
    (RATIO, DATA, "a ratio means nothing", "rollout.source: student", None),
    (RATIO, MIXED, "'mixed'", "rollout.source: student", None),
    (distill("jsd", topk("student", 8), weight="staleness_ratio"), DATA, "a ratio means nothing", "without a ratio weight", None),
    ({"nll": {}, "weight": "sampler_ratio"}, DATA, "a ratio means nothing", "nll", None),
    (distill("reverse_kl", "sampled"), MIXED, "an estimate over sampled tokens", "distill on full", None),
    ({"policy": "reinforce", "advantage": "raw_reward"}, DATA, "an estimate over sampled tokens", "nll", None),
    ({**GROUPED, "weight": "teacher_confidence"}, TEACHER, "no signal", "student_confidence", None),
    ({**GROUPED, "shape": {"kl_penalty": {"coef": 0.1}}}, TEACHER, "does not declare the signal 'reference'", "signals:", None),
    ({**GROUPED, "shape": {"kl_penalty": {"coef": 0.1, "signal": "main", "kind": "k2"}}}, TEACHER, "inside the reward", "kind: k1", "k2_reward"),
    ({**GROUPED, "shape": {"kl_penalty": {"coef": 0.1, "signal": "main", "kind": "k3"}}}, TEACHER, "inside the reward", "k2", "k3_reward"),
    ({"policy": "reinforce", "advantage": "pair_preference"}, TEACHER, "signal 'reference'", "signals:", None),
    (distill("reverse_kl", {"teacher_sample": {"draws": 8}}), TEACHER, "not linear in the teacher", "distill: forward_kl", None),
    (distill("jsd", {"teacher_sample": {"draws": 8}}), TEACHER, "not linear in the teacher", "distill: forward_kl", None),
    (
        distill("forward_kl", {"teacher_sample": {"draws": 8}}, target={"geometric": {"share": 0.5}}),
        TEACHER,
        "sum to one",
        "student_topk",
        None,
    ),
    (GROUPED, DRAWN, "lets a teacher draw tokens", "sampler_ratio", None),
    ({"reference_kl": "k2", "signal": "main"}, DRAWN, "lets a teacher draw tokens", "sampler_ratio", None),
    (distill("plackett_luce", topk("student", 8)), TEACHER, "orders candidate tokens", "tail: drop", None),
    (distill("jsd", "spans"), TEACHER, "spans and span_likelihood go together", "distill: span_likelihood", None),
    (distill("span_likelihood", topk("teacher", 8)), TEACHER, "spans and span_likelihood go together", "the method alm", None),
    (distill("plackett_luce"), TEACHER, "named divergences only", "student_topk", None),
    (distill("reverse_kl", topk("teacher", 8), weight="soft_or"), TEACHER, "same vocabulary entries", "student_topk", None),
    (distill("reverse_kl", topk("teacher", 8), target="extrapolate"), BOTH, "same vocabulary entries", "{union:", None),
    (distill("reverse_kl", UNION, weight="soft_or"), TEACHER, "only the student's top-k offers", "student_topk", None),
    (distill("forward_kl", {"union": {"k": 8, "tail": "drop"}}), TEACHER, "no divergence", "tail: bucket", "truncated_forward_kl"),
    (distill("jsd", topk("teacher", 8), target={"consensus": {"signals": ["reference"]}}), BOTH, "same vocabulary entries", "{union:", None),
    (distill("jsd", UNION, target={"consensus": {"signals": ["referense"]}}), BOTH, "did you mean 'reference'?", "signals:", None),
    (distill("forward_kl", {"union": {"k": 51}}), TEACHER, "the vocabulary has 50", "at most 50", None),
    (distill("forward_kl", UNION, context="main"), TEACHER, "chosen in its own context", "support: full", None),
    (distill("reverse_kl", topk("student", 8), target="extrapolate"), TEACHER, "does not declare the signal 'reference'", "signals:", None),
    (distill("reverse_kl", topk("student", 8), target="log_ratio"), BOTH, "linear in the student's probabilities", "expected_advantage", None),
    (distill("expected_advantage", topk("student", 8, "drop")), TEACHER, "linear in the student's probabilities", "log_ratio", None),
    ({"nll": {}, "weight": "confidence_gap"}, TEACHER, "no signal", "student_confidence", None),
    ({"nll": {}, "route": "correct_by_student_perplexity"}, MIXED, "'mixed'", "rollout.source: student", None),
    ({"nll": {}, "route": "correct_by_student_perplexity"}, Setting(signals=(), group=1), "compares", "group: 2 or more", None),
    ({"policy": "reinforce", "advantage": "raw_reward", "route": "wrong_by_teacher_perplexity"}, ALONE, "routes by the views", "route: all", None),
    (distill({"fn": "opd.objective.divergences:k2"}), TEACHER, "named divergences only", "student_topk", None),
]


@pytest.mark.parametrize(("spec", "setting", "reason", "legal", "override"), ILLEGAL)
def test_illegal_terms_are_refused_with_the_reason_and_the_alternatives(spec, setting, reason, legal, override):
    with pytest.raises(ValueError) as refusal:
        build_objective([{"nll": {}}, spec] if setting.source is None else [spec], setting)
    message = str(refusal.value)
    before, _, after = message.partition("Legal: ")
    assert reason in before and legal in after
    assert (override or "allow: [") in after if override else "allow: [" not in message


@pytest.mark.parametrize(("spec", "setting", "reason", "legal", "override"), [row for row in ILLEGAL if row[-1] is None])
def test_what_has_no_override_stays_illegal_whatever_is_allowed(spec, setting, reason, legal, override):
    everything = ["truncated_reverse_kl", "truncated_forward_kl", "renormalised_reverse_kl", "k1_loss", "k3_loss"]
    with pytest.raises(ValueError, match="Legal: "):
        build_objective([{**spec, "allow": everything}], setting)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({**GROUPED, "advantage": ["teacher_logratio", "group_centered"]}, "an advantage is one of group_centered"),
        ({**GROUPED, "advantage": []}, "an advantage is one of"),
        ({**GROUPED, "advantage": "teacher_logratio", "shape": {"overlong": {}}}, "which no advantage here reads"),
        ({**GROUPED, "shape": {"overlong": {}}}, "overlong needs max_tokens"),
        ({**GROUPED, "shape": {"overlong": {"share": 1.5}}}, "share is 1.5"),
        ({**GROUPED, "shape": "overlng"}, "did you mean 'overlong'"),
        ({"student_entropy": {"x": 1}}, "takes no parameters"),
        ({"nll": {}, "shape": "overlong"}, "unknown key 'shape'"),
        ({**GROUPED, "weight": {"top_entropy": {"share": 2}}}, "share is 2"),
    ],
)
def test_what_a_policy_term_cannot_be_made_of(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_objective([spec], TEACHER)


def test_one_signal_has_one_set_of_ids():
    terms = [distill("forward_kl", topk("teacher", 8)), distill("reverse_kl", topk("student", 8))]
    with pytest.raises(ValueError, match="terms distill and distill_2 read signal 'main' on different supports.*Legal: the same support"):
        build_objective(terms, TEACHER)
    terms[1] = {**terms[1], "signal": "second"}
    both = build_objective(terms, Setting(signals=("main", "second")))
    assert {name: (needs.k, needs.student_support) for name, needs in both.needs.signals.items()} == {
        "main": (8, False),
        "second": (0, True),
    }


def test_the_students_top_k_is_chosen_once():
    terms = [distill("jsd", topk("student", 8)), distill("jsd", topk("student", 4), signal="second")]
    with pytest.raises(ValueError, match="top 8 and 4.*Legal: one k"):
        build_objective(terms, Setting(signals=("main", "second")))
    terms[0] = distill("jsd", UNION)
    with pytest.raises(ValueError, match="top 8 and 4.*Legal: one k"):
        build_objective(terms, Setting(signals=("main", "second")))
    terms[1] = distill("jsd", topk("student", 8), signal="second")
    needs = build_objective(terms, Setting(signals=("main", "second"))).needs
    assert (needs.student_topk, needs.signals["main"].union, needs.signals["second"].union) == (8, 8, 0)
