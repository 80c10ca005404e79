"""Several runs in one file: `stages` lists what differs from the keys beside it, and each stage starts from the model of the one before.

    model: {path: models/expr-base}
    stages:
      - {name: sft, method: sft, steps: 50}
      - {name: opsd, method: opsd, steps: 100}
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from opd.config.choices import nearest
from opd.config.load import find_recipe, load_recipe, merge, parse_overrides, parse_recipe, read_yaml
from opd.config.recipe import Recipe


def read_stages(reference: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> list[Recipe]:
    """The runs that a recipe file describes, in order; one for a file without `stages`.

    Overrides hold for every stage, `stages.0.steps=10` or `stages.sft.steps=10` for one. The runs are runs/<name>/<stage>. Raises ValueError
    with the fix.
    """
    path = find_recipe(reference)
    raw = read_yaml(path)
    if "stages" not in raw:
        return [load_recipe(reference, overrides)]
    changes = parse_overrides(overrides)
    stages = _checked(changes.pop("stages", raw["stages"]), str(reference))
    own: list[dict[str, Any]] = [{} for _ in stages]
    for key, value in changes.items():
        if key.startswith("stages."):
            number, inner = _place(key, [stage["name"] for stage in stages])
            own[number][inner] = value
    shared = {key: value for key, value in changes.items() if not key.startswith("stages.")}
    root = shared.pop("name", "") or raw.get("name") or _default_name(path.stem, raw, changes)
    common = {key: value for key, value in raw.items() if key not in ("stages", "name")}
    recipes: list[Recipe] = []
    for number, (stage, changed) in enumerate(zip(stages, own, strict=True)):
        start = {"init": f"runs/{recipes[-1].name}"} if recipes else {}
        merged = merge({**common, **start}, {**stage, "name": f"{root}/{stage['name']}"})
        recipes.append(parse_recipe(merged, {**shared, **changed}, origin=f"{reference}, stages.{number}"))
    return recipes


def _checked(stages: Any, origin: str) -> list[dict[str, Any]]:
    form = "a list of mappings, each with a name of its own, e.g. [{name: sft, method: sft}, {name: rl, method: grpo}]"
    shaped = isinstance(stages, list) and stages and all(isinstance(stage, dict) and isinstance(stage.get("name"), str) for stage in stages)
    if not shaped or len({stage["name"] for stage in stages}) < len(stages) or any("/" in stage["name"] or not stage["name"] for stage in stages):
        raise ValueError(f"{origin}: stages is {form}")
    return stages


def _place(key: str, names: Sequence[str]) -> tuple[int, str]:
    """(number of the stage, its own key) of stages.NUMBER.KEY or stages.NAME.KEY."""
    _, stage, *inner = key.split(".", 2)
    number = names.index(stage) if stage in names else int(stage) if stage.isdigit() else len(names)
    if number >= len(names) or not inner:
        listed = ", ".join(f"stages.{name}" for name in names)
        raise ValueError(f"{key}: no such stage{nearest(stage, names)}; write one of {listed} (or stages.0 ... stages.{len(names) - 1}) and a key")
    return number, inner[0]


def _default_name(stem: str, raw: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    content = json.dumps([raw, {key: value for key, value in changes.items() if not key.startswith("track")}], sort_keys=True, default=str)
    return f"{stem}-{changes.get('seed', raw.get('seed', 0))}-{hashlib.blake2b(content.encode(), digest_size=4).hexdigest()}"
