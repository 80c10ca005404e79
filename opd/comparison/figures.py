"""The report's pictures as PNG files, for papers and slides."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd.comparison.charts import Band, band
from opd.comparison.results import PRIMARY
from opd.comparison.summary import COSTS, Summary

COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#4a3aa7", "#e34948", "#008300", "#e87ba4", "#b97700")
GREY = "#71716d"


def write_figures(folder: Path, summary: Summary) -> list[Path]:
    """One PNG a kind of cost and one of the differences to the baseline; returns their paths."""
    styles = {arm.name: n for n, arm in enumerate(arm for arm in summary.arms if arm.trained)}
    paths = []
    for cost, take in COSTS.items():
        figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        drawn = [(styles[arm.name], band(arm, take, "")) for arm in summary.arms if arm.trained]
        _curves(axes, [(style, found) for style, found in drawn if found is not None])
        axes.axhline(100 * summary.comparison.target, color=GREY, linestyle="--", linewidth=1)
        if summary.base_dev is not None:
            axes.axhline(100 * summary.base_dev, color=GREY, linestyle=":", linewidth=1)
        axes.set_xlabel(cost)
        axes.set_ylabel("dev accuracy, temperature 1 (%)")
        paths.append(folder / f"accuracy-vs-{cost.replace(' ', '-')}.png")
        figure.savefig(paths[-1], metadata={"Software": "opd"})
    paths.append(folder / "differences.png")
    _differences(summary, styles).savefig(paths[-1], metadata={"Software": "opd"})
    return paths


def _curves(axes: Axes, bands: Sequence[tuple[int, Band]]) -> None:
    for style, found in bands:
        colour, dash = COLOURS[style % len(COLOURS)], "-" if style < len(COLOURS) else "--"
        axes.fill_between(found.x, [100 * y for y in found.low], [100 * y for y in found.high], color=colour, alpha=0.14, linewidth=0)
        axes.plot(found.x, [100 * y for y in found.mean], dash, color=colour, linewidth=1.8, label=found.label)
    axes.grid(alpha=0.25)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    if bands:
        axes.legend(frameon=False, fontsize=8, loc="lower right")


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
