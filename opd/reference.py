"""What is generated, so that it cannot drift: the recipe reference, and the table inside the page on methods.

python -m opd.reference      # writes recipe_reference, comparison_reference, building_blocks, recipes and guard_rails, and the table of methods
"""

import inspect
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from opd.building_blocks import building_blocks
from opd.comparison.config import Comparison
from opd.config.load import find_recipe, load_recipe, read_yaml
from opd.config.recipe import Recipe
from opd.guard.rules import RULES
from opd.overview import recipe_files

RECIPES = """# Recipes that ship with the project

Generated from `recipes/` by `python -m opd.reference`.

- *trained*: run to its end on the embedded tasks, on a CPU, by `make demo` or by hand.
- *shapes*: two steps with the architectures of its models made small and with random weights, on a CPU, float32, one process, made-up problems
  (`tests/build/test_shipped_runs.py`); `opd check` finds no error in it. Never run with real weights by the project; on a GPU only
  `opsd_qwen3_0.6b_gsm8k` was tried, three steps at its true shape with random weights (`benchmarks/dry_run.py`, one H200, 2026-11-26).
- *easy*: trained on a CPU on the easy problems of its task ([tasks](tasks.md#words-word-problems), `make words-cpu`; `hybrid_words` two
  steps only). As it stands it is meant for one GPU and was never run on one; `tests/build/test_words_runs.py` runs two steps of each.
- *loaded*: its arms load; nothing was run.

`opd train RECIPE model.init=random model.scale=0.05 steps=3` tries any of those with hub models without the hub.
"""

GUARD_RAILS = """# Guard rails

Generated from `opd/guard/rules.py` by `python -m opd.reference`. Rules look at a run after every step; each speaks once, and again after ten
steps without cause. "At first" is the mean over the first `window` steps, "now" over the last; nothing is said before both have passed. What a
rule says goes to the terminal, to `guard.jsonl` in the run folder, and to W&B as an alert. Then its action:

- `warn` (the default): nothing more.
- `pause`: the state is saved and the run stops with exit status 3; `status.json` says `paused`. The same command goes on, and the rule stays silent
  until it has been without cause for ten steps.
- `roll_back`: weights, optimiser and average become those of the newest checkpoint that is at least ten steps older than the alarm, the learning rate
  is multiplied by `guard.rate_factor`, and training goes on with the questions that come next (steps and token counts go on too). After
  `guard.max_roll_backs`, or without such a checkpoint, it pauses instead.

`guard.action=off` switches all off; `guard.rules='{dev_fall: roll_back, repetition: {action: pause, rise: 0.1}, leak: off}'` sets single ones.

The thresholds were chosen on recorded runs of the embedded tasks: three collapses of a live teacher, in which the first rule speaks at most 25 steps
after dev accuracy was last within 0.05 of its best, and healthy runs of the shipped kinds, in which none speaks (`tests/guard`). They are defaults
for small tasks, not constants of nature: a model that learns to reason at length may well grow its answers by half and be healthy.

| rule | holds when | parameters |
|---|---|---|"""


RECIPE = """# Recipe reference

Generated from the types in `opd/config/recipe.py` by `python -m opd.reference`.
`opd show RECIPE` prints a recipe with every default filled in; what the choices may be is in [building blocks](building_blocks.md).

"""
COMPARISON = """# Comparison reference

Generated from the types in `opd/comparison/config.py` by `python -m opd.reference`. A comparison is a YAML file of
these keys ([what it does with them](comparing.md)); every key can be given on the command line, dotted, over the file's:
`opd compare recipes/compare/demo.yaml seeds=[0] budget.generated_tokens=300`. A small one:

```yaml
# small.yaml
arms:
  base: {recipe: recipes/runs/opsd_expr.yaml, train: false}
  rewards: {recipe: recipes/runs/grpo_expr.yaml}
  teacher: {recipe: recipes/runs/opsd_expr.yaml, set: {teacher: live}}
seeds: [0, 1]
budget: {generated_tokens: 4000}
eval: {every: 10, num_problems: 64, final_problems: 64}
```

```bash
opd compare small.yaml
```

"""


def recipe_reference() -> str:
    """Every key of a recipe with type, default and meaning, as Markdown."""
    return RECIPE + _keys(Recipe)


def comparison_reference() -> str:
    """Every key of a comparison with type, default and meaning, as Markdown."""
    return COMPARISON + _keys(Comparison)


def _keys(root: type[BaseModel]) -> str:
    """A table a type, the root's first, then those inside it; each type once."""
    lines, pending, seen = [], [("", root)], set[type[BaseModel]]()
    while pending:
        prefix, model = pending.pop(0)
        if model in seen and root is not Recipe:
            lines += [f"## `{prefix.rstrip('.')}`", "", f"The keys of `{_first_place(root, model)}`.", ""]
            continue
        seen.add(model)
        lines += [
            f"## `{prefix.rstrip('.') or 'top level'}`",
            "",
            _first_paragraph(model),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for name, field in model.model_fields.items():
            nested = _models(field.annotation)
            pending += [(f"{prefix}{name}." if not _is_table(field.annotation) else f"{prefix}{name}.<name>.", inner) for inner in nested]
            default = "required" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
            shown = "see below" if nested and isinstance(field.default, BaseModel) else default
            lines.append(f"| `{prefix}{name}` | {_type_name(field)} | {shown} | {_cell(field.description or '')} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _first_place(root: type[BaseModel], model: type[BaseModel]) -> str:
    return next(name for name, field in root.model_fields.items() if model in _models(field.annotation))


def methods_table() -> str:
    """Method x building blocks, read from recipes/methods, as Markdown."""
    lines = [
        "| method | paper | group | teacher | view | terms: loss · support · weight · route or advantage |",
        "|---|---|---|---|---|---|",
    ]
    for path in recipe_files("methods"):
        recipe, raw = load_recipe(str(path)), read_yaml(find_recipe(path.stem, kind="methods"))
        signals = "; ".join(_named(name, s.weights) for name, s in recipe.signals.items()) or "–"
        views = "; ".join(_named(name, s.view) for name, s in recipe.signals.items()) or "–"
        terms = "<br>".join(_term(term) for term in recipe.objective)
        paper = f"[link]({raw['paper']})" if raw.get("paper") else "–"
        lines.append(f"| `{path.stem}` | {paper} | {recipe.group} | {_cell(signals)} | {_cell(views)} | {_cell(terms)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the present table between its two markers. Raises ValueError where they are missing."""
    before, start, rest = page.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not start or not end:
        raise ValueError(f"docs/methods.md needs {TABLE_START} and {TABLE_END} around its table")
    return f"{before}{start}\n{methods_table()}{end}{after}"


def _named(signal: str, choice: Any) -> str:
    return _choice(choice) if signal == "main" else f"{signal}: {_choice(choice)}"


def shipped_recipes() -> str:
    """Every run and comparison with how far it was tried, as Markdown."""
    lines = [RECIPES, "| recipe | method | student | adapters | teacher | data | learner ranks | tried |", "|---|---|---|---|---|---|---|---|"]
    for path in recipe_files("runs"):
        raw = read_yaml(path)
        if "stages" in raw:
            methods = " then ".join(stage["method"] for stage in raw["stages"])
            lines.append(f"| `{path.stem}` | {methods} | {raw['model']['path']} |  |  | {raw['data']['task']} | 1 | trained |")
            continue
        recipe = load_recipe(f"recipes/runs/{path.name}")
        teachers = ", ".join(_cell(_teacher(signal.weights)) for signal in recipe.signals.values())
        student, data = recipe.model.path or "from scratch", recipe.data.preset or recipe.data.task or "a file"
        lora = f"LoRA {recipe.model.lora.rank}" if recipe.model.lora else ""
        tried = "shapes" if recipe.hardware else "easy" if recipe.data.task == "words" else "trained"
        lines.append(f"| `{path.stem}` | {recipe.method} | {student} | {lora} | {teachers} | {data} | {recipe.learner.ranks} | {tried} |")
    lines += ["", "| comparison | tried |", "|---|---|"]
    for path in recipe_files("compare"):
        lines.append(f"| `{path.stem}` | {'loaded' if path.stem.startswith('rl_against') or path.stem == 'words' else 'trained'} |")
    return "\n".join(lines) + "\n"


def _teacher(weights: Any) -> str:
    external = weights.get("external") if isinstance(weights, dict) else None
    return external["path"] + (" (vLLM)" if external.get("engine") == "vllm" else "") if external else _choice(weights)


def guard_rails() -> str:
    """Every guard rail with its rule and thresholds, as Markdown."""
    lines = [GUARD_RAILS]
    for name, rule in RULES.items():
        parameters = ", ".join(f"`{key}` {value.default}" for key, value in inspect.signature(rule).parameters.items() if key != "history")
        lines.append(f"| `{name}` | {_cell(' '.join((rule.__doc__ or '').split()))} | {parameters} |")
    return "\n".join(lines) + "\n"


def _term(term: dict[str, Any]) -> str:
    kind = next(key for key in term if key not in TERM_OPTIONS)
    rest = [f"{key} {_choice(term[key])}" for key in TERM_OPTIONS if key in term and key != "name"]
    return " · ".join([f"{kind} {_choice(term[kind])}".strip(), *rest])


TERM_OPTIONS = ("name", "signal", "support", "target", "weight", "route", "advantage", "shape", "reduce", "coef", "allow")
TABLE_START, TABLE_END = "<!-- table: python -m opd.reference -->", "<!-- end of table -->"


def _choice(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()


def _models(annotation: Any) -> list[type[BaseModel]]:
    options = [annotation, *typing.get_args(annotation)]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _is_table(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _type_name(field: Any) -> str:
    return _cell(f"`{_annotation(field.annotation)}`")


def _annotation(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is typing.Annotated:
        return _annotation(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_annotation(value) for value in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_annotation(value) for value in arguments)}]"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    return '""' if value == "" else str(value)


def _first_paragraph(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().split("\n\n")[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(folder: Path = Path("docs")) -> None:
    """Write the generated pages."""
    (folder / "recipe_reference.md").write_text(recipe_reference(), encoding="utf-8")
    (folder / "comparison_reference.md").write_text(comparison_reference(), encoding="utf-8")
    (folder / "building_blocks.md").write_text(building_blocks(), encoding="utf-8")
    page = folder / "methods.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "recipes.md").write_text(shipped_recipes(), encoding="utf-8")
    (folder / "guard_rails.md").write_text(guard_rails(), encoding="utf-8")


if __name__ == "__main__":
    main()
