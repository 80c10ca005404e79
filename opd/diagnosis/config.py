"""What `opd diagnose` may be told besides the recipe: keys under `diagnose.`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opd.config.load import explain, parse_overrides
from opd.config.recipe import Recipe, Signal
from opd.types import Prompt

PREFIX = "diagnose."
HINT_VIEWS = ("facts", "solution", "answer", "demonstration")


class Settings(BaseModel):
    """How much is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    problems: int = Field(default=32, ge=2, description="questions")
    rollouts: int = Field(default=8, ge=1, description="answers a question")
    nodes: int = Field(default=6, ge=1, description="prefixes a question at which gradients are compared, most uncertain first")
    tokens: int = Field(default=4, ge=2, description="the student's likeliest tokens that are tried at a node")
    least: float = Field(default=0.01, gt=0, lt=0.5, description="a token is tried, and a prefix counts as a node, from this probability on")
    branches: int = Field(default=16, ge=2, multiple_of=2, description="continuations of each tried token, where success is sampled")
    success: Literal["auto", "exact", "sampled"] = Field(default="auto", description="auto: exact on embedded tasks without top-p and top-k")
    candidates: dict[str, Signal] = Field(default={}, description="teachers to compare, name -> {weights, view}; empty: see default_candidates")


def split_overrides(overrides: Any) -> tuple[Settings, dict[str, Any]]:
    """(settings, the other overrides). Raises ValueError for unknown keys under `diagnose.` and values out of range."""
    changes = parse_overrides(overrides)
    own = {key.removeprefix(PREFIX): value for key, value in changes.items() if key.startswith(PREFIX)}
    try:
        settings = Settings.model_validate(own)
    except ValidationError as error:
        raise ValueError(explain(error, Settings, "diagnose")) from None
    return settings, {key: value for key, value in changes.items() if not key.startswith(PREFIX)}


def default_candidates(recipe: Recipe, prompts: list[Prompt]) -> dict[str, Signal]:
    """The recipe's signals, and the initial model under every hint that the data has. Raises ValueError where there is neither."""
    found = dict(recipe.signals)
    seen = {(str(signal.weights), str(signal.view)) for signal in found.values()}
    for hint in HINT_VIEWS:
        has = any(prompt.hints.get(hint) or (hint == "answer" and prompt.answer) for prompt in prompts)
        if has and ("frozen", hint) not in seen:
            found[f"frozen_{hint}" if hint in found else hint] = Signal(weights="frozen", view=hint)
    if not found:
        raise ValueError("there is no teacher to judge: the recipe has no signals and the data no hints; give diagnose.candidates")
    return found


def measured_recipe(recipe: Recipe, settings: Settings, candidates: Mapping[str, Signal]) -> dict[str, Any]:
    """The recipe as the measurement needs it: one term a candidate on the whole vocabulary, one batch of rollouts, nothing else."""
    raw = recipe.model_dump(mode="json")
    terms = [{"distill": "reverse_kl", "support": "full", "signal": name, "name": name} for name in candidates]
    return {
        **raw,
        "teacher": "",
        "view": "",
        "signals": {name: signal.model_dump(mode="json") for name, signal in candidates.items()},
        "objective": terms,
        "group": settings.rollouts,
        "rollout": {**raw["rollout"], "prompts": settings.problems, "source": "student", "filter": "none", "overlong": "keep"},
        "learner": {**raw["learner"], "kind": "torch"},
        "guard": {"action": "off"},
        "track": {**raw["track"], "wandb": "disabled"},
        "eval": {**raw["eval"], "num_problems": 0, "final_problems": 0} if raw["data"]["task"] else raw["eval"],
    }
