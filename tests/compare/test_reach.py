import math

import pytest

from opd.comparison.reach import cost_to_reach, ratio_to_baseline, reach


def test_linear_between_evaluations():
    assert cost_to_reach([(0, 0.2), (100, 0.4), (200, 0.8), (300, 0.9)], 0.6) == pytest.approx(150)
    assert cost_to_reach([(0, 0.2), (100, 0.4)], 0.6) is None
    assert cost_to_reach([(0, 0.7), (100, 0.8)], 0.6) == 0
    assert cost_to_reach([], 0.6) is None


def test_a_lucky_evaluation_does_not_count():
    lucky = [(0, 0.2), (100, 0.65), (200, 0.3), (300, 0.6), (400, 0.7)]
    assert cost_to_reach(lucky, 0.6) == pytest.approx(300)
    assert cost_to_reach([(0, 0.2), (100, 0.8)], 0.6) == pytest.approx(200 / 3)  # the last evaluation stands alone


def test_reach_over_seeds_is_a_geometric_mean_with_a_t_interval():
    curves = [[(0, 0.0), (cost, 1.0)] for cost in (100.0, 200.0, 400.0)]
    found = reach(curves, 0.5)
    assert found.by_seed == pytest.approx((50, 100, 200))
    assert found.typical == pytest.approx(100)
    half = 4.302652729911275 * math.log(2) / math.sqrt(3)  # t quantile with 2 degrees of freedom
    assert (found.low, found.high) == pytest.approx((100 * math.exp(-half), 100 * math.exp(half)))


def test_a_seed_that_misses_leaves_no_typical_cost():
    found = reach([[(0, 0.0), (100, 1.0)], [(0, 0.0), (100, 0.3)]], 0.5)
    assert (found.typical, found.reached, found.by_seed) == (None, 1, (50.0, None))


def straight(*costs):
    return reach([[(0, 0.0), (cost, 1.0)] for cost in costs], 0.5)


def test_ratio_is_paired_by_seed():
    found = ratio_to_baseline(straight(10, 20, 40), straight(40, 80, 160), arm_learned=True, baseline_learned=True)
    assert (found.value, found.low, found.high) == pytest.approx((4.0, 4.0, 4.0))
    assert not found.at_least


def test_a_baseline_that_misses_gives_a_lower_bound_without_an_interval():
    baseline = reach([[(0, 0.0), (100, 0.3)], [(0, 0.0), (100, 1.0)]], 0.5)
    found = ratio_to_baseline(straight(20, 20), baseline, arm_learned=True, baseline_learned=True)
    assert found.at_least and found.low is None
    assert found.value == pytest.approx(math.sqrt(10 * 5))


@pytest.mark.parametrize(
    ("arm", "arm_learned", "baseline_learned", "why"),
    [
        (straight(10, 20), False, True, "did not learn here"),
        (straight(10, 20), True, False, "no ratio: the baseline did not learn here"),
        (reach([[(0, 0.0), (9, 0.1)]] * 2, 0.5), True, True, "> budget"),
        (reach([[(0, 0.0), (9, 0.1)], [(0, 0.0), (9, 1.0)]], 0.5), True, True, "> budget in 1 of 2 seeds"),
        (straight(10, 20, 30), True, True, "no ratio: the arms do not share their seeds"),
    ],
)
def test_no_ratio_where_none_may_be_taken(arm, arm_learned, baseline_learned, why):
    found = ratio_to_baseline(arm, straight(10, 20), arm_learned=arm_learned, baseline_learned=baseline_learned)
    assert (found.value, found.why) == (None, why)


def test_an_arm_that_spends_nothing_of_a_kind_has_no_ratio_there():
    free = reach([[(0, 0.0), (0, 1.0)], [(0, 0.0), (0, 1.0)]], 0.5)
    assert (free.typical, free.reached) == (None, 2)
    found = ratio_to_baseline(free, straight(10, 20), arm_learned=True, baseline_learned=True)
    assert (found.value, found.why) == (None, "no ratio: nothing of this kind was spent")
