"""Numbers that change while training: (step, last metrics) -> value. Pure, so a resumed run gets the same ones.

A closed loop that remembers something reads "state": (step, last metrics, its own last state) -> {"value": ..., its new state}. The state
travels with the metrics, which a checkpoint keeps; at the first step it is empty. A schedule may stand for a term's coef and for any number
among the parameters of its functions, where it is bound before the step; see `Objective.at`.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from opd.config.choices import Count, Positive, Range, Share, reads
from opd.objective.exposure import learned_exposure

Step = Annotated[int, Range(0)]


def constant(step: int, metrics: Mapping[str, float], *, value: float) -> float:
    """Always `value`."""
    return value


def linear(step: int, metrics: Mapping[str, float], *, start: float, end: float, steps: Count, begin: Step = 0) -> float:
    """From `start` at step `begin` to `end` `steps` later, constant on either side: a ramp, or hold and then decay."""
    progress = min(max((step - begin) / steps, 0.0), 1.0)
    return start + (end - start) * progress


def switch(step: int, metrics: Mapping[str, float], *, at: Step, before: float = 1.0, after: float = 0.0) -> float:
    """`before` until step `at`, then `after`: stages."""
    return before if step < at else after


def cycle(step: int, metrics: Mapping[str, float], *, period: Count, at: Step = 0, then: float = 1.0, otherwise: float = 0.0) -> float:
    """`then` at one step of every `period`, the one whose number modulo `period` is `at`: alternating updates."""
    return then if step % period == at else otherwise


@reads("state")
def taid(
    step: int,
    metrics: Mapping[str, float],
    state: Mapping[str, float],
    *,
    start: Share = 0.4,
    end: Share = 1.0,
    steps: Count,
    rate: Positive = 5e-4,
    momentum: Share = 0.99,
    metric: str = "loss/distill",
) -> dict[str, float]:
    """The share of the teacher in TAID's target: never falls, at least linear from start to end, faster while the loss falls (2501.16937).

    With rel the relative fall of `metric` since the step before and m its running mean: t + rate sigmoid(m) (1 - t).
    """
    floor = start + (end - start) * min(step / steps, 1.0)
    loss, value = metrics.get(metric, math.nan), min(end, max(floor, state.get("value", start)))
    if math.isnan(loss):
        return {**state, "value": value}
    if "previous" not in state:
        return {"value": value, "previous": loss, "momentum": 0.0}
    relative = (state["previous"] - loss) / (state["previous"] + 1e-15)
    smooth = momentum * state["momentum"] + (1.0 - momentum) * relative
    before = state["value"]
    faster = before + rate / (1.0 + math.exp(-max(min(smooth, 50.0), -50.0))) * (1.0 - before)
    return {"value": min(end, max(floor, faster)), "previous": loss, "momentum": smooth}


@reads("state")
def rise_when_worse(
    step: int,
    metrics: Mapping[str, float],
    state: Mapping[str, float],
    *,
    metric: str = "eval/dev",
    better: Literal["higher", "lower"] = "higher",
    tolerance: Positive = 0.1,
    rise: Positive = 0.1,
    start: Share = 0.0,
    end: Share = 1.0,
) -> dict[str, float]:
    """Up by `rise`, at most to `end`, each time `metric` is worse by `tolerance` than when it last rose (DistiLLM's phi, arXiv 2402.03898).

    The reference moves only then, as in the authors' code: a metric that only improves leaves the value at `start`.
    """
    now, value = metrics.get(metric, math.nan), state.get("value", start)
    if math.isnan(now):
        return {**state, "value": value}
    worse = now if better == "lower" else -now
    if "reference" not in state:
        return {"value": value, "reference": worse}
    if worse >= state["reference"] + tolerance:
        return {"value": min(end, value + rise), "reference": worse}
    return {"value": value, "reference": state["reference"]}


SCHEDULES = {
    "constant": constant,
    "linear": linear,
    "switch": switch,
    "cycle": cycle,
    "taid": taid,
    "rise_when_worse": rise_when_worse,
    "learned_exposure": learned_exposure,
}
