"""Numbers that change while training: (step, last metrics) -> value. Pure, so a resumed run gets the same ones."""

from collections.abc import Mapping
from typing import Annotated

from opd.choices import Count, Range

Step = Annotated[int, Range(0)]


def constant(step: int, metrics: Mapping[str, float], *, value: float) -> float:
    return value


def linear(step: int, metrics: Mapping[str, float], *, start: float, end: float, steps: Count, begin: Step = 0) -> float:
    """From `start` at step `begin` to `end` `steps` later, constant on either side."""
    progress = min(max((step - begin) / steps, 0.0), 1.0)
    return start + (end - start) * progress


def switch(step: int, metrics: Mapping[str, float], *, at: Step, before: float = 1.0, after: float = 0.0) -> float:
    """`before` until step `at`, then `after`: stages."""
    return before if step < at else after


SCHEDULES = {"constant": constant, "linear": linear, "switch": switch}
