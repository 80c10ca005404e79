"""`opd diagnose`: the measurement of a recipe's candidates, written as a page."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opd.build.problems import load_problems
from opd.build.system import build_parts
from opd.config.load import load_recipe, parse_recipe, recipe_hash, refuse_method
from opd.diagnosis.config import default_candidates, measured_recipe, split_overrides
from opd.diagnosis.measure import measure
from opd.diagnosis.report import figures, write
from opd.randomness import seed_generators
from opd.text import chat


def diagnose(reference: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> tuple[Path, dict[str, Any]]:
    """Judge the teachers and views of a recipe on its student's own answers, without training; returns the page's path and the figures.

    The page and its JSON lie in runs/diagnose-RECIPE-HASH/. Raises ValueError for what could not work, before anything is generated.
    """
    settings, changes = split_overrides(overrides)
    refuse_method(reference, changes)
    recipe = load_recipe(reference, changes)
    candidates = settings.candidates or default_candidates(recipe, list(load_problems(recipe, None).train[:32]))
    measured = parse_recipe(measured_recipe(recipe, settings, candidates), origin="diagnose", resolved=True)
    seed_generators(recipe.seed)
    parts = build_parts(measured)
    found = figures(measure(parts, measured, settings), settings, candidates, partial(decode_all, parts.tokenizer))
    parts.learner.close()
    name = recipe.name or f"diagnose-{Path(reference).stem}-{recipe_hash(measured)}"
    return write(Path("runs") / name, f"{Path(reference).stem}: which teacher", found), found


def diagnose_and_report(reference: str, overrides: Mapping[str, Any]) -> str:
    """`opd diagnose`: the advice as text."""
    return summary(*diagnose(reference, overrides))


def decode_all(tokenizer: chat.Tokenizer, ids: Sequence[int]) -> str:
    """Text of tokens, special ones included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def summary(page: Path, found: Mapping[str, Any]) -> str:
    """The advice and where to read more, for a terminal."""
    lines = [f"{loss}: {one['sentence']}" for loss, one in found["advice"].items()]
    paced = found["pass_rates"]["paced"]
    lines.append(
        f"pass rate {found['pass_rates']['mean']:.2f} over {found['questions']} questions; {paced['zero']:.0%} of them are never or always right "
        "(no signal for rewards, weight 0 in PACED)"
    )
    return "\n".join([*lines, str(page)])
