"""Learning rate as a pure function of the optimiser step."""

import math

from opd.learner.types import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """Rate of optimiser step `step` (0 is the first): linear warm-up that is never 0, then constant, cosine or linear to 0 at total_steps.

    Example: lr 1, warmup_steps 4: 0.25, 0.5, 0.75, 1, then the schedule from its start.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(1, settings.total_steps - settings.warmup_steps))
    return settings.lr * SCHEDULES[settings.schedule](progress)


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1.0 - progress


SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear}
