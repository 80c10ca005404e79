"""Numbers as text: accuracies, differences, costs, ratios and probabilities, each with its interval."""

import math
from collections.abc import Sequence

from opd.comparison.costs import PerPoint
from opd.comparison.reach import Ratio, Reach
from opd.comparison.statistics import Interval

MINUS = "\N{MINUS SIGN}"


def percent(value: float) -> str:
    """0.8712 -> "87.1"."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of accuracies in percentage points, signed: 0.123 -> "+12.3"."""
    text = f"{100 * abs(value):.1f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def percent_interval(interval: Interval) -> str:
    """The bounds in percent, cut to what an accuracy can be; words where one cell leaves no spread to judge by."""
    if not math.isfinite(interval.low):
        return "no interval"
    return f"{percent(max(0.0, interval.low))} to {percent(min(1.0, interval.high))}"


def points_interval(low: float, high: float) -> str:
    """The bounds in points; words where there is no spread to judge by."""
    if not math.isfinite(low):
        return "no interval"
    return "no spread" if low == high else f"{points(low)} to {points(high)}"


def detectable_text(value: float | None) -> str:
    """The smallest true difference that would be seen, in points; a dash where nothing can be said."""
    return percent(value) if value is not None and value < 10 else "–"


def seeds_text(interval: Interval, needed: int | None, *, seeds_vary: bool = True) -> str:
    """With how many seeds a difference would be resolved; a dash for one of exactly 0 and where one seed shows no spread."""
    if not seeds_vary:
        return "no seeds vary"
    if interval.seeds < 2 or abs(interval.mean) < 1e-12:
        return "–"
    return str(needed) if needed else "> 100"


def time_unit(longest: float) -> tuple[float, str]:
    """(seconds in it, its name) of the unit in which an axis up to so many seconds counts."""
    return (1.0, "s") if longest < 100 else (60.0, "min") if longest < 6_000 else (3_600.0, "h")


def p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def amount(value: float) -> str:
    """Tokens: 950 -> "950", 61234 -> "61.2 k", 1200000 -> "1.20 M"."""
    if value < 1_000:
        return f"{value:.0f}"
    if value < 999_500:
        return f"{value / 1_000:.1f} k" if value < 99_950 else f"{value / 1_000:.0f} k"
    return f"{value / 1_000_000:.2f} M"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6_000 else f"{seconds / 3_600:.1f} h"


def spent(cost: str, value: float) -> str:
    if cost.startswith("money, "):
        return f"{value:.3g} {cost.removeprefix('money, ')}" if value < 1000 else f"{value:,.0f} {cost.removeprefix('money, ')}"
    return duration(value) if cost.endswith("seconds") else amount(value)


def per_point_text(cost: str, found: PerPoint) -> str:
    """Cost of a point of gain with its interval, or why there is none."""
    if found.value is None:
        return found.why
    if found.low is None:
        return spent(cost, found.value)
    return f"{spent(cost, found.value)} ({spent(cost, found.low)} to {'any' if found.high is None else spent(cost, found.high)})"


def reach_text(found: Reach, cost: str) -> str:
    """Cost to the target with its interval, or "> budget"."""
    if found.typical is None:
        if not found.by_seed:
            return "no run"
        missed = len(found.by_seed) - found.reached
        if found.reached and missed == 0:
            return "nothing spent"
        largest = spent(cost, max(found.budgets))
        return f"> budget ({largest})" if not found.reached else f"> budget in {missed} of {len(found.by_seed)} seeds"
    if found.low is None or found.high is None:
        return spent(cost, found.typical)
    return f"{spent(cost, found.typical)} ({spent(cost, found.low)} to {spent(cost, found.high)})"


def ratio_text(ratio: Ratio | None) -> str:
    """The ratio with its interval, a lower bound, or why there is none."""
    if ratio is None or ratio.value is None:
        return ratio.why if ratio else ""
    if ratio.at_least:
        return f"> {times(ratio.value)}"
    if ratio.low is None or ratio.high is None or ratio.low == ratio.high:
        return times(ratio.value)
    return f"{times(ratio.value)} ({times(ratio.low)} to {times(ratio.high)})"


def times(value: float) -> str:
    """How many times as much: 1.99 -> "1.99×"."""
    return f"{value:.0f}\N{MULTIPLICATION SIGN}" if value >= 100 else f"{value:.3g}\N{MULTIPLICATION SIGN}"


MANY = 10  # a sentence that names more than that is not read; tables name them all


def shortened(items: Sequence[str]) -> str:
    """ "a, b and c", and of more than MANY the first ones and how many follow."""
    return listed(items) if len(items) <= MANY else listed([*items[: MANY - 1], f"{len(items) - MANY + 1} more"])


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return ", ".join(items[:-1]) + (" and " if len(items) > 1 else "") + items[-1] if items else ""
