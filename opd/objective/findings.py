"""What a rule of legality looks at beside a term, and what it finds."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from opd.objective.terms import Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the rest of the recipe says; None where it is not known, which leaves the matching rules out.

    sampled_in: the signal under whose view answers are sampled; None where the student samples under its own prompt.
    """

    signals: Collection[str] | None = None
    group: int | None = None
    source: Literal["student", "dataset", "mixed", "revised"] | None = None
    vocabulary: int | None = None
    max_tokens: int | None = None
    sampled_in: str | None = None
    sampler: bool = False
    """Whether a teacher helps to draw the tokens."""
    max_staleness: int = 0
    """Versions that an answer may be older than the learner that reads it."""
    max_age: int = 0
    """Steps that an answer from the replay buffer may be old."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Why a term is refused, what is legal instead, and the `allow` name that lets it run all the same."""

    reason: str
    legal: str
    allow: str = ""


Rule = Callable[[Term, Setting], Finding | None]
