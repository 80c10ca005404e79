"""Recipe files: found, merged (method, run, overrides), validated; unknown keys are refused with the nearest valid name."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from opd.config.choices import nearest
from opd.config.recipe import SCHEMA_VERSION, Recipe
from opd.config.sentences import explain, short

ROOT = Path(__file__).parents[2]
MIGRATIONS = {
    0: "such files gave one top-level `weights` and `view` for the only teacher; write `teacher` and `view`, or signals.main.weights and .view"
}
"""Older schema_version -> what to change in a file of it. A change of the format adds its line here and raises SCHEMA_VERSION."""

PACKAGED = (ROOT / "opd_data/recipes", ROOT / "recipes")  # in an installed wheel; in a checkout


def load_recipe(reference: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe file, put its method beneath it and the overrides on top, and validate.

    `reference` is a path or a name under recipes/. overrides: "a.b=value" strings (values as YAML) or a mapping of dotted keys.
    Raises ValueError that names the file, the key and the fix.
    """
    path = find_recipe(reference)
    raw = read_yaml(path)
    if isinstance(record := raw.get("recipe"), dict) and "objective" in record:  # a run's resolved.json: that recipe again
        if "method" in parse_overrides(overrides):
            raise ValueError(f"{reference} is the record of a run, every key of its method filled in: for another method start from its recipe file")
        return parse_recipe(record, overrides, origin=str(reference), resolved=True)
    return parse_recipe(raw, overrides, origin=str(reference), is_method=path.parent.name == "methods", stem=path.stem)


def parse_recipe(
    raw: Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    origin: str = "recipe",
    is_method: bool = False,
    stem: str = "",
    resolved: bool = False,
) -> Recipe:
    """Validate a mapping as a recipe: method file beneath (unless already resolved), overrides on top. Raises ValueError with the fix."""
    changes = parse_overrides(overrides)
    check_schema({**raw, **{key: value for key, value in changes.items() if key == "schema_version"}}, origin)
    if "arms" in raw:
        raise ValueError(f"{origin} is a comparison of several runs: use opd compare {origin}")
    if "stages" in raw:
        raise ValueError(f"{origin} holds several runs (stages), and one is wanted here: opd train, check and show read such a file")
    method = changes.get("method", stem if is_method else raw.get("method", ""))
    hardware = changes.get("hardware", raw.get("hardware", ""))
    merged = dict(raw)
    if hardware and not resolved:
        raw = merge(read_yaml(find_recipe(str(hardware), kind="hardware")), raw)
        merged = dict(raw)
    if method and not resolved and not (is_method and method == stem):
        merged = merge(read_yaml(find_recipe(str(method), kind="methods")), raw if not is_method else {})
    merged["method"] = method
    for key, value in changes.items():
        by_name = key == "engine" and isinstance(value, str)
        _set_dotted(merged, "engine.kind" if by_name else key, value)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise ValueError(explain(error, Recipe, origin)) from None


def check_schema(raw: Mapping[str, Any], origin: str) -> None:
    """Raises ValueError for a file of another format, with what to change in it."""
    version = raw.get("schema_version", SCHEMA_VERSION)
    if version == SCHEMA_VERSION:
        return
    if isinstance(version, int) and version in MIGRATIONS:
        raise ValueError(f"{origin}: schema_version {version} is an older format: {MIGRATIONS[version]}; then write schema_version: {SCHEMA_VERSION}")
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    fix = "install a newer opd, which knows it" if newer else f"write schema_version: {SCHEMA_VERSION}, or leave the line out"
    raise ValueError(f"{origin}: schema_version is {version!r}, and this opd reads {SCHEMA_VERSION}: {fix}")


def find_recipe(reference: str, kind: str = "") -> Path:
    """The recipe file for a path or a name; looks at the path, then recipes/ here, then the packaged ones."""
    kinds = (kind,) if kind else ("runs", "methods", "compare")
    names = [reference, f"{reference}.yaml"]
    candidates = [] if kind and "/" not in reference else [Path(name) for name in names]
    for root in (Path("recipes"), *PACKAGED):
        candidates += [root / folder / name for folder in kinds for name in names]
        candidates += [root.parent / name for name in names if name.startswith("recipes/")]
        candidates += [root / name.removeprefix("recipes/") for name in names if name.startswith("recipes/")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if mistaken := _mistaken(reference, kind):
        raise ValueError(mistaken)
    known = {folder: {p.stem for root in (Path("recipes"), *PACKAGED) for p in (root / folder).glob("*.yaml")} for folder in kinds}
    listed = ", ".join(sorted(known[kinds[0]])) or "none"
    close = nearest(Path(reference).stem, set().union(*known.values()))
    raise ValueError(f"no {NOUNS.get(kind, 'recipe')} {reference!r}{close}; known{'' if kind else ' runs'}: {listed}")


NOUNS = {"compare": "comparison"}
KINDS = {"methods": "a method", "runs": "a recipe", "compare": "a comparison", "hardware": "a hardware file"}


def kind_of(reference: str) -> str:
    """Which of KINDS a file or a bare name is, or ""."""
    path = Path(reference)
    if path.parent.name in KINDS and path.is_file():
        return KINDS[path.parent.name]
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return KINDS["compare"] if "arms" in read_yaml(path) else KINDS["runs"]
    bare = path.name == reference or path.parent.name in KINDS
    found = [noun for kind, noun in KINDS.items() if bare and any((r / kind / f"{path.stem}.yaml").is_file() for r in (Path("recipes"), *PACKAGED))]
    return found[0] if found and path.suffix in ("", ".yaml") else ""


def _mistaken(reference: str, kind: str) -> str:
    """A sentence for something else that exists where a recipe or a comparison is wanted, or ""."""
    for place in (Path(reference), Path("runs") / reference):
        if (place / "resolved.json").is_file():
            return f"{place} is a run, not a {NOUNS.get(kind, 'recipe')}: its record is its recipe again, {place}/resolved.json with name=OTHER"
        if (place / "config.json").is_file():
            return f"{place} is a model's folder, not a {NOUNS.get(kind, 'recipe')}: a recipe takes it with model.path={place}"
    noun = kind_of(reference)
    if noun == KINDS["hardware"]:
        return f"{reference} is a hardware file: add it to a recipe with hardware={Path(reference).stem}"
    return f"{reference} is {noun}, not a comparison: `opd show` lists the comparisons" if kind == "compare" and noun else ""


def refuse_method(reference: str, overrides: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises ValueError for a hardware file, and for a method's where a run is wanted, unless the overrides say what it shall learn from."""
    path = find_recipe(reference)
    if path.parent.name == "hardware":
        raise ValueError(f"{reference} is a hardware file: add it to a recipe with hardware={path.stem}")
    if path.parent.name != "methods" or any(key.partition(".")[0] == "data" for key in parse_overrides(overrides)):
        return
    runs = sorted({p.stem for root in (Path("recipes"), *PACKAGED) for p in (root / "runs").glob(f"{path.stem}_*.yaml")})
    start = f"{' or '.join(runs[:3])} (`opd show` lists all runs)" if runs else "a run (`opd show` lists them)"
    raise ValueError(
        f"{path.stem} is a method, not a run: start from {start}, or add model.path=FOLDER and data.task=expr or data.path=FILE.jsonl"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; ValueError names file and line."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {_place(error)}{' '.join(str(getattr(error, 'problem', None) or error).split())}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a mapping of keys, found {type(loaded).__name__}")
    return loaded


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, mapping by mapping; choices (teacher, view, source ...) and lists are replaced whole."""
    whole = {"teacher", "view", "objective", "source", "sampler", "verifier", "weights", "shape", "columns"}
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key not in whole
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """["a.b=1"] -> {"a.b": 1}. Raises ValueError for a word without "="."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    parsed = {}
    for word, after in zip(overrides, [*overrides[1:], ""], strict=False):
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            given = value if equals else after if "=" not in after and not after.startswith("-") else ""
            raise ValueError(f"{word!r}: opd has no flags: write {key.lstrip('-')}={given or '...'}")
        if not equals or not key:
            raise ValueError(f"{word!r} is not an override: write key=value, e.g. optimizer.lr=3e-4")
        try:
            parsed[key] = _number(yaml.safe_load(value)) if value else ""
        except yaml.YAMLError:
            raise ValueError(f"{word!r}: the value is not valid YAML; put quotes around it, or close its brackets") from None
    return parsed


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 3e-4 as text
        except ValueError:
            return value
    return value


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.get(parent)
        if isinstance(tree, list):
            raise ValueError(f"{dotted}: lists are replaced whole")
        tree[parent] = dict(child) if isinstance(child, Mapping) else {}
        if isinstance(child, list):
            items = list(child)
            index, *rest = dotted.split(f"{parent}.", 1)[1].split(".")
            if not index.isdigit() or int(index) >= len(items):
                raise ValueError(f"{dotted}: {parent} is a list of {len(items)}; write {parent}.0. ... {parent}.{len(items) - 1}.")
            items[int(index)] = dict(items[int(index)])
            if rest:
                _set_dotted(items[int(index)], ".".join(rest), value)
            else:
                items[int(index)] = value
            tree[parent] = items
            return
        tree = tree[parent]
    tree[last] = value


def recipe_hash(recipe: BaseModel) -> str:
    """Eight hex digits of everything that decides the run's result (not its name, nor how it is logged and launched).

    Only what differs from the defaults counts, so that a key which a later version adds renames nobody's run.
    """
    unimportant = dict.fromkeys(("name", "track", "launch", "hardware", "target", "profile"), True)
    content = recipe.model_dump(mode="json", exclude_defaults=True, exclude={**unimportant, "learner": {"ranks"}})
    if not any(content.get("budget", {}).get(key) for key in ("money", "energy", "device_seconds")):
        content.pop("prices", None)  # then they stop nothing
    for data in (content, content.get("data", {})):  # of a recipe, or of its data alone
        data.pop("verifier_seconds", None)  # no verdict depends on it
        if not data.get("stream"):
            data.pop("buffer", None)  # then it decides nothing
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=4).hexdigest()


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """'key: a -> b' for every leaf that differs between two dumped recipes."""
    found = []
    for key in sorted({*left, *right}):
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {short(a)} -> {short(b)}")
    return found


def describe(recipe: BaseModel) -> str:
    """The recipe as YAML with every default filled in."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
