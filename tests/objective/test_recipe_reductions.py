"""Published methods that must coincide, from recipe to gradient: equal to 1e-10 in fp64 once what sets them apart is switched off."""

import pytest
import torch

from opd.learner.ema import Shadow
from opd.objective import Setting, build_objective
from tests.objective.dense import Batch, V, load
from tests.objective.test_reductions import alike

NO_VIEW_ROUTES = {"without": ["0.weight", "0.route"]}
REVERSE_KL = {  # every name here is the reverse KL over the whole vocabulary, a mean over tokens
    "gkd": {"t0__distill": "reverse_kl", "without": ["0.reduce"]},
    "sdpo": {"t0__distill": "reverse_kl", "k": V, **NO_VIEW_ROUTES},
    "tip": {"t0__weight": {"soft_or": {"share": 1.0}}, "k": V},
    "opd_topk": {"k": V},
    "opsd_reverse": {},
    "opsdc": {},
    "opsd_pi": {"t0__coef": 0.0, "t1__coef": 1.0, "without": ["1.route"]},
    "sd_zero": {"t0__coef": 0.0, "t1__coef": 1.0, "k": V},
    "paced": {"t0__coef": 0.0, "t1__coef": 1.0, "without": ["1.route"]},
    "eopd": {"t1__coef": 0.0},
}
FORWARD_KL = {
    "opsd": {"t0__distill": {"forward_kl": {"entry_clip": 1e9}}},
    "sdft": {"without": ["0.reduce"]},
    "atesd": {"t0__distill": "forward_kl", "without": ["0.reduce"]},
    "opsd_topk": {"k": V},
    "sd_zero": {"t0__coef": 1.0, "t1__coef": 0.0, "k": V},
    "unisd": {"t1__coef": 0.0, "t2__coef": 0.0, "without": ["0.weight"]},
    "unisd_clip": {"t0__distill": {"forward_kl": {"token_clip": 1e9}}, "k": V},
    "taid": {"t0__target": {"geometric": {"share": 1.0}}, "k": V},
}


@pytest.fixture
def batch():
    return Batch.make(signals=("main", "second", "third", "negative"))


@pytest.mark.parametrize("name", REVERSE_KL)
def test_the_reverse_kl_in_all_its_names(batch, name):
    alike(batch.run(load(name, **REVERSE_KL[name])[1]), batch.run(load("opd_full")[1]))


@pytest.mark.parametrize("name", FORWARD_KL)
def test_the_forward_kl_in_all_its_names(batch, name):
    alike(batch.run(load(name, **FORWARD_KL[name])[1]), batch.run(load("skd")[1]))


@pytest.mark.parametrize("name", ["pw_opsd", "atesd"])
def test_opsd_over_answers(batch, name):
    """A ramp whose floor is 1, and an exposure that no longer moves, leave OPSD with a mean over answers."""
    flat = {"t0__weight": {"position_ramp": {"floor": 1.0, "middle": 0.3, "width": 0.1}}} if name == "pw_opsd" else {}
    alike(batch.run(load(name, **flat)[1]), batch.run(load("opsd", t0__reduce="sequence_mean")[1]))


def test_srpo_is_reinforcement_where_nobody_has_a_sibling():
    batch = Batch.make(signals=())
    spec = {"policy": {"ppo_clip": {"low": 0.2, "high": 0.28}}, "advantage": "group_centered"}
    plain = batch.run(build_objective([spec], Setting(group=4, source="student")))
    alike(batch.run(load("srpo")[1]), plain)
    assert any(g.any() for g in plain[1])


def test_srpo_is_sdpo_where_all_are_wrong_with_a_sibling():
    batch = Batch.make(signals=("main",), rewards=(0.0,) * 8)
    even = [{"staleness_ratio": {"cap": 2.0}}, {"batch_confidence": {"beta": 0.0}}]
    alike(batch.run(load("srpo", t1__weight=even)[1]), batch.run(load("sdpo")[1]))
    with pytest.raises(AssertionError):
        alike(batch.run(load("srpo")[1]), batch.run(load("sdpo")[1]))


def test_one_view_of_avsd_is_opsd_on_sampled_tokens(batch):
    for a in batch.answers:
        a.teachers["second"] = a.teachers["main"]
    wanted = batch.run(load("opsd_sampled")[1])
    for signals in (["main"], ["main", "second"]):
        spec = {"policy": "reinforce", "advantage": {"consensus": {"signals": signals}}}
        alike(batch.run(build_objective([spec], Setting(signals=("main", "second"), source="student"))), wanted)


def test_opsd_pi_without_its_teacher_is_the_clipped_reward(batch):
    """At ratio one: REINFORCE on the group-centred reward; groups of equal rewards have no advantage and leave the mean."""
    for a in batch.answers:
        a.old = a.now
    plain = {"policy": "reinforce", "advantage": "group_centered"}
    wanted = batch.run(build_objective([plain], Setting(group=4, source="student")))
    alike(batch.run(load("opsd_pi", t1__coef=0.0)[1]), wanted)


def test_teachers_by_distribution_forms_agree_with_the_sampled_ones(batch):
    """IW-OPD at gamma 0, REOPOLD without its floor in reach and OPD without its ratio are VLA-OPD."""
    for a in batch.answers:
        a.teachers["main"] = a.old + 0.1 * a.teachers["main"]
    wanted = batch.run(load("vla_opd")[1])
    flat = {"t0__advantage": [{"teacher_logratio": {"signal": "main"}}, {"early_tokens_first": {"gamma": 0.0}}]}
    alike(batch.run(load("iw_opd", **flat)[1]), wanted)
    alike(batch.run(load("reopold")[1]), wanted)
    alike(batch.run(load("opd", without=["0.weight"])[1]), wanted)


def test_an_average_of_rate_one_is_the_student_and_of_rate_zero_the_start():
    start, now = {"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([2.0, 0.0])}
    live, still = Shadow(start, rate=1.0), Shadow(start, rate=0.0)
    for shadow in (live, still):
        shadow.tick(now)
    assert torch.equal(live.tensors["w"], now["w"]) and torch.equal(still.tensors["w"], start["w"])
