"""From a measurement to diagnosis.json and diagnosis.html: figures, and which teacher they speak for."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from opd.config.recipe import Signal
from opd.diagnosis.alignment import GRADIENTS
from opd.diagnosis.config import Settings
from opd.diagnosis.measure import Measured, aligned, alignment_of, captured, histogram, perplexity, surer, viability

SHOWN_QUESTIONS = 12
SURE = 0.95


def figures(measured: Measured, settings: Settings, candidates: Mapping[str, Signal], decode: Any) -> dict[str, Any]:
    """Everything that was found out, as plain values."""
    names = list(candidates)
    rows = {
        name: {
            "weights": candidates[name].weights,
            "view": candidates[name].view,
            "told": f"{_word(candidates[name].weights)}, {_word(candidates[name].view)}",
            "shown": sum(one is not None for one in measured.seen[name]) / len(measured.judged),
            "alignment": {loss: {only: alignment_of(measured, name, loss, only) for only in ("all", "right", "wrong")} for loss in GRADIENTS},
            "viability": viability(measured, name),
            "perplexity": perplexity(measured, name),
            "captured": captured(measured, name),
        }
        for name in names
    }
    slack = max((rate.slack for node in measured.nodes for rate in node.u.values()), default=0.0)
    found = {
        "questions": len({one.prompt.id for one in measured.judged}),
        "answers": len(measured.judged),
        "nodes": len(measured.nodes),
        "success": "enumerated" if measured.exact else f"sampled, {settings.branches} continuations",
        "largest_slack": slack if measured.exact else None,
        "settings": settings.model_dump(mode="json"),
        "pass_rates": histogram(measured),
        "candidates": rows,
        "advice": {loss: advice(measured, rows, loss) for loss in GRADIENTS},
        "examples": examples(measured, names, decode),
    }
    return found


def _word(choice: Any) -> str:
    return choice if isinstance(choice, str) else str(next(iter(choice)))


def _share(value: float) -> str:
    return "over 99 %" if value > 0.99 else f"{100 * value:.0f} %"


def advice(measured: Measured, rows: Mapping[str, Any], loss: str) -> dict[str, Any]:
    """The best aligned candidate under a loss, the runner-up, how sure the order is, and a sentence."""
    known = {name: row["alignment"][loss]["all"] for name, row in rows.items() if row["alignment"][loss]["all"]["pooled"] is not None}
    ranked = sorted(known, key=lambda name: -known[name]["pooled"])
    if not ranked:
        return {"best": None, "sentence": "No candidate's gradient could be compared: at every node all tokens succeed alike. Take harder questions."}
    best, span = ranked[0], known[ranked[0]]["interval"]
    sure = surer(measured, best, ranked[1], loss) if len(ranked) > 1 else None
    value = f"alignment {known[best]['pooled']:.2f}" + (f", 95 % {span[0]:.2f} to {span[1]:.2f}" if span else ", interval unknown: too few questions")
    if known[best]["pooled"] <= 0 or (span and span[0] <= 0):
        sentence = f"No candidate is known to help: the best, {best}, has {value}, which does not exclude a gradient against success."
    elif len(ranked) == 1:
        sentence = f"{best} points towards success ({value}); there was no other to compare it with."
    elif sure is not None and sure >= SURE:
        sentence = f"Choose {best} ({value}); it is better aligned than the next, {ranked[1]}, in {_share(sure)} of the resamples of the questions."
    else:
        said = f"{_share(sure)} of the resamples favour {best}" if sure is not None else "they share too few questions"
        sentence = f"{best} ({value}) and {ranked[1]} ({known[ranked[1]]['pooled']:.2f}) cannot be told apart: {said}. Raise diagnose.problems."
    return {"best": best, "next": ranked[1] if len(ranked) > 1 else None, "sure": sure, "order": ranked, "sentence": sentence}


def examples(measured: Measured, names: list[str], decode: Any) -> list[dict[str, Any]]:
    """Some questions, one answer each: the alignment at each of its nodes, by candidate (reverse KL), and what everybody would say there."""
    shown, seen = [], set()
    nodes = {(node.question, node.prefix): node for node in measured.nodes}
    for one in sorted(measured.judged, key=lambda one: one.verdict.correct):  # wrong answers first
        here = [(n, nodes.get((one.prompt.id, one.completion.token_ids[:n]))) for n in range(len(one.completion.token_ids))]
        if one.prompt.id in seen or not any(node for _, node in here) or len(shown) >= SHOWN_QUESTIONS:
            continue
        seen.add(one.prompt.id)
        tokens = [{"text": decode([token]), "at": None if node is None else _at(node, names, decode)} for token, (_, node) in
                  zip(one.completion.token_ids, here, strict=True)]  # fmt: skip
        right = one.verdict.correct if one.verdict.status == "score" else None
        shown.append({"question": one.prompt.messages[-1]["content"], "expected": one.prompt.answer, "right": right, "tokens": tokens})
    return shown


def _at(node: Any, names: list[str], decode: Any) -> dict[str, Any]:
    tried = [{"text": decode([token]), "p": float(p), "success": node.u[token].rate} for token, p in zip(node.ids, node.p, strict=True)]
    by = {}
    for name in names:
        if name in node.seen:
            q, top, _ = node.seen[name]
            by[name] = {"cosine": aligned(node, name, "reverse_kl")[0], "q": q.tolist(), "top": decode([top]), "top_success": node.u[top].rate}
    return {"tried": tried, "by": by}


def write(folder: Path, title: str, found: Mapping[str, Any]) -> Path:
    """diagnosis.json and diagnosis.html in the folder; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diagnosis.json").write_text(json.dumps(_finite(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    environment.filters["shade"] = lambda value: f"rgba(var(--{'up' if value > 0 else 'down'}), {min(1.0, abs(value)) * 0.6:.3f})"
    page = folder / "diagnosis.html"
    page.write_text(environment.get_template("page.html.j2").render(title=title, f=found), encoding="utf-8")
    return page


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
