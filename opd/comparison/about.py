"""What a reader must know of an arm and its data before its numbers: a sentence each, made from the resolved recipe."""

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from opd.comparison.results import RunResult
from opd.comparison.summary import ArmSummary

REWARDED = ("group_centered", "leave_one_out", "max_rl", "raw_reward", "pair_preference", "verdict_sign")  # opd.credit.CREDITS, without its torch
PACKAGE = Path(__file__).parents[1]
OWN = {"frozen": "a frozen copy of the starting model", "live": "the student itself, with the weights that it has at that moment"}


def about(arm: ArmSummary) -> str:
    """What an arm is: how it learns, from whom, and what that teacher sees."""
    recipe = _recipe(arm)
    if not arm.trained:
        model = recipe.get("model", {}).get("path", "")
        named = ", ".join(part for part in (model or "the starting model", sizes(arm)) if part)
        return f"{named}, examined as it is, without training" if recipe else "examined as it is, without training"
    if not recipe:
        return "no run has recorded a recipe yet"
    if not recipe.get("objective"):
        made_by = next((str(run.facts["framework"]) for run in arm.runs if run.facts.get("framework")), "another trainer")
        return f"trained by {made_by}; its recipe is not known here"
    kinds = dict.fromkeys(_kind(recipe, term) for term in recipe["objective"])
    teachers = [_teacher(name, signal) for name, signal in recipe.get("signals", {}).items()]
    method = f" (method {recipe['method']})" if recipe.get("method") else ""
    trainer = next((f", trained by {run.facts['trainer']}" for run in arm.runs if run.facts.get("trainer")), "")
    return "; ".join([" and ".join(kinds) + method + trainer, *teachers])


def teacher_paths(arm: ArmSummary) -> list[str]:
    """Models from elsewhere that teach this arm."""
    if not arm.trained:
        return []
    found = (_external(signal.get("weights")) for signal in _recipe(arm).get("signals", {}).values())
    return list(dict.fromkeys(path for path in found if path))


def examined(arm: ArmSummary) -> str:
    """The model that an untrained arm examines; empty for a trained one."""
    return "" if arm.trained else str(_recipe(arm).get("model", {}).get("path", ""))


def splits(recipe: Mapping[str, Any]) -> str:
    """Where the dev and the test problems of a run come from, and what each decides; empty where the run did not record it."""
    data, ev = recipe.get("data", {}), recipe.get("eval", {})
    if not ev or not (data.get("task") or data.get("path") or data.get("preset")):
        return ""
    dev, test = ev.get("num_problems", 0), ev.get("final_problems", 0)
    if data.get("task"):
        origin = f"of the embedded task {data['task']}, in which the hash of a question decides whether it is train, dev or test"
    elif data.get("eval_path"):
        origin = f"of {data['eval_path']} (split {data.get('eval_split', 'test')}): the first ones are dev, the next ones test"
    else:
        origin = f"held out of {data.get('path') or data['preset']}: no run trains on them"
    text = f"{dev} dev and {test} test problems {origin}. Dev draws the curves"
    text += " and chooses each run's checkpoint" if recipe.get("checkpoint", {}).get("best") else ""
    unused = "" if data.get("eval_path") else " (data.eval_split in a recipe belongs to data.eval_path, which is not used here)"
    return f"{text}; test is looked at once, when a run is over{unused}."


def task(recipe: Mapping[str, Any]) -> str:
    """What is asked and what is checked, in the embedded task's own words; for other data the file and who judges. Empty where nobody recorded it."""
    data = recipe.get("data", {})
    if data.get("task"):
        asked, checked = (_described(f"tasks/{data['task']}.py", name) for name in ("", "verify"))
        checked = checked.split(" parts: ")[0]
        return f"The task, {data['task']}: {asked}" + (f" What is checked: {checked[0].lower()}{checked[1:]}" if checked else "") if asked else ""
    where = data.get("preset") or data.get("path")
    return f"The task: questions of {where}, answers judged by verifier {_name(data.get('verifier', 'auto'))}." if where else ""


def sizes(arm: ArmSummary) -> str:
    """Parameters of the model that an arm trains or examines; empty where nobody recorded it."""
    found = dict.fromkeys(int(run.facts["num_parameters"]) for run in arm.runs if run.facts.get("num_parameters"))
    return " or ".join(f"{number:,} parameters" for number in found)


@cache
def _described(module: str, function: str) -> str:
    """A docstring of our sources in one line, read without importing (and so without torch); empty where there is none."""
    path = PACKAGE / module
    if not path.is_file():
        return ""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [tree] if not function else [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return " ".join((ast.get_docstring(nodes[0]) or "").split()) if nodes else ""


def _view(name: str) -> str:
    """facts -> "facts: facts that the answer needs, without the way to it"; the bare name for a function of the user's own."""
    said = _described("views.py", name).split(". ")[0].rstrip(".")
    return f"{name}: {said[0].lower()}{said[1:]}" if said else name


def _recipe(arm: ArmSummary) -> Mapping[str, Any]:
    first: RunResult | None = next((run for run in arm.runs if run.recipe), None)
    return first.recipe if first else {}


def _kind(recipe: Mapping[str, Any], term: Mapping[str, Any]) -> str:
    rollout = recipe.get("rollout", {})
    own = "on-policy " if rollout.get("source", "student") == "student" and rollout.get("sampler", "student") == "student" else ""
    if "nll" in term:
        return "imitation of the student's own answers" if own else "imitation of given answers"
    advantages = term.get("advantage", [])
    rewarded = {_name(one) for one in (advantages if isinstance(advantages, list) else [advantages])} & set(REWARDED)
    if "policy" in term and rewarded:
        return "reinforcement learning from the verifier's rewards"
    signals = [signal for name, signal in recipe.get("signals", {}).items() if name != "reference"]
    outside = any(_external(signal.get("weights")) for signal in signals)
    return f"{own}{'distillation from another model' if outside else 'self-distillation' if signals else 'learning'}"


def _teacher(name: str, signal: Mapping[str, Any]) -> str:
    weights, view = signal.get("weights", "frozen"), _name(signal.get("view", "plain"))
    path = _external(weights)
    if path:
        who = f"another model, {path}"
    elif _name(weights) == "ema":
        settings = weights["ema"] if isinstance(weights, Mapping) else {}
        who = f"a moving average of the student's weights (rate {settings.get('rate', 0.05):g})"
    else:
        who = OWN.get(_name(weights), _name(weights))
    shown = f"which is also shown what the student is not (view {_view(view)})"
    sees = "which sees the question only, as the student does" if view == "plain" else shown
    return f"{'teacher' if name == 'main' else name}: {who}, {sees}"


def _external(weights: Any) -> str:
    found = weights.get("external") if isinstance(weights, Mapping) else None
    return str(found.get("path", "")) if isinstance(found, Mapping) else ""


def _name(choice: Any) -> str:
    """facts -> "facts"; {ema: {rate: 0.05}} -> "ema"."""
    return next(iter(choice), "") if isinstance(choice, Mapping) else str(choice)
