"""Line charts and interval bars as inline SVG: no script, no font, colours from the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from opd.comparison.results import CurvePoint
from opd.comparison.summary import ArmSummary, PairSummary

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 300, 40, 14, 12, 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """One arm's curve over seeds on a common grid of costs; low and high are the extremes over seeds."""

    label: str
    style: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def band(arm: ArmSummary, cost: Callable[[CurvePoint], float], style: str, *, points: int = 60) -> Band | None:
    """Mean and extremes over the finished seeds, linear between evaluations, as far as all seeds go; None without a curve."""
    curves = [[(cost(point), point.accuracy) for point in run.curve] for run in arm.finished]
    curves = [curve for curve in curves if len(curve) > 1 and curve[-1][0] > 0]
    if not curves:
        return None
    grid = np.linspace(0.0, min(curve[-1][0] for curve in curves), points)
    values = np.array([np.interp(grid, *zip(*curve, strict=True)) for curve in curves])
    return Band(
        label=arm.label,
        style=style,
        x=tuple(grid.tolist()),
        mean=tuple(values.mean(0).tolist()),
        low=tuple(values.min(0).tolist()),
        high=tuple(values.max(0).tolist()),
    )


def line_chart(bands: Sequence[Band], *, x_label: str, target: float, base: float | None, number: Callable[[float], str]) -> str:
    """Accuracy in percent against a cost: a line and a band an arm, the target dashed, the base dotted."""
    right = max((band.x[-1] for band in bands), default=1.0)
    values = [value for band in bands for value in (*band.low, *band.high)] + [target] + ([base] if base is not None else [])
    low, high = max(0.0, math.floor(min(values) * 10) / 10), min(1.0, math.ceil(max(values) * 10) / 10)
    frame = _Frame(right=right, low=low, high=max(high, low + 0.1))
    parts = [_axes(frame, x_label, number)]
    parts.append(_level(frame, target, "target", f"target {100 * target:g} %"))
    if base is not None:
        parts.append(_level(frame, base, "base", f"base {100 * base:.0f} %"))
    for drawn in bands:
        upper = [frame.point(x, y) for x, y in zip(drawn.x, drawn.high, strict=True)]
        lower = [frame.point(x, y) for x, y in zip(drawn.x, drawn.low, strict=True)]
        parts.append(f'<polygon class="band {drawn.style}" points="{" ".join(upper + lower[::-1])}"/>')
    for drawn in bands:
        line = " ".join(frame.point(x, y) for x, y in zip(drawn.x, drawn.mean, strict=True))
        ending = f"{drawn.label}: {100 * drawn.mean[-1]:.1f} % after {number(drawn.x[-1])}"
        parts.append(f'<polyline class="line {drawn.style}" points="{line}"><title>{escape(ending)}</title></polyline>')
    summary = "; ".join(f"{b.label} ends at {100 * b.mean[-1]:.0f} %" for b in bands)
    label = escape(f"Dev accuracy against {x_label}. {summary}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    right: float
    low: float
    high: float

    def across(self, x: float) -> float:
        return LEFT + x / self.right * (WIDTH - LEFT - RIGHT)

    def up(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def point(self, x: float, y: float) -> str:
        return f"{self.across(x):.1f},{self.up(y):.1f}"


def _axes(frame: _Frame, x_label: str, number: Callable[[float], str]) -> str:
    parts = []
    step = 0.1 if frame.high - frame.low <= 0.6 else 0.2
    count = round((frame.high - frame.low) / step)
    for n in range(count + 1):
        value = frame.low + n * step
        if value <= frame.high + 1e-9:
            y = frame.up(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{100 * value:.0f}</text>')
    for value in round_ticks(frame.right):
        x = frame.across(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(number(value)) if value else "0"}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def round_ticks(right: float, wanted: int = 4) -> list[float]:
    """0 and up to `wanted` round numbers (1, 2 or 5 times a power of ten apart) not beyond `right`."""
    if right <= 0:
        return [0.0]
    raw = right / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [n * step for n in range(int(right / step + 1e-9) + 1)]


def _level(frame: _Frame, value: float, style: str, text: str) -> str:
    y = frame.up(value)
    line = f'<line class="{style}-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="note" x="{WIDTH - RIGHT}" y="{y - 4 if y > TOP + 12 else y + 14:.1f}" text-anchor="end">{escape(text)}</text>'


def interval_bar(pair: PairSummary, reach: float, *, width: int = 220, height: int = 22) -> str:
    """One row of a forest plot: the interval of a difference on an axis from -reach to +reach with zero in the middle."""

    def across(value: float) -> float:
        return width / 2 + max(-1.0, min(1.0, value / reach)) * (width / 2 - 6)

    low, high, middle = across(pair.interval.low), across(pair.interval.high), across(pair.interval.mean)
    y = height / 2
    return (
        f'<svg class="forest {pair.verdict}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}"/>'
        f'<line class="span" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        f'<circle cx="{middle:.1f}" cy="{y}" r="4.5"/></svg>'
    )
