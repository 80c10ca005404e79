"""What the tokens of the viewer may be coloured by, and on which scale. Plain Python."""

from collections.abc import Mapping, Sequence
from typing import Any

SCALED_BY = 2_000  # answers, evenly spread
PERCENTILE = 0.97


def modes_of(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every mode that some answer has numbers for.

    path: where the values stand in a record; minus: path of what is taken off; kind: diverging (around 0), one (from 0) or category; scale: the
    97th percentile of |value|; low, high: what the ends of the scale mean.
    """
    signals = sorted({name for sample in samples for name in sample["signals"]})
    terms = sorted({name for sample in samples for name in sample["advantage"] | sample["weight"]})
    columns = sorted({name for sample in samples for name in sample.get("columns", {})})
    several = len(signals) > 1
    modes = []
    for name in signals:
        who, path = (f"teacher {name}" if several else "teacher"), ["signals", name]
        modes += [
            _mode(f"{who} − student log-prob", who, "diverging", [*path, "logp"], ["student_logp"], "nats", "teacher disagrees", "teacher agrees"),
            _mode(f"{who} log-prob", who, "one", [*path, "logp"], None, "nats", "likely", "unlikely"),
            _mode(f"{who} entropy", who, "one", [*path, "entropy"], None, "nats", "sure", "unsure"),
            _mode(f"{who} mass outside its top-k", who, "one", [*path, "tail"], None, "", "none", "more"),
        ]
    modes += [
        _mode("student entropy", "student", "one", ["entropy"], None, "nats", "sure", "unsure"),
        _mode("student log-prob", "student", "one", ["student_logp"], None, "nats", "likely", "unlikely"),
        _mode("log importance weight (learner − engine)", "student", "diverging", ["student_logp"], ["behaviour_logp"], "nats", "below 1", "above 1"),
    ]
    for name in columns:
        kind = "diverging" if name.startswith("loss/") else "one"
        ends = ("lowers the loss", "adds to the loss") if kind == "diverging" else ("low", "high")
        modes.append(_mode(name, "update", kind, ["columns", name], None, "", *ends))
    for name in terms:
        modes.append(_mode(f"advantage {name}", "update", "diverging", ["advantage", name], None, "", "discouraged", "encouraged"))
        modes.append(_mode(f"route of {name}", "update", "one", ["weight", name], None, "", "0", "more"))
    modes += [
        _mode("token class", "kind", "category", ["classes"], None, "", "", ""),
        _mode("weight version", "kind", "category", ["versions"], None, "", "", ""),
    ]
    chosen = samples[:: max(1, len(samples) // SCALED_BY)]
    kept = []
    for mode in modes:
        values = [] if mode["kind"] == "category" else sorted(abs(value) for sample in chosen for value in values_of(sample, mode))
        if values or mode["kind"] == "category":
            kept.append(mode | {"scale": max(values[int(PERCENTILE * (len(values) - 1))], 1e-6) if values else 1.0})
    return kept


def _mode(
    name: str, group: str, kind: str, path: list[str], minus: list[str] | None, unit: str, low: str, high: str
) -> dict[str, Any]:
    return {"name": name, "group": group, "kind": kind, "path": path, "minus": minus, "unit": unit, "low": low, "high": high}


def values_of(sample: Mapping[str, Any], mode: Mapping[str, Any]) -> list[float]:
    """A mode's known values in an answer."""
    values, off = _at(sample, mode["path"]), _at(sample, mode["minus"]) if mode["minus"] else None
    if values is None or (mode["minus"] and off is None):
        return []
    pairs = zip(values, off, strict=False) if off is not None else ((value, 0.0) for value in values)
    return [value - taken for value, taken in pairs if value is not None and taken is not None]


def _at(sample: Any, path: Sequence[str]) -> Any:
    for name in path:
        sample = sample.get(name) if isinstance(sample, Mapping) else None
    return sample
