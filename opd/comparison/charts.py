"""Line charts and interval bars as inline SVG: no script, no font, colours from the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from opd.comparison.curves import Band, Mark
from opd.comparison.summary import PairSummary
from opd.comparison.wording import percent

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 300, 46, 14, 14, 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A horizontal line with a note. style: "target" or "base"."""

    value: float
    style: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """How a chart counts: names of both axes, numbers of the ticks as text, ticks of the upright one from `low` to `high`; doubling: x is 1, 2, 4 ...

    y_said: a value as labels say it, rounded as tables round it. x_unit: x in what the ticks count (60: x is in seconds, ticks are round
    minutes); x_name: its name after a number.
    """

    x_label: str
    y_label: str
    x_number: Callable[[float], str]
    y_number: Callable[[float], str]
    y_said: Callable[[float], str]
    low: float
    high: float
    step: float
    doubling: bool = False
    x_unit: float = 1.0
    x_name: str = ""


def percent_axes(bands: Sequence[Band], levels: Sequence[Level], *, x_label: str, x_number: Callable[[float], str], doubling: bool = False) -> Axes:
    """Shares shown in percent, from the ten below the lowest value to the ten above the highest."""
    values = [value for band in bands for value in (*band.low, *band.high)] + [level.value for level in levels]
    low = max(0.0, math.floor(min(values, default=0.0) * 10 + 1e-9) / 10)
    high = max(min(1.0, math.ceil(max(values, default=1.0) * 10 - 1e-9) / 10), low + 0.1)
    return Axes(
        x_label=x_label, y_label="accuracy, %", x_number=x_number, y_number=lambda value: f"{100 * value:.0f}", y_said=percent, low=low, high=high,
        step=0.1 if high - low <= 0.6 else 0.2, doubling=doubling,
    )  # fmt: skip


def plain_axes(bands: Sequence[Band], *, x_label: str, y_label: str, x_number: Callable[[float], str], y_number: Callable[[float], str]) -> Axes:
    """Numbers from zero to a round one above the highest."""
    highest = max((value for band in bands for value in band.high), default=0.0) or 1.0
    step = round_ticks(highest)[1]
    high = math.ceil(highest / step - 1e-9) * step
    return Axes(
        x_label=x_label, y_label=y_label, x_number=x_number, y_number=y_number, y_said=y_number, low=0.0, high=high, step=step,
    )  # fmt: skip


def line_chart(bands: Sequence[Band], axes: Axes, *, levels: Sequence[Level] = (), marks: Sequence[Mark] = ()) -> str:
    """A line and a band an arm, levels as dashed and dotted lines, marks as crosses with their text on hover and for screen readers."""
    left = 1.0 if axes.doubling else 0.0
    right = max((band.x[-1] for band in bands), default=left + 1.0)
    frame = _Frame(left=left, right=max(right, left * 2 or right), axes=axes)
    parts = [_axes(frame), *(_level(frame, level) for level in levels)]
    for drawn in bands:
        upper = [frame.point(x, y) for x, y in zip(drawn.x, drawn.high, strict=True)]
        lower = [frame.point(x, y) for x, y in zip(drawn.x, drawn.low, strict=True)]
        parts.append(f'<polygon class="band {drawn.style}" points="{" ".join(upper + lower[::-1])}"/>')
    for drawn in bands:
        line = " ".join(frame.point(x, y) for x, y in zip(drawn.x, drawn.mean, strict=True))
        ending = f"{drawn.label}: {axes.y_said(drawn.mean[-1])} at {axes.x_number(drawn.x[-1])}{axes.x_name}"
        parts.append(f'<polyline class="line {drawn.style}" points="{line}"><title>{escape(ending)}</title></polyline>')
    parts += [_mark(frame, mark) for mark in marks if mark.x <= frame.right]
    said = "; ".join(f"{b.label} from {axes.y_said(b.mean[0])} to {axes.y_said(b.mean[-1])}" for b in bands)
    noted = f". Marked: {'; '.join(dict.fromkeys(mark.text for mark in marks))}" if marks else ""
    label = escape(f"{axes.y_label} against {axes.x_label}. {said}{noted}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    left: float
    right: float
    axes: Axes

    def across(self, x: float) -> float:
        share = math.log2(x / self.left) / math.log2(self.right / self.left) if self.axes.doubling else (x - self.left) / (self.right - self.left)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(self, y: float) -> float:
        inside = min(max(y, self.axes.low), self.axes.high)
        return HEIGHT - BOTTOM - (inside - self.axes.low) / (self.axes.high - self.axes.low) * (HEIGHT - TOP - BOTTOM)

    def point(self, x: float, y: float) -> str:
        return f"{self.across(x):.1f},{self.up(y):.1f}"


def _axes(frame: _Frame) -> str:
    axes, parts = frame.axes, []
    for n in range(round((axes.high - axes.low) / axes.step) + 1):
        value = axes.low + n * axes.step
        if value <= axes.high + 1e-9:
            y = frame.up(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(axes.y_number(value))}</text>')
    doublings = [2.0**n for n in range(int(math.log2(frame.right)) + 1)] if axes.doubling else []
    for value in doublings or [tick * axes.x_unit for tick in round_ticks(frame.right / axes.x_unit, wanted=4 if axes.x_unit == 1 else 5)]:
        x = frame.across(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(axes.x_number(value)) if value else "0"}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(axes.x_label)}</text>')
    return "".join(parts)


def round_ticks(right: float, wanted: int = 4) -> list[float]:
    """0 and up to `wanted` round numbers (1, 2 or 5 times a power of ten apart) not beyond `right`."""
    if right <= 0:
        return [0.0]
    raw = right / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [n * step for n in range(int(right / step + 1e-9) + 1)]


def _level(frame: _Frame, level: Level) -> str:
    y = frame.up(level.value)
    line = f'<line class="{level.style}-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="note" x="{WIDTH - RIGHT}" y="{y - 4 if y > TOP + 12 else y + 14:.1f}" text-anchor="end">{escape(level.text)}</text>'


def _mark(frame: _Frame, mark: Mark) -> str:
    x, y = frame.across(mark.x), frame.up(mark.y)
    cross = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
    return f'<path class="mark-at {mark.style}" d="{cross}"><title>{escape(mark.text)}</title></path>'


BAR_WIDTH, BAR_HEIGHT = 220, 22


def _along(value: float, reach: float) -> float:
    return BAR_WIDTH / 2 + max(-1.0, min(1.0, value / reach)) * (BAR_WIDTH / 2 - 14)


def interval_bar(pair: PairSummary, reach: float) -> str:
    """One row of a forest plot: the interval of a difference on an axis from -reach to +reach with zero in the middle."""
    interval, y = pair.interval, BAR_HEIGHT / 2
    known = math.isfinite(interval.low)
    span = f'<line class="span" x1="{_along(interval.low, reach):.1f}" x2="{_along(interval.high, reach):.1f}" y1="{y}" y2="{y}"/>' if known else ""
    return (
        f'<svg class="forest {pair.verdict}" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" width="{BAR_WIDTH}" height="{BAR_HEIGHT}" aria-hidden="true">'
        f'<line class="zero" x1="{BAR_WIDTH / 2}" x2="{BAR_WIDTH / 2}" y1="0" y2="{BAR_HEIGHT}"/>{span}'
        f'<circle cx="{_along(interval.mean, reach):.1f}" cy="{y}" r="4.5"/></svg>'
    )


def interval_scale(reach: float) -> str:
    """The axis of a forest plot in percentage points."""
    ticks = [tick / 100 for tick in round_ticks(100 * reach, wanted=2)[1:] or round_ticks(100 * reach, wanted=4)[1:]]
    marks = [(-tick, f"\N{MINUS SIGN}{100 * tick:g}") for tick in reversed(ticks)] + [(0.0, "0")] + [(tick, f"+{100 * tick:g}") for tick in ticks]
    texts = "".join(f'<text x="{_along(value, reach):.1f}" y="14" text-anchor="middle">{text}</text>' for value, text in marks)
    return f'<svg class="scale" viewBox="0 0 {BAR_WIDTH} 18" width="{BAR_WIDTH}" height="18" aria-hidden="true">{texts}</svg>'
