"""How the recipes of a comparison's arms differ: a row a key, a cell an arm."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opd.comparison.summary import Summary

NOT_SHOWN = ("seed", "name", "paper", "schema_version", "track")
SUGAR = ("teacher", "view")  # said by signals.main
ABSENT = "\N{EN DASH}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRow:
    """A key that not all arms share. cells: arm -> (value as text, whether it differs from the baseline's). searched: the values that were
    tried for every arm, where the key was searched.
    """

    key: str
    cells: Mapping[str, tuple[str, bool]]
    searched: str = ""


def recipe_rows(summary: Summary) -> list[RecipeRow]:
    """Every recipe key in which some trained arm differs from another, in the order of the recipe; seeds and names left out."""
    recipes = {arm.name: arm.runs[0].recipe for arm in summary.arms if arm.trained and arm.runs and arm.runs[0].recipe}
    hidden = (*NOT_SHOWN, *SUGAR) if any(recipe.get("signals") for recipe in recipes.values()) else NOT_SHOWN
    flat = {name: dict(flattened({k: v for k, v in recipe.items() if k not in hidden and v != {}})) for name, recipe in recipes.items()}
    reference = flat.get(summary.reference.name, {})
    grid = summary.comparison.tune.grid if summary.comparison.tune else {}
    rows = []
    for key in dict.fromkeys(key for values in flat.values() for key in values):
        texts = {name: _text(values[key]) if key in values else ABSENT for name, values in flat.items()}
        if len(set(texts.values())) > 1:
            same = _text(reference[key]) if key in reference else ABSENT
            cells = {name: (text, text != same) for name, text in texts.items()}
            rows.append(RecipeRow(key=key, cells=cells, searched=", ".join(_text(value) for value in grid.get(key, ()))))
    return rows


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists of mappings are counted, other lists are leaves, empty mappings too."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flattened(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for n, inner in enumerate(value):
            yield from flattened(inner, f"{prefix}.{n}")
    else:
        yield prefix, value


def _text(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
