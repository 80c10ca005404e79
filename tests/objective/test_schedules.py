"""Schedules by hand, and what they remember: in the metrics, so that a checkpoint holds it."""

import math

import pytest

from opd.objective import Setting, build_objective
from opd.objective.schedules import linear, rise_when_worse, switch, taid
from tests.objective.dense import load

TEACHER = Setting(signals=("main",), group=8, source="student")
TAID = {"geometric": {"share": {"taid": {"start": 0.2, "steps": 100, "rate": 0.5, "momentum": 0.5}}}}


def test_hold_then_decay_and_stages():
    trace = {"start": 0.5, "end": 0.0, "begin": 10, "steps": 30}
    assert [linear(step, {}, **trace) for step in (0, 5, 10, 25, 40, 99)] == [0.5, 0.5, 0.5, 0.25, 0.0, 0.0]
    assert [switch(step, {}, at=3, before=1.0, after=0.25) for step in (2, 3)] == [1.0, 0.25]


def test_distillms_share_rises_only_when_the_loss_did():
    state, values, references = {}, [], []
    for loss in (1.0, 1.05, 1.2, 1.25):
        state = rise_when_worse(0, {"loss": loss}, state, metric="loss", better="lower")
        values.append(state["value"])
        references.append(state["reference"])
    assert values == pytest.approx([0.0, 0.0, 0.1, 0.1]) and references == [1.0, 1.0, 1.2, 1.2]
    assert rise_when_worse(0, {"accuracy": 0.5}, {"value": 0.95, "reference": -0.7}, metric="accuracy")["value"] == 1.0
    assert rise_when_worse(0, {}, {"value": 0.3, "reference": 1.0}) == {"value": 0.3, "reference": 1.0}


def test_taid_by_hand_and_never_below_its_ramp():
    first = taid(0, {}, {}, start=0.2, steps=100)
    assert first == {"value": 0.2}
    second = taid(1, {"loss/distill": 2.0}, first, start=0.2, steps=100)
    assert second == {"value": pytest.approx(0.208), "previous": 2.0, "momentum": 0.0}  # the ramp
    third = taid(2, {"loss/distill": 1.0}, second, start=0.2, steps=100, rate=0.1, momentum=0.9)
    assert third["momentum"] == pytest.approx(0.1 * 0.5) and third["previous"] == 1.0
    assert third["value"] == pytest.approx(0.208 + 0.1 / (1 + math.exp(-0.05)) * 0.792)
    state, values = second, []
    for step, loss in enumerate((1.0, 3.0, 0.1, 9.0, 9.0, math.nan, 0.5), start=30):
        state = taid(step, {"loss/distill": loss}, state, start=0.2, steps=100)
        values.append(state["value"])
        assert state["value"] >= 0.2 + 0.8 * step / 100 - 1e-12
    assert values == sorted(values) and values[-1] <= 1.0


def run(objective, steps, last):
    """The shares of the target over some steps, the metrics as a run would keep them."""
    shares = []
    for step, loss in steps:
        now = objective.at(step, last)
        shares.append(now.terms[0].target.keywords["share"])
        last.update(now.scheduled)
        last["loss/distill"] = loss
    return shares


def test_a_closed_loop_goes_on_from_what_a_checkpoint_kept():
    objective = build_objective([{"distill": "forward_kl", "support": {"teacher_topk": {"k": 3}}, "target": TAID}], TEACHER)
    losses = list(enumerate((3.0, 2.0, 1.0, 0.9, 0.2, 0.1)))
    last: dict[str, float] = {}
    whole = run(objective, losses, last)
    assert set(last) == {"loss/distill"} | {"schedule/distill/geometric.share" + end for end in ("", "/previous", "/momentum")}
    kept: dict[str, float] = {}
    first = run(objective, losses[:3], kept)
    again = run(objective, losses[3:], dict(kept))
    assert first + again == whole and whole == sorted(whole) and whole[-1] > whole[0] == 0.2


def test_any_number_may_be_scheduled_and_constants_are_not_reported():
    ramp = {"linear": {"start": 1.0, "end": 3.0, "steps": 2}}
    spec = {
        "policy": {"ppo_clip": {"high": ramp}},
        "advantage": ["group_centered", {"teacher_logratio": {"scale": ramp, "clip": ramp}}],
        "weight": [{"staleness_ratio": {"cap": ramp}}, {"top_entropy": {"share": {"switch": {"at": 1}}}}],
        "shape": {"kl_penalty": {"signal": "main", "coef": ramp}},
        "coef": ramp,
    }
    now = build_objective([spec], TEACHER).at(1, {})
    [term] = now.terms
    assert term.coef == 2.0 and term.loss.keywords["high"] == 2.0 and term.weights[0].keywords["cap"] == 2.0
    assert (term.token_credits[0].keywords["scale"], term.token_credits[0].keywords["clip"]) == (2.0, 2.0)
    assert term.fields[0].keywords["share"] == 0.0 and term.shape[0].keywords["coef"] == 2.0
    assert set(now.scheduled) == {
        "schedule/policy/" + name
        for name in ("coef", "ppo_clip.high", "teacher_logratio.scale", "teacher_logratio.clip", "staleness_ratio.cap", "top_entropy.share",
                     "kl_penalty.coef")
    }  # fmt: skip
    assert build_objective([{"distill": "forward_kl", "coef": 0.5}], TEACHER).at(3, {}).scheduled == {}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"distill": {"jsd": {"mix": {"linear": {"start": 0.1, "end": 0.9, "steps": 5}}}}}, "support full cannot change while training"),
        ({"distill": "jsd", "coef": {"linar": {}}}, "did you mean 'linear'"),
        ({"distill": "jsd", "support": {"student_topk": {"k": 3}}, "target": {"geometric": {"share": {"linear": {"start": 0}}}}}, "needs end, steps"),
        ({"distill": "jsd", "support": {"student_topk": {"k": {"linear": {"start": 1, "end": 2, "steps": 3}}}}}, "k is {"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(spec, message):
    with pytest.raises(ValueError, match=message.replace("{", "\\{")):
        build_objective([spec], TEACHER)


def signals_at(name, step, **changes):
    objective = load(name, k=0, **changes)[1].at(step, {})
    return sorted(objective.needs.signals), [term.name for term in objective.terms]


def test_what_only_terms_without_a_coefficient_read_is_not_scored():
    """RLSD and CEPO after their anneal, TRACE after its spans, and the two kinds of VPD's steps."""
    assert signals_at("rlsd", 24) == (["main"], ["policy", "policy_2"])
    assert signals_at("rlsd", 25) == ([], ["policy"])
    assert signals_at("cepo", 0)[0] == ["main", "negative"] and signals_at("cepo", 30)[0] == []
    assert signals_at("trace", 0)[1] == ["policy", "distill"] and signals_at("trace", 40) == ([], ["policy", "policy_2"])
    assert [signals_at("vpd", step)[1] for step in (4, 5)] == [["distill"], ["policy"]]
    assert signals_at("paced", 0) == (["main"], ["distill"]) and signals_at("paced", 50) == (["main"], ["distill_2"])


def test_a_signal_of_which_a_route_asks_is_scored_whatever_its_terms_weigh():
    assert signals_at("hybrid", 0, t1__coef=0.0) == (["main"], ["policy", "distill"]), "the other term goes by who has a view"
    assert signals_at("grpo", 0, t0__coef=0.0)[1] == ["policy"], "a step without any coefficient keeps its terms"
