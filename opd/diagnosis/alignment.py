"""The arithmetic of a diagnosis: pure functions on small vectors, no model.

Legend: C candidate tokens of a node (a prefix of a student's answer), p student, q teacher, u the success rate after each candidate; S nodes.
A node's gradients are with respect to the student's logits of the candidates, in the direction of ascent. The ideal one is that of the expected
success, p (u - sum p u); a loss D's is -dD/dz (Unmasking On-Policy Distillation, arXiv:2605.10889).
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor


def ideal_gradient(p_C: Tensor, u_C: Tensor) -> Tensor:
    """d (sum p u) / dz [C] for p = softmax(z)."""
    return p_C * (u_C - (p_C * u_C).sum(-1, keepdim=True))


def reverse_kl_gradient(p_C: Tensor, q_C: Tensor) -> Tensor:
    """-d KL(p || q) / dz [C] for p = softmax(z)."""
    f = q_C.log() - p_C.log()
    return p_C * (f - (p_C * f).sum(-1, keepdim=True))


def forward_kl_gradient(p_C: Tensor, q_C: Tensor) -> Tensor:
    """-d KL(q || p) / dz [C] for p = softmax(z)."""
    return q_C - p_C


GRADIENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"reverse_kl": reverse_kl_gradient, "forward_kl": forward_kl_gradient}


def renormalised(values_C: Tensor) -> Tensor:
    """Probabilities of the candidates that sum to one."""
    return values_C / values_C.sum(-1, keepdim=True)


def cosine(a_C: Tensor, b_C: Tensor) -> float | None:
    """Cosine of two gradients, None where one of them is 0: all candidates succeed alike, or teacher and student agree."""
    lengths = float(a_C.norm() * b_C.norm())
    return float((a_C * b_C).sum()) / lengths if lengths > 1e-12 else None


def pooled(dots: Sequence[float], ideal_squares: Sequence[float], loss_squares: Sequence[float]) -> float | None:
    """One cosine over many nodes: sum of inner products over the root of the summed squares; None where a side is 0.

    Nodes count by the size of their gradients, as in an update. ideal_squares may be estimated without bias from two halves of the rollouts
    (`half_square`), so noise in the success rates does not shrink the result.
    """
    a, b = sum(ideal_squares), sum(loss_squares)
    return sum(dots) / math.sqrt(a * b) if a > 1e-12 and b > 1e-12 else None


def half_square(p_C: Tensor, first_C: Tensor, second_C: Tensor) -> float:
    """Unbiased |ideal gradient|^2 from two independent estimates of the success rates."""
    return float((ideal_gradient(p_C, first_C) * ideal_gradient(p_C, second_C)).sum())


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float | None:
    """Probability that a true one scores above a false one, ties half; None without both."""
    positive = [score for score, label in zip(scores, labels, strict=True) if label]
    negative = [score for score, label in zip(scores, labels, strict=True) if not label]
    if not positive or not negative:
        return None
    ranked = sorted(negative)
    tensor = torch.tensor(ranked, dtype=torch.float64)
    values = torch.tensor(positive, dtype=torch.float64)
    below, upto = torch.searchsorted(tensor, values), torch.searchsorted(tensor, values, right=True)
    return float((below + upto).double().mean() / (2 * len(negative)))


def pass_rates(correct: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    """Question -> share of right answers."""
    return {name: fmean(float(one) for one in answers) for name, answers in correct.items() if answers}


def paced(rates: Sequence[float]) -> dict[str, float]:
    """What PACED's weight p (1 - p) (arXiv:2603.11178) would make of these pass rates.

    zero: share of questions with weight 0 (never or always right); mean: mean weight; effective: (sum w)^2 / sum w^2 over the number of questions.
    """
    weights = [rate * (1 - rate) for rate in rates]
    squares = sum(weight**2 for weight in weights)
    return {
        "zero": fmean(float(weight == 0) for weight in weights),
        "mean": fmean(weights),
        "effective": sum(weights) ** 2 / squares / len(weights) if squares else 0.0,
    }


def interval(
    groups: Sequence[object], statistic: Callable[[Sequence[int]], float | None], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % bootstrap interval of a statistic of item numbers, resampling whole groups (questions); None where it is undefined too often."""
    found = sorted(value for value in bootstrap(groups, statistic, draws=draws, seed=seed) if value is not None)
    if len(found) < draws // 2:
        return None
    return found[int(0.025 * len(found))], found[min(len(found) - 1, int(0.975 * len(found)))]


def bootstrap(
    groups: Sequence[object], statistic: Callable[[Sequence[int]], float | None], *, draws: int, seed: int
) -> list[float | None]:
    """The statistic on `draws` resamples of the groups; the same seed draws the same groups."""
    members: dict[object, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    names, rng = list(members), random.Random(seed)
    return [statistic([n for _ in names for n in members[rng.choice(names)]]) for _ in range(draws)] if names else []
