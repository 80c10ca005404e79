"""docs/building_blocks.md, generated: everything that a recipe may name, with its parameters, from the tables of functions."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from opd.config.choices import spelled
from opd.config.load import load_recipe
from opd.config.recipe import Recipe
from opd.credit import CREDITS, SHAPINGS
from opd.objective.divergences import DENSE, DIVERGENCES, ESTIMATORS
from opd.objective.parse import FIELDS, TOKEN_CREDITS
from opd.objective.routes import ROUTES
from opd.objective.schedules import SCHEDULES
from opd.objective.supports import SUPPORTS
from opd.objective.surrogates import SURROGATES
from opd.objective.targets import TARGETS
from opd.objective.terms import REDUCTIONS
from opd.objective.weights import GATES, WEIGHTS
from opd.overview import recipe_files
from opd.sampler import SAMPLERS
from opd.verify import FACTORIES, VERIFIERS
from opd.views import VIEWS

Functions = Mapping[str, Callable[..., Any]]
HEAD = """# Building blocks

Generated from the tables of functions by `python -m opd.reference`. A choice in a recipe is a name, `{name: {parameter: value}}`, or
`{fn: module:function, parameter: value}` for a function of your own with the same arguments ([an example](add_a_method.md)). A parameter without a
default must be given. In an objective, a schedule may stand for any parameter that is a number and for `coef`:
`coef: {linear: {start: 1, end: 0, steps: 100}}`. Terms without a choice of their own are `nll: {}` (supervised), `student_entropy: {}` (lowered, or
raised with a negative `coef`) and `match: hidden_states`. What may be combined is checked when the recipe loads ([concepts](concepts.md)).
"""
PLACES: Mapping[str, tuple[str, Functions, str]] = {  # heading -> key in a recipe, table, what it does
    "Divergences": ("distill", DIVERGENCES, "How far the student is from its target at a token, on the entries of a support; the gradient goes "
                    f"through the distribution. On the whole vocabulary (support `full`): {', '.join(f'`{name}`' for name in DENSE)}."),
    "Supports": ("support", SUPPORTS, "The vocabulary entries that a divergence looks at. tail: what becomes of the others' mass: `bucket`, "
                 "one more entry; `renormalise`; `drop`."),
    "Targets": ("target", TARGETS, "What the student is pulled towards; default `teacher`."),
    "Surrogates": ("policy", SURROGATES, "Policy gradients; the gradient goes through the sampled token."),
    "Advantages of an answer": ("advantage", CREDITS, "From the group's rewards, one number an answer. `advantage` is one of these, "
                               "then any of the next table: `[group_centered, batch_whitened]`."),
    "Advantages of a token": ("advantage", TOKEN_CREDITS, "From log-probs, a number a token; alone or after one of the table before."),
    "Shaping": ("shape", SHAPINGS, "Added to the reward before the advantage."),
    "Estimators of a penalty": ("reference_kl", ESTIMATORS, "Of the KL divergence to a signal (default `reference`) at the sampled token."),
    "Weights": ("weight", WEIGHTS, "Detached factors, a number a token; a list is their product."),
    "Gates": ("weight", GATES, "Weights that only ask for the place in the answer, which also leave the denominator."),
    "Weights of a batch": ("weight", FIELDS, "Weights that look at whole answers or the whole batch, over all ranks, made once before the update."),
    "Routes": ("route", ROUTES, "A factor an answer; 0 leaves it out of the term and of its denominator. Default: `has_view` for `distill`, "
               "`match` and `reference_kl`, else `all`."),
    "Reductions": ("reduce", REDUCTIONS, "What the sum over tokens is divided by; default `token_mean`. "
                   "over: tokens and answers counted where the term applies (`routed`), everywhere (`all`), or by the route's factor (`weight`)."),
    "Schedules": ("coef", SCHEDULES, "A number that changes while training."),
    "Views": ("view", VIEWS, "What a teacher reads before the student's tokens and the student does not; where there is nothing to show "
              "it does not score. "
              "template: another wording, by name or text."),
    "Samplers": ("rollout.sampler", SAMPLERS, "Who draws the tokens of an answer; default `student`."),
    "Verifiers": ("data.verifier", {**VERIFIERS, **FACTORIES}, "Who judges; [what one gets and returns](verifiers.md). Default `auto`: the task's "
                  "own, `math` for files."),
}  # fmt: skip


def building_blocks() -> str:
    """Every named function with its parameters, what it does, and the shipped methods that use it, as Markdown."""
    lines, used = [HEAD], users()
    for heading, (key, table, does) in PLACES.items():
        lines += [f"## {heading}: `{key}`", "", does, "", "| name | parameters | what it does | used by |", "|---|---|---|---|"]
        for name, function in table.items():
            methods = ", ".join(used[key, name][:6]) + (", ..." if len(used[key, name]) > 6 else "")
            lines.append(f"| `{name}` | {_cell(_parameters(function)) or '–'} | {_cell(_first_sentences(function))} | {methods} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def users() -> dict[tuple[str, str], list[str]]:
    """(key, name) -> the methods of recipes/methods that choose it."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in recipe_files("methods"):
        for place in dict.fromkeys(_chosen(load_recipe(str(path)))):
            found[place].append(path.stem)
    return found


def _chosen(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for term in recipe.objective:
        for key, value in term.items():
            for choice in value if isinstance(value, list) else [value]:
                yield from ((key, name) for name in _names(choice))
    for signal in recipe.signals.values():
        yield from (("view", name) for name in _names(signal.view))
    yield from (("rollout.sampler", name) for name in _names(recipe.rollout.sampler))


def _names(choice: Any) -> list[str]:
    return [choice] if isinstance(choice, str) else list(choice)[:1] if isinstance(choice, Mapping) else []


def _parameters(function: Callable[..., Any]) -> str:
    hints = get_type_hints(function, include_extras=True)
    accepted = [p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return "<br>".join(f"`{p.name}{'' if p.default is p.empty else f'={_plain(p.default)}'}` {_kind(hints.get(p.name, Any))}" for p in accepted)


def _kind(hint: Any) -> str:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return " or ".join("anything" if option is Any else _word(option) for option in options)


def _word(option: Any) -> str:
    return "a mapping" if option is dict or get_origin(option) in (dict, Mapping) else "a list" if get_origin(option) is Sequence else spelled(option)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value.split("\n")[0][:24] + ("..." if "\n" in value or len(value) > 24 else "") if value else '""'
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _first_sentences(function: Callable[..., Any]) -> str:
    return " ".join((function.__doc__ or "").strip().split("\n\n")[0].split()).partition(" Raises ")[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
