"""Signals whose scores lie in a file: which may, whose they are."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.build import pretrained
from opd.build.student import absent_teachers, student_path
from opd.config.recipe import Recipe
from opd.objective import Objective, SignalNeeds
from opd.teacher.stored import ScoreStore


def open_stores(
    recipe: Recipe, choices: Mapping[str, tuple[str, Any]], objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, ScoreStore], set[str]]:
    """(signal -> its file of scores, for those that name one; the signals whose teacher is loaded all the same).

    Where every answer comes from the data, the file is all there is. Raises ValueError where scores cannot be stored, with what could.
    """
    named = {name: signal.scores for name, signal in recipe.signals.items() if signal.scores}
    for name in named:
        check_storable(name, choices[name][0], objective.needs.signals.get(name, SignalNeeds()))
    stores = {name: ScoreStore(Path(file).expanduser(), teacher_name(recipe, *choices[name], tokenizer)) for name, file in named.items()}
    return stores, set(choices) - absent_teachers(recipe)


def check_storable(name: str, kind: str, need: SignalNeeds) -> None:
    """Raises ValueError unless the teacher stands still and what is asked of it depends on nothing but question and answer."""
    where = f"signals.{name}: its scores cannot be kept in a file"
    if kind not in ("frozen", "external", "served"):
        what = "its weights move" if kind in ("live", "ema") else "it has a tokenizer of its own"
        raise ValueError(f"{where}: {what} ({kind}); use a frozen or an external teacher with the student's tokenizer")
    if need.hidden:
        raise ValueError(f"{where}: support full reads hidden states, which are large; use support {{teacher_topk: {{k: 64}}}} or sampled")
    if need.student_support or need.union or need.unpaired:
        raise ValueError(f"{where}: student_topk and union ask for the student's ids, which change with every step; use teacher_topk or sampled")
    if need.draws:
        raise ValueError(f"{where}: its ids are drawn anew at every step; use teacher_topk or sampled")


def teacher_name(recipe: Recipe, kind: str, path: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Weights (of the hub with their commit), tokenizer and temperature in one line: what decides a score beside question, view and answer."""
    folder = student_path(recipe) if kind == "frozen" else pretrained.find_model(path)
    vocabulary = hashlib.blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=4).hexdigest()
    weights = f"{Path(folder).name} {pretrained.fingerprint([folder])}" if Path(folder).is_dir() else f"{folder}@{pretrained.hub_commit(folder)}"
    return f"{weights} {recipe.model.dtype}, vocabulary {vocabulary}, temperature {recipe.sampling.temperature:g}"
