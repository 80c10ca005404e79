"""`opd check COMPARISON`: findings and plan of every arm, and what all runs together will take."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from opd.comparison.config import Comparison, arm_recipe, load_comparison
from opd.config.recipe import Recipe
from opd.preflight.plan import Plan
from opd.preflight.report import examine, in_time, is_clean, render


def check_comparison(reference: str, overrides: Mapping[str, Any]) -> bool:
    """Prints it; true when nothing would stop a run. Raises ValueError for a comparison that cannot be read, before anything is printed.

    The override device=h100 plans for that card.
    """
    changes = dict(overrides)
    device = str(changes.pop("device", ""))
    comparison = load_comparison(reference, changes)
    clean, hours, money, runs = True, 0.0, 0.0, 0
    for name, arm in comparison.arms.items():
        if arm.runs:
            print(f"arm {name}: runs that exist, {arm.runs}")
            continue
        found, plan = examine(_recipe(comparison, name), device)
        plan = plan if plan is None or arm.train else replace(plan, steps=0)
        recipe = _recipe(comparison, name)
        called = f"arm {name}{'' if arm.train else ' (evaluated only)'}, {recipe.name or recipe.method or 'recipe'}"
        print(render(recipe, found, plan, called), end="")
        clean &= is_clean(found)
        for count, planned in _runs(comparison, name, plan, device):
            runs, hours, money = runs + count, hours + count * _hours(planned), money + count * planned.money
    said = f"all arms: {runs} runs, searched and reported, about {in_time(3600 * hours)} one after the other; workers={comparison.workers} at once"
    print(said + (f", {money:.3g} {comparison.prices.currency}" if money else ""))
    return clean


def _runs(comparison: Comparison, name: str, plan: Plan | None, device: str) -> list[tuple[int, Plan]]:
    """(how many runs, the plan of one) of an arm: reported ones, and those of the search."""
    if plan is None:
        return []
    found = [(len(comparison.seeds) if comparison.arms[name].train else 1, plan)]
    if comparison.tune and comparison.arms[name].train:
        _, searched = examine(_recipe(comparison, name, tuning=True), device)
        found += [(len(comparison.tune.points()) * len(comparison.tune.seeds), searched)] if searched else []
    return found


def _recipe(comparison: Comparison, name: str, *, tuning: bool = False) -> Recipe:
    """The arm's recipe, at the first point of the search where one is made; with evaluations once where nothing is trained."""
    point = comparison.tune.points()[0] if comparison.tune and comparison.arms[name].train else {}
    recipe = arm_recipe(comparison, name, comparison.seeds[0], point, tuning=tuning)
    prices = recipe.model_copy(update={"prices": comparison.prices}) if comparison.prices.priced else recipe
    if comparison.arms[name].train:
        return prices
    once = recipe.eval.model_copy(update={"before": False, "every": 0})
    return prices.model_copy(update={"steps": recipe.optimizer.warmup_steps + 1, "eval": once})


def _hours(plan: Plan) -> float:
    return plan.hours + plan.evaluation / 3600
