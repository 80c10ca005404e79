"""Where two runs first part: in their metrics, to the step, and in the answers that both recorded, to the token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.run.folder import read_lines

NOT_COMPARED = ("seconds/", "rate/")
SHOWN = 4


def first_difference(left: Path, right: Path) -> dict[str, Any]:
    """{"steps": steps that both have, "step": the first whose metrics differ (or null), "metrics": its [name, left, right], "differing": how many}.

    Numbers are compared as recorded, bit by bit; times are left out, and so are metrics that only one run has. Raises ValueError without metrics.
    """
    rows = []
    for run in (left, right):
        found = {row["step"]: row for row in read_lines(run / "metrics.jsonl")}
        if not found:
            raise ValueError(f"{run} has no metrics.jsonl with steps; give other=RUN, a run folder")
        rows.append(found)
    shared = sorted(rows[0].keys() & rows[1].keys())
    for step in shared:
        a, b = rows[0][step], rows[1][step]
        names = [name for name in a if name in b and a[name] != b[name] and not name.startswith(NOT_COMPARED)]
        if names:
            first = sorted(names, key=lambda name: (not name.startswith(("reward/", "accuracy/", "loss/", "tokens/student", "length/")), name))
            metrics = [[name, a[name], b[name]] for name in first[:SHOWN]]
            return {"steps": len(shared), "step": step, "metrics": metrics, "differing": len(names)}
    return {"steps": len(shared), "step": None, "metrics": [], "differing": 0}


def pair_up(samples: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    """Answer -> (the other run's answer to the same prompt at the same step, the first token at which they differ or -1)."""
    places: dict[tuple[Any, ...], list[list[int]]] = {}
    for n, sample in enumerate(samples):
        key = (sample["step"], sample["prompt_id"], sample["group"], sample["member"])
        places.setdefault(key, [[], []])[sample.get("run", 0)].append(n)
    pairs = {}
    for left, right in places.values():
        for a, b in zip(left, right, strict=False):
            token = first_token(samples[a]["tokens"], samples[b]["tokens"])
            pairs[a], pairs[b] = (b, token), (a, token)
    return pairs


def first_token(left: Sequence[str], right: Sequence[str]) -> int:
    """The first place at which two answers differ, -1 where they are equal."""
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return -1 if len(left) == len(right) else min(len(left), len(right))
