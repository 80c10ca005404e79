"""Group credit, token credit and routes by hand; answers without a verdict count nowhere."""

import math
from dataclasses import replace

import pytest
import torch
from opd_rollout.types import TokenScores

from opd.credit import (
    CREDITS,
    GroupOutcome,
    SequenceSignals,
    early_tokens_first,
    extrapolated_logratio,
    future_logratio,
    group_centered,
    leave_one_out,
    max_rl,
    pair_preference,
    raw_reward,
    teacher_logratio,
)
from opd.objective.routes import (
    RouteInput,
    all_failed,
    correct,
    correct_by_student_perplexity,
    everything,
    from_dataset,
    from_student,
    has_view,
    mixed_groups,
    not_wrong_with_view,
    pass_rate_bump,
    wrong,
    wrong_by_teacher_perplexity,
    wrong_with_view,
)
from opd.types import Verdict


def group(reward, valid=None):
    reward = torch.tensor(reward, dtype=torch.float64)
    count = len(reward)
    return GroupOutcome(
        reward=reward,
        correct=reward > 0.5,
        valid=torch.ones(count, dtype=torch.bool) if valid is None else torch.tensor(valid),
        length=torch.full((count,), 5),
        truncated=torch.zeros(count, dtype=torch.bool),
        logratio=torch.zeros(count, dtype=torch.float64),
    )


def test_group_centered_with_the_unbiased_deviation():
    credit = group_centered(group([1.0, 0, 0, 1, 0, 0, 0, 1]), std=True)
    assert credit[0].item() == pytest.approx(1.20761, abs=5e-6) and credit[1].item() == pytest.approx(-0.72457, abs=5e-6)
    assert group_centered(group([1.0, 0, 0, 1])).tolist() == [0.5, -0.5, -0.5, 0.5]


def test_leave_one_out_is_the_centered_credit_scaled():
    outcome = group([3.0, 1.0, 2.0, 6.0])
    assert leave_one_out(outcome).tolist() == pytest.approx([0.0, 1 - 11 / 3, 2 - 10 / 3, 4.0])
    torch.testing.assert_close(leave_one_out(outcome), group_centered(outcome) * 4 / 3, rtol=0, atol=1e-12)


def test_max_rl_divides_by_the_mean():
    assert max_rl(group([1.0, 0, 0, 0])).tolist() == [3.0, -1.0, -1.0, -1.0]
    assert max_rl(group([0.0, 0.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", sorted(CREDITS))
def test_answers_without_a_verdict_get_nothing_and_leave_the_baseline(name):
    with_invalid = CREDITS[name](group([1.0, 99.0, 0.0, 0.0], [True, False, True, True]))
    without = CREDITS[name](group([1.0, 0.0, 0.0]))
    assert with_invalid[1].item() == 0.0
    assert with_invalid[[0, 2, 3]].tolist() == without.tolist()


@pytest.mark.parametrize("name", ["group_centered", "leave_one_out", "max_rl"])
def test_one_judged_answer_has_no_baseline_and_no_credit(name):
    assert CREDITS[name](group([1.0])).tolist() == [0.0]
    assert CREDITS[name](group([1.0, 0.0], [True, False])).tolist() == [0.0, 0.0]
    assert CREDITS[name](group([1.0, 0.0], [False, False])).tolist() == [0.0, 0.0]


def test_equal_rewards_give_zero_even_when_divided_by_their_deviation():
    assert group_centered(group([0.7, 0.7, 0.7]), std=True).abs().max().item() == 0.0


def test_pair_preference_by_hand():
    """One right answer at log-ratio 1, wrong ones at 0 and 3, beta .5: sigmoid(-.5) and sigmoid(1), each times .5 / 2 pairs."""
    outcome = replace(group([1.0, 0.0, 0.0]), logratio=torch.tensor([1.0, 0.0, 3.0]).double())
    near, far = 0.25 / (1 + math.exp(0.5)), 0.25 / (1 + math.exp(-1.0))
    assert pair_preference(outcome, beta=0.5).tolist() == pytest.approx([near + far, -near, -far])
    blind = replace(outcome, logratio=torch.tensor([1.0, math.nan, 3.0]).double())
    assert pair_preference(blind, beta=0.5).tolist() == pytest.approx([2 * far, 0.0, -2 * far])
    assert pair_preference(group([1.0, 1.0])).tolist() == [0.0, 0.0] == pair_preference(group([0.0, 0.0])).tolist()


def test_raw_reward_is_the_reward():
    assert raw_reward(group([0.25, 1.0])).tolist() == [0.25, 1.0]


def scored(sampled):
    sampled = torch.tensor(sampled)
    empty = torch.zeros((len(sampled), 0))
    return TokenScores(sampled=sampled, ids=empty.long(), logp=empty, tail_logp=sampled, entropy=sampled, temperature=1.0, version=0, view_hash="")


def sequence(teacher, student, mask=None):
    return SequenceSignals(
        student_logp=torch.tensor(student),
        scores={"main": scored(teacher)},
        advantage=torch.zeros(len(student)),
        loss_mask=torch.ones(len(student), dtype=torch.bool) if mask is None else torch.tensor(mask),
    )


def test_teacher_logratio_by_hand():
    answer = sequence([-1.0, -2.0, -9.0], [-2.0, -2.0, -1.0])
    assert teacher_logratio(answer).tolist() == [1.0, 0.0, -8.0]
    assert teacher_logratio(answer, clip=3.0, scale=0.5).tolist() == [0.5, 0.0, -1.5]
    assert teacher_logratio(answer, discount=0.5).tolist() == [1.0 - 2.0, -4.0, -8.0]
    assert teacher_logratio(answer, discount=1.0).tolist() == [-7.0, -8.0, -8.0]


def test_teacher_logratio_of_masked_tokens_is_zero_and_of_an_empty_answer_empty():
    answer = sequence([-1.0, math.nan, -1.0], [-3.0, -2.0, -1.5], [True, False, True])
    assert teacher_logratio(answer).tolist() == [2.0, 0.0, 0.5]
    assert teacher_logratio(answer, discount=1.0).tolist() == [2.5, 0.0, 0.5]
    assert teacher_logratio(sequence([], []), discount=0.5).shape == (0,)


def test_future_logratio_by_the_papers_numbers():
    answer = sequence([0.0, -1.0, 0.0], [-1.0, 0.0, -2.0])  # log-ratios 1, -1, 2
    assert future_logratio(answer).tolist() == pytest.approx([0.5, 2.0, 0.0])
    assert future_logratio(answer, normalise="none").tolist() == [1.0, 2.0, 0.0]
    assert future_logratio(answer, own=True, discount=0.95).tolist() == pytest.approx([0.6183333, 0.45, 2.0])
    assert future_logratio(answer, own=True, discount=0.95, normalise="discounts").tolist() == pytest.approx([0.65031, 0.46154, 2.0], abs=1e-5)
    assert future_logratio(answer, own=True, discount=0.0, normalise="none").tolist() == teacher_logratio(answer).tolist()
    masked = sequence([0.0, -1.0, 0.0], [-1.0, 0.0, -2.0], [True, False, True])
    assert future_logratio(masked).tolist() == [2.0, 0.0, 0.0] and future_logratio(sequence([], [])).shape == (0,)


def test_the_floor_of_a_mixture_and_the_chain_of_advantages():
    answer = sequence([-9.0, -1.0], [-1.0, -2.0])
    assert teacher_logratio(answer, mixture=0.1).tolist() == pytest.approx([-2.55843, 1.0], abs=1e-5)
    rewarded = replace(answer, advantage=torch.tensor([0.5, 0.5]))
    assert teacher_logratio(rewarded, scale=0.1).tolist() == pytest.approx([0.5 - 0.8, 0.6])


def test_extrapolation_goes_beyond_the_teacher_and_at_one_is_the_teacher():
    answer = sequence([-1.0, -2.0], [-2.0, -2.5])
    answer = replace(answer, scores={**answer.scores, "reference": scored([-3.0, -1.0])})
    assert extrapolated_logratio(answer, scale=1.0).tolist() == pytest.approx(teacher_logratio(answer).tolist())
    assert extrapolated_logratio(answer, scale=1.25).tolist() == pytest.approx([1.25 * 2 - 1, 1.25 * -1 + 1.5])


def test_early_tokens_first_by_the_papers_example():
    answer = replace(sequence([0.0] * 4, [0.0] * 4), advantage=torch.tensor([-2.0, 1.0, 0.0, -1.0]))
    assert early_tokens_first(answer, gamma=0.5).tolist() == pytest.approx([-2 * 1.5, 1.25, 0.0, -1.125])
    assert torch.equal(early_tokens_first(answer, gamma=0.0), answer.advantage)
    assert early_tokens_first(sequence([0.0], [0.0])).tolist() == [0.0]


def likely(rewards, student, teacher, member):
    outcome = group(rewards)
    return RouteInput(
        verdict=Verdict(correct=rewards[member] > 0.5), has_view=True, group=outcome, member=member,
        student_logp=-torch.tensor(student).double().log(), signal_logp=-torch.tensor(teacher).double().log(),
    )  # fmt: skip


def test_scope_by_the_numbers_of_its_figure():
    student, teacher, right, failed = (1.2, 2.6, 3.8), (4.5, 2.9, 1.7), [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
    papers = [correct_by_student_perplexity(likely(right, student, teacher, n)) / 3 for n in range(3)]
    assert papers == pytest.approx([0.158, 0.342, 0.500], abs=5e-4)
    released = [correct_by_student_perplexity(likely(right, student, teacher, n), favour="low") for n in range(3)]
    assert released == pytest.approx([1.69, 0.78, 0.53], abs=5e-3)
    distilled = [wrong_by_teacher_perplexity(likely(failed, student, teacher, n)) / 3 for n in range(3)]
    assert distilled == pytest.approx([0.192, 0.298, 0.510], abs=1e-3)
    assert correct_by_student_perplexity(likely(failed, student, teacher, 0)) == 0.0
    assert 0.0 == wrong_by_teacher_perplexity(likely(right, student, teacher, 0))
    flat = [correct_by_student_perplexity(likely(right, student, teacher, n), tau=1e9) for n in range(3)]
    assert flat == pytest.approx([1.0, 1.0, 1.0])
    unknown = replace(likely(right, student, teacher, 1), student_logp=torch.tensor([-0.5, math.nan, -0.5]).double())
    assert correct_by_student_perplexity(unknown) == 0.0 and correct_by_student_perplexity(replace(unknown, member=0)) == pytest.approx(1.0)
    alone = likely([1.0, 0.0, 0.0], student, teacher, 0)
    assert correct_by_student_perplexity(alone) == 1.0


def test_routes_by_who_wrote_the_answer():
    ours, data = asked("score", True, True), replace(asked("score", True, True), source="dataset")
    assert (from_student(ours), from_dataset(ours), from_student(data), from_dataset(data)) == (1.0, 0.0, 0.0, 1.0)


def asked(status, right, view, outcome=None):
    return RouteInput(verdict=Verdict(status=status, correct=right), has_view=view, group=outcome or group([1.0, 0.0]), member=0)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        # answers: right with view, right without, wrong with, wrong without, no verdict with view
        (everything, (1, 1, 1, 1, 1)),
        (has_view, (1, 0, 1, 0, 1)),
        (correct, (1, 1, 0, 0, 0)),
        (wrong, (0, 0, 1, 1, 0)),
        (wrong_with_view, (0, 0, 1, 0, 0)),
        (not_wrong_with_view, (1, 1, 0, 1, 1)),
    ],
)
def test_routes_by_answer(route, expected):
    answers = [("score", True, True), ("score", True, False), ("score", False, True), ("score", False, False), ("error", True, True)]
    assert tuple(route(asked(*answer)) for answer in answers) == expected


@pytest.mark.parametrize(
    ("rewards", "valid", "mixed", "failed"),
    [
        ([1.0, 0.0], None, 1.0, 0.0),
        ([0.0, 0.0], None, 0.0, 1.0),
        ([1.0, 1.0], None, 0.0, 0.0),
        ([1.0, 0.0, 0.0], [False, True, True], 0.0, 1.0),
        ([1.0, 0.0], [False, False], 0.0, 0.0),
    ],
)
def test_routes_by_group(rewards, valid, mixed, failed):
    answer = asked("score", True, True, group(rewards, valid))
    assert (mixed_groups(answer), all_failed(answer)) == (mixed, failed)


def test_pass_rate_bump_peaks_at_its_share():
    answer = asked("score", True, True, group([1.0, 0.0, 0.0, 0.0]))
    assert pass_rate_bump(answer) == pytest.approx(0.25 * 0.75)
    assert pass_rate_bump(answer, a=2.0, b=1.0) == pytest.approx(0.25**2 * 0.75)
    assert pass_rate_bump(asked("score", True, True, group([0.0, 0.0]))) == 0.0
