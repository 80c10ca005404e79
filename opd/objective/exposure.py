"""A schedule that learns its own value: how much of a reference a teacher should see, by what the student learned from it later (ATESD).

Everything it remembers is a dozen numbers per pending decision, which travel with the metrics as any schedule's state does.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.distributions import Beta

from opd.config.choices import Count, NonNegative, Positive, Range, Share, reads

FEATURES = 4  # a one, the run's progress, running means of the loss and of the teacher's gap
Seed = Annotated[int, Range(0)]


@dataclass(frozen=True, slots=True)
class Decision:
    """An exposure that was drawn, what was known then, and the discounted fall of the loss since, over `age` steps."""

    alpha: float
    features: tuple[float, ...]
    reward: float = 0.0
    age: int = 0

    def after(self, fall: float, discount: float, look_ahead: int) -> "Decision":
        """One step later. Only falls count, and only within the look-ahead."""
        seen = self.age < look_ahead
        reward = self.reward + discount**self.age * max(0.0, fall) if seen else self.reward
        return Decision(self.alpha, self.features, reward, self.age + 1)


@reads("state")
def learned_exposure(
    step: int,
    metrics: Mapping[str, float],
    state: Mapping[str, float],
    *,
    steps: Count,
    hold: Count = 5,
    look_ahead: Count = 5,
    batch: Count = 4,
    discount: Share = 0.9,
    rate: Positive = 0.05,
    entropy_target: float = -0.5,
    entropy_weight: NonNegative = 0.1,
    smallest: Share = 0.0,
    largest: Share = 1.0,
    metric: str = "loss/distill",
    gap: str = "gap/main",
    seed: Seed = 0,
) -> dict[str, float]:
    """A share drawn from a Beta distribution whose two parameters are learned by REINFORCE, held for `hold` steps (ATESD, arXiv 2605.11458).

    (a, b) = 1 + softplus(W f), so the density has one peak. A decision's reward is the discounted fall of `metric` over `look_ahead` steps;
    `batch` of them, centred and scaled, make one update; entropy above its target is penalised. The paper's second reward, the teacher's
    log-prob of a reference answer, is left out, and its small network is one linear layer. steps: length of the run.
    """
    loss, value = metrics.get(metric, math.nan), state.get("value", math.nan)
    if not math.isnan(value) and math.isnan(loss):
        return dict(state)  # a step without that loss teaches nothing and decides nothing
    weights = torch.tensor([state.get(f"weight_{n}", 0.0) for n in range(2 * FEATURES)], dtype=torch.float64)
    decisions, drawn = _stored(state), int(state.get("drawn", 0))
    before = state.get("loss", math.nan)
    decisions = [one.after(before - loss, discount, look_ahead) if not math.isnan(before) else one for one in decisions]
    done = [one for one in decisions if one.age >= look_ahead]
    if len(done) >= batch:
        weights = updated(weights, done, rate, entropy_target, entropy_weight)
        decisions = [one for one in decisions if one.age < look_ahead]
    smooth = {name: _running(state.get(name, math.nan), metrics.get(key, math.nan)) for name, key in (("mean_loss", metric), ("mean_gap", gap))}
    left = int(state.get("left", 0)) - 1
    if left <= 0:
        known = (1.0, step / steps, *(0.0 if math.isnan(x) else x for x in smooth.values()))
        alpha = _draw(weights, known, f"{seed}/{drawn}")
        value, left, drawn = smallest + (largest - smallest) * alpha, hold, drawn + 1
        decisions = [*decisions, Decision(alpha, known)]
    found = {"value": value, "left": float(left), "drawn": float(drawn), "loss": loss, **smooth}
    found |= {f"weight_{n}": float(w) for n, w in enumerate(weights)}
    for n, one in enumerate(decisions):
        found |= {f"decision_{n}_{key}": number for key, number in zip(_KEYS, (one.alpha, one.reward, one.age, *one.features), strict=True)}
    return {key: float(number) for key, number in found.items() if not math.isnan(number)}


def updated(weights: Tensor, done: list[Decision], rate: float, entropy_target: float, entropy_weight: float) -> Tensor:
    """One ascent step of REINFORCE on completed decisions, W [2 x FEATURES] flat; advantages are the rewards, centred and scaled."""
    reward = torch.tensor([one.reward for one in done], dtype=torch.float64)
    advantage = (reward - reward.mean()) / (reward.std(correction=0) + 1e-8)
    weights = weights.clone().requires_grad_()
    policy = beta_of(weights, torch.tensor([one.features for one in done], dtype=torch.float64))
    alpha = torch.tensor([one.alpha for one in done], dtype=torch.float64).clamp(1e-6, 1.0 - 1e-6)
    excess = (policy.entropy() - entropy_target).clamp_min(0.0)
    loss = -(advantage * policy.log_prob(alpha)).mean() + entropy_weight * excess.square().mean()
    loss.backward()
    assert weights.grad is not None
    return (weights - rate * weights.grad).detach()


def beta_of(weights: Tensor, features: Tensor) -> Beta:
    """The distribution at each row of features [M, FEATURES]."""
    first, second = (features @ weights.view(2, FEATURES).T).unbind(-1)
    return Beta(1.0 + torch.nn.functional.softplus(first), 1.0 + torch.nn.functional.softplus(second))


_KEYS = ("alpha", "reward", "age", *(f"feature_{n}" for n in range(FEATURES)))


def _stored(state: Mapping[str, float]) -> list[Decision]:
    found = []
    while f"decision_{len(found)}_alpha" in state:
        alpha, reward, age, *features = (state[f"decision_{len(found)}_{key}"] for key in _KEYS)
        found.append(Decision(alpha, tuple(features), reward, int(age)))
    return found


def _running(before: float, now: float) -> float:
    """Running mean with a memory of about ten steps; NaN as long as nothing is known."""
    if math.isnan(now):
        return before
    return now if math.isnan(before) else 0.9 * before + 0.1 * now


def _draw(weights: Tensor, features: tuple[float, ...], name: str) -> float:
    policy = beta_of(weights, torch.tensor([features], dtype=torch.float64))
    return random.Random(name).betavariate(float(policy.concentration1), float(policy.concentration0))
