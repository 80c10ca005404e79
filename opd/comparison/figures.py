"""The report's pictures as PNG and SVG files, for papers and slides."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from opd.comparison.curves import VITAL_LABELS, Band, band, drawn_arms, passed_band, vital_band
from opd.comparison.results import PRIMARY
from opd.comparison.summary import Summary

COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#4a3aa7", "#e34948", "#008300", "#e87ba4", "#b97700")
GREY, INK = "#71716d", "#16181d"
LEGEND_LETTERS = 100  # that a line of the legend has room for


def write_figures(folder: Path, summary: Summary) -> list[Path]:
    """Accuracy against each kind of cost, pass@k against k, length, entropy and truncation, differences to the baseline; returns the paths."""
    arms = drawn_arms(summary)
    styles = {arm.name: n for n, arm in enumerate(arms)}
    paths = []
    for cost, take in summary.costs.items():
        figure, axes = _axes(cost, "dev accuracy, temperature 1 (%)")
        _curves(axes, [(styles[arm.name], found) for arm in arms if (found := band(arm, take, "")) is not None], scale=100)
        axes.axhline(100 * summary.comparison.target, color=GREY, linestyle="--", linewidth=1)
        if summary.base_dev is not None:
            axes.axhline(100 * summary.base_dev, color=GREY, linestyle=":", linewidth=1)
        paths += _save(figure, folder / f"accuracy-vs-{cost.replace(',', '').replace(' ', '-')}")
    untrained = [arm.name for arm in summary.arms if not arm.trained]
    own = {**styles, **{name: -1 - n for n, name in enumerate(untrained)}}
    passed = [(own[arm.name], found) for arm in summary.arms if arm.name in own and (found := passed_band(arm, "")) is not None]
    if passed:
        figure, axes = _axes("k", "pass@k on test, temperature 1 (%)")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        _curves(axes, passed, scale=100)
        paths += _save(figure, folder / "pass-at-k")
    for name, label, scale in VITAL_LABELS:
        bands = [(styles[arm.name], found) for arm in arms if (found := vital_band(arm, name, "")) is not None]
        if bands:
            figure, axes = _axes("generated tokens", label)
            _curves(axes, bands, scale=scale)
            axes.set_ylim(bottom=0)
            paths += _save(figure, folder / name.replace("/", "-"))
    return paths + _save(_differences(summary, styles), folder / "differences")


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _save(figure: Figure, path: Path) -> list[Path]:
    with rc_context({"svg.hashsalt": "opd", "svg.fonttype": "none"}):  # the same numbers give the same file; text stays text
        figure.savefig(path.with_suffix(".png"), metadata={"Software": "opd"})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": "opd"})
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def _curves(axes: Axes, bands: Sequence[tuple[int, Band]], *, scale: float) -> None:
    for style, found in bands:
        colour = COLOURS[style % len(COLOURS)] if style >= 0 else GREY if style == -1 else INK  # -1: the base; below: other untrained arms
        dash = (":" if style == -1 else "-.") if style < 0 else "-" if style < len(COLOURS) else "--"
        axes.fill_between(found.x, [scale * y for y in found.low], [scale * y for y in found.high], color=colour, alpha=0.14, linewidth=0)
        axes.plot(found.x, [scale * y for y in found.mean], dash, color=colour, linewidth=1.8, label=found.label)
    axes.grid(alpha=0.25)
    if axes.get_xscale() == "linear":
        axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    if bands:
        widest = max(len(found.label) for _, found in bands) + 8  # letters, the line before them included
        columns = max(1, min(4, len(bands), LEGEND_LETTERS // widest))
        axes.figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=columns)


def _differences(summary: Summary, styles: dict[str, int]) -> Figure:
    reference = summary.reference
    pairs = [pair for arm in summary.arms if (pair := summary.pair(arm.name, reference.name, PRIMARY)) is not None]
    figure = Figure(figsize=(6.4, 1.0 + 0.4 * max(1, len(pairs))), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for row, pair in enumerate(reversed(pairs)):
        interval, colour = pair.interval, COLOURS[styles[pair.left] % len(COLOURS)] if pair.left in styles else GREY
        axes.plot([100 * interval.low, 100 * interval.high], [row, row], color=colour, linewidth=2)
        axes.plot([100 * interval.mean], [row], "o", color=colour)
    axes.axvline(0.0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(pairs)), [summary.arm(pair.left).label for pair in reversed(pairs)])
    axes.set_ylim(-0.6, max(1, len(pairs)) - 0.4)
    axes.set_xlabel(f"test accuracy at temperature 1 minus that of {reference.label} (points)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
