"""`opd score`: a fixed teacher's scores of the data's answers, written to a file once, so that training needs no teacher."""

import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from opd_rollout.types import ScoreRequest

from opd.build.stored import check_storable, teacher_name
from opd.build.system import Parts, build_parts, parse_weights, sampling_of
from opd.config.load import load_recipe, parse_overrides, refuse_method
from opd.config.recipe import Recipe
from opd.source import dataset_completion, parse_source
from opd.teacher.score import SignalScorer
from opd.teacher.stored import ScoreStore, largest_difference, with_stores
from opd.text import chat
from opd.types import Judged, Prompt, Verdict

BLOCK = 64  # answers between two transactions


def score(reference: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> str:
    """Score the answers that the recipe's `rollout.source` takes from the data, under every signal; returns what was done, in a sentence.

    out: the file (scores/RECIPE.sqlite); answers that it holds are not scored again. problems: the first so many, 0 for all (of an endless
    task as many as the run draws). check: how many stored scores are compared with the live teacher's. Raises ValueError with the fix.
    """
    changes = parse_overrides(overrides)
    out = Path(str(changes.pop("out", f"scores/{Path(reference).stem}.sqlite"))).expanduser()
    problems, check = (_count(changes.pop(name, default), name) for name, default in (("problems", 0), ("check", 8)))
    refuse_method(reference, changes)
    recipe = load_recipe(reference, {"learner.kind": "torch", **changes})
    recipe = recipe.model_copy(update={"signals": {name: signal.model_copy(update={"scores": ""}) for name, signal in recipe.signals.items()}})
    mixture = parse_source(recipe.rollout.source)
    if not recipe.signals:
        raise ValueError(f"{reference} has no teacher: nothing to score; give it one, e.g. teacher.external.path=FOLDER")
    if not mixture.reads_data:
        raise ValueError(
            f"rollout.source is {recipe.rollout.source!r}: the student's answers of a run are not known before it. Stored answers can be scored: "
            "rollout.source={dataset: solution}; those of an earlier run are a file of generations/ with data.columns={solution: text}"
        )
    parts = build_parts(recipe)
    try:
        stores = _stores(recipe, parts, out)
        asked = [_judged(parts, recipe, prompt, mixture.hint) for prompt in _prompts(parts, recipe, problems)]
        before = {name: store.count() for name, store in stores.items()}
        gap = checked_gap(parts, stores, asked[:check], recipe.engine.audit_nats)
        scorer = SignalScorer(with_stores(parts.scorer.weights, stores), parts.objective.needs.signals)
        for first in range(0, len(asked), BLOCK):
            block = asked[first : first + BLOCK]
            scorer.score(block, parts.views(block), [None] * len(block))
            print(f"{min(first + BLOCK, len(asked))} of {len(asked)} answers", file=sys.stderr, flush=True)
        gap = max(gap, checked_gap(parts, stores, asked[:check], recipe.engine.audit_nats))
        counts = ", ".join(f"signal {name}: {store.count() - before[name]} answers scored, {store.count()} stored" for name, store in stores.items())
    finally:
        parts.learner.close()
        parts.engine.close()
    use = " ".join(f"signals.{name}.scores={out}" for name in stores)
    return f"{out}: {counts}; {min(check, len(asked))} compared with the live teacher, largest difference {gap:.2g} nats. Train with {use}"


def checked_gap(parts: Parts, stores: Mapping[str, ScoreStore], asked: Sequence[Judged], limit: float) -> float:
    """Largest difference in nats between stored and live scores of these answers (those that are stored). Raises ValueError above `limit`."""
    largest, contexts = 0.0, parts.views(asked) if asked else {}
    for name, store in stores.items():
        need = parts.objective.needs.signals[name]
        requests = [
            ScoreRequest(context_ids=context, completion_ids=answer.completion.token_ids, k=need.k)
            for answer, context in zip(asked, contexts.get(name, ()), strict=bool(asked))
            if context is not None
        ]
        kept = [(request, scores) for request in requests if (scores := store.find(request)) is not None]
        live = parts.scorer.weights[name].scores([request for request, _ in kept]) if kept else []
        largest = max([largest, *(largest_difference(scores, now) for (_, scores), now in zip(kept, live, strict=True))])
    if largest > limit:
        raise ValueError(
            f"stored scores differ from the live teacher's by {largest:.2g} nats (allowed: engine.audit_nats={limit:g}): they were written by other "
            f"code or hardware, or are damaged. Remove {next(iter(stores.values())).file} and score again"
        )
    return largest


def _stores(recipe: Recipe, parts: Parts, out: Path) -> dict[str, ScoreStore]:
    found = {}
    for name, need in parts.objective.needs.signals.items():
        kind, path = parse_weights(name, recipe.signals[name].weights)
        check_storable(name, kind, need)
        found[name] = ScoreStore(out, teacher_name(recipe, kind, path, parts.tokenizer), create=True)
    return found


def _prompts(parts: Parts, recipe: Recipe, problems: int) -> list[Prompt]:
    """Each prompt once, in the order in which the run draws them."""
    drawn = recipe.steps * recipe.rollout.prompts if recipe.data.task or recipe.data.stream else len(parts.problems.train)
    unique = {prompt.id: prompt for prompt in parts.problems.stream.take(drawn)}
    return list(islice(unique.values(), problems or None))


def _judged(parts: Parts, recipe: Recipe, prompt: Prompt, hint: str) -> Judged:
    text = prompt.hints[hint]
    ids = (*chat.tokenize(parts.tokenizer, text), parts.stop_ids[0])
    completion = dataset_completion(ids, sampling_of(recipe, parts.stop_ids))
    return Judged(prompt=prompt, prompt_ids=parts.encode(prompt), completion=completion, text=text, verdict=Verdict(), group=0, member=0)


def _count(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"opd score: {name} is {value!r}; it must be a whole number, 0 or more")
    return value
