"""The learned exposure of ATESD: rewards by hand, the gradient's sign on a bandit, and what a view shows of a solution."""

import math

import pytest
import torch

from opd.objective import Setting, build_objective
from opd.objective.exposure import FEATURES, Decision, beta_of, learned_exposure, updated
from tests.objective import dense

HOLD = {"steps": 100, "hold": 3, "look_ahead": 2, "batch": 2, "metric": "loss", "gap": "gap"}


def play(losses, state=None, **more):
    """The states after each step, fed with these losses (None at the first step: nothing is known)."""
    found, state = [], state or {}
    for step, loss in enumerate(losses):
        state = learned_exposure(step, {} if loss is None else {"loss": loss, "gap": 0.1}, state, **{**HOLD, **more})
        found.append(state)
    return found


def test_rewards_are_discounted_falls_within_the_look_ahead():
    one = Decision(0.5, (1.0,) * FEATURES)
    for fall in (0.4, -0.3, 0.9):  # a rise counts nothing, the third step lies beyond the look-ahead
        one = one.after(fall, 0.9, 2)
    assert one.reward == pytest.approx(0.4) and one.age == 3
    second = Decision(0.5, (1.0,) * FEATURES).after(-0.3, 0.9, 2).after(0.4, 0.9, 2)
    assert second.reward == pytest.approx(0.36)


def test_an_exposure_is_held_and_then_drawn_again_the_same_way_in_a_repetition():
    states = play([None, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    values = [s["value"] for s in states]
    assert values[0] == values[1] == values[2] != values[3] == values[4] == values[5] != values[6]
    assert all(0.0 < v < 1.0 for v in values)
    again = play([None, 1.0, 0.9])[-1]
    assert play([None, 1.0, 0.9, 0.8])[-1] == learned_exposure(3, {"loss": 0.8, "gap": 0.1}, again, **HOLD), "a resume from the state"
    assert play([None, 1.0, 0.9, 0.8], seed=1)[0]["value"] != values[0]
    assert all(0.25 <= s["value"] <= 0.5 for s in play([None] + [1.0] * 20, smallest=0.25, largest=0.5))


def test_a_step_without_the_loss_changes_nothing():
    before = play([None, 1.0, 0.9])[-1]
    assert learned_exposure(3, {"gap": 0.3}, before, **HOLD) == before


def test_rising_losses_teach_nothing_but_entropy():
    rising = play([None] + [1.0 + 0.1 * n for n in range(30)], entropy_weight=0.0)[-1]
    assert all(rising[f"weight_{n}"] == 0.0 for n in range(2 * FEATURES))
    falling = play([None] + [2.0 - 0.1 * n - 0.02 * n * (n % 4) for n in range(30)], entropy_weight=0.0)[-1]
    assert any(falling[f"weight_{n}"] != 0.0 for n in range(2 * FEATURES))


def test_the_update_is_the_score_function_by_hand():
    """d log Beta(x; a, b) / da = log x - digamma(a) + digamma(a + b), through a = 1 + softplus(w): slope 1/2 at w = 0."""
    done = [Decision(0.2, (1.0, 0.0, 0.0, 0.0), 1.0, 9), Decision(0.7, (1.0, 0.0, 0.0, 0.0), 0.0, 9)]
    found = updated(torch.zeros(2 * FEATURES, dtype=torch.float64), done, 1.0, 0.0, 0.0)
    a = torch.tensor(1.0 + math.log(2.0), dtype=torch.float64)
    common = torch.digamma(2 * a) - torch.digamma(a)
    first = 0.5 * sum(sign * (math.log(x) + common) for x, sign in ((0.2, 1.0), (0.7, -1.0))) / 2
    second = 0.5 * sum(sign * (math.log(1 - x) + common) for x, sign in ((0.2, 1.0), (0.7, -1.0))) / 2
    assert found[0].item() == pytest.approx(float(first), rel=1e-6) and found[FEATURES].item() == pytest.approx(float(second), rel=1e-6)
    assert found[1:FEATURES].abs().max() == 0.0
    assert beta_of(found, torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)).mean.item() < 0.5, "towards what paid"


def test_it_finds_the_best_arm_of_a_bandit():
    """The loss falls by 1 - 4 (share - 0.3)^2 at every step: the mean of the distribution goes from 0.5 to about 0.3."""
    state, loss, shares = {}, None, []
    for step in range(4_000):
        metrics = {} if loss is None else {"loss": loss, "gap": 0.0}
        state = learned_exposure(step, metrics, state, **{**HOLD, "steps": 10**9, "hold": 2, "batch": 8, "rate": 0.1, "entropy_weight": 0.0})
        # only differences of the loss matter, and its running mean is a feature: kept near zero
        loss = (0.0 if loss is None else loss) - 0.01 * (1.0 - 4.0 * (state["value"] - 0.3) ** 2)
        shares.append(state["value"])
        if loss < -1.0:
            loss, state = 0.0, {**state, "loss": 0.0, "mean_loss": 0.0}
    early, late = (sum(part) / len(part) for part in (shares[:400], shares[-400:]))
    assert abs(early - 0.5) < 0.1 and abs(late - 0.3) < 0.06


def test_controllers_are_schedules_of_the_objective():
    spec = [{"nll": {}}]
    objective = build_objective(spec, Setting(), {"exposure": {"linear": {"start": 0.0, "end": 1.0, "steps": 4}}})
    now = objective.at(1, {})
    assert now.controls == {"exposure": 0.25} and now.scheduled == {"schedule/controllers/exposure": 0.25}
    learned = build_objective(spec, Setting(), {"exposure": {"learned_exposure": {"steps": 10, "metric": "loss", "gap": "gap"}}})
    first = learned.at(0, {})
    second = learned.at(1, {**first.scheduled, "loss": 1.0, "gap": 0.0})
    assert second.controls == first.controls and second.scheduled["schedule/controllers/exposure/left"] == 4.0
    with pytest.raises(ValueError, match="controllers.exposure.*did you mean 'linear'"):
        build_objective(spec, Setting(), {"exposure": {"linnear": {}}})


def test_atesd_from_recipe_to_gradient():
    """OPSD's clipped forward KL, a mean over an answer's tokens and then over answers; how much the teacher saw is not the loss's affair."""

    def formula(answers, clip=0.05):
        total = 0.0
        for a in answers:
            p, q = a.now.log_softmax(-1), a.teachers["main"].log_softmax(-1)
            total = total + (q.exp() * (q - p)).clamp_max(clip).sum(-1).mean() / len(answers)
        return total

    batch = dense.Batch.make(signals=("main",))
    batch.expect(dense.load("atesd")[1], formula)
    batch.expect(dense.load("atesd", t0__distill="forward_kl")[1], lambda answers: formula(answers, clip=math.inf))
    for other in ({"t0__distill": "forward_kl"}, {"without": ["0.reduce"]}):
        with pytest.raises(AssertionError):
            batch.expect(dense.load("atesd", **other)[1], formula)
