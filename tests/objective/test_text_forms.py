"""CORD, GDSD and CurioSFT in their forms for texts: from the recipe to the gradient, against formulas over dense fp64 logits."""

import math

import pytest
import torch

from opd.evidence import curious_teacher
from opd.objective.fields import peak_divergence
from opd.pooling import alone
from tests.objective.dense import Batch, load, log
from tests.objective.test_privileged_methods import sequence


def shared_kl(answer, logits, k):
    """KL(student || signal) at rollout weights on the student's top k, its own token and the rest."""
    old, other = log(answer.old), log(logits)
    inside = torch.zeros_like(old, dtype=torch.bool).scatter(-1, old.topk(k).indices, True).scatter(-1, answer.tokens[:, None], True)
    rest = [torch.where(inside, 0.0, side.exp()).sum(-1) for side in (old, other)]
    return torch.where(inside, old.exp() * (old - other), 0.0).sum(-1) + rest[0] * (rest[0] / rest[1]).log()


def top_kl(answer, k):
    """KL of the student now on its top k at rollout weights, the rest one category."""
    now, other = log(answer.now), log(answer.teachers["main"])
    inside = torch.zeros_like(now, dtype=torch.bool).scatter(-1, log(answer.old).topk(k).indices, True)
    rest = [torch.where(inside, 0.0, side.exp()).sum(-1) for side in (now, other)]
    return torch.where(inside, now.exp() * (now - other), 0.0).sum(-1) + rest[0] * (rest[0] / rest[1]).log()


def grpo_loss(answers):
    total = 0.0
    for group in (0, 1):
        members = [a for a in answers if a.group == group]
        reward = torch.tensor([a.reward for a in members], dtype=torch.float64)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        for a, value in zip(members, advantage, strict=True):
            r = (a.at(a.now) - a.at(a.old).detach()).exp()
            total = total + -torch.minimum(r * value, r.clamp(0.8, 1.2) * value).mean()
    return total / len(answers)


def cord_loss(answers, factor=2.0, decay=0.99, tokens=2):
    total, count = 0.0, sum(len(a.tokens) for a in answers)
    for a in answers:
        gap = shared_kl(a, a.teachers["main"], 3).detach()
        weight = torch.ones_like(gap)
        weight[gap.topk(min(tokens, len(gap))).indices] = factor
        total = total + (weight * decay ** torch.arange(len(gap)).double() * top_kl(a, 3)).sum() / count
    return grpo_loss(answers) + total


def test_cord_from_recipe_to_gradient_and_what_sets_it_apart():
    batch = Batch.make(seed=4)
    weight = {"peak_divergence": {"tokens": 2, "factor": 2.0, "decay": 0.99}}
    batch.expect(load("cord", t1__weight=weight)[1], cord_loss)
    for changed in ({"factor": 1.0}, {"decay": 1.0}, {"tokens": 1}):
        with pytest.raises(AssertionError, match="not close"):
            batch.expect(load("cord", t1__weight={"peak_divergence": {**weight["peak_divergence"], **changed}})[1], cord_loss)
    with pytest.raises(AssertionError, match="not close"):
        batch.expect(load("cord", without=["1.weight"])[1], cord_loss)


def test_peak_divergence_by_hand():
    """KL (.1, .9, .2), one peak: weights (1, 2, 1)."""
    gaps = torch.tensor([0.1, 0.9, 0.2], dtype=torch.float64)
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    rows = []
    for gap in gaps:  # q = (x, 1 - x) with KL(p || q) = gap
        x = 0.5 * (1.0 - math.sqrt(1.0 - math.exp(-2.0 * float(gap))))
        rows.append(torch.tensor([x, 1.0 - x], dtype=torch.float64).log())
    one = sequence(torch.full((3,), 0.5).double().log(), main=torch.zeros(3))
    one.scores["main"].ids = torch.tensor([[0, 1]] * 3)
    one.scores["main"].logp = torch.stack(rows)
    one.scores["main"].tail_logp = torch.full((3,), -1e4).double()
    object.__setattr__(one, "topk_logp", p.log().expand(3, 2))
    [found] = peak_divergence([one], alone, tokens=1, factor=2.0)
    assert found.tolist() == [1.0, 2.0, 1.0]
    [found] = peak_divergence([one], alone, tokens=1, factor=2.0, decay=0.5)
    assert found.tolist() == [1.0, 1.0, 0.25]


def gdsd_loss(answers, scale=1.0, low=0.2, high=0.2):
    total = 0.0
    for group in (0, 1):
        members = [a for a in answers if a.group == group]
        reward = torch.tensor([a.reward for a in members], dtype=torch.float64)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        for a, value in zip(members, advantage, strict=True):
            gap = (a.at(a.now) - a.at(a.old)).mean().clamp(math.log(1 - low), math.log(1 + high))
            penalty = (a.at(a.now) - a.at(a.teachers["reference"])).square().mean() / 2
            total = total + (gap - scale * value) ** 2 + 1e-3 * penalty
    return total / len(answers)


@pytest.mark.parametrize("drift", [0.05, 0.6])
def test_gdsd_from_recipe_to_gradient_and_what_sets_it_apart(drift):
    batch = Batch.make(seed=5, drift=drift)
    gaps = [float((a.at(a.now) - a.at(a.old)).mean()) for a in batch.answers]
    assert any(abs(gap) > 0.3 for gap in gaps) == (drift > 0.1), "one batch inside the clamp, one partly beyond it"
    batch.expect(load("gdsd")[1], gdsd_loss)
    without_penalty = load("gdsd", t1__coef=0.0)[1]
    with pytest.raises(AssertionError, match="not close"):
        batch.expect(without_penalty, gdsd_loss)
    for changed in ({"scale": 2.0}, {"low": 0.9, "high": 9.0}):
        if drift > 0.1 or "scale" in changed:
            with pytest.raises(AssertionError, match="not close"):
                batch.expect(load("gdsd", t0__policy={"log_ratio_regression": changed})[1], gdsd_loss)


def tempered_logp(logits, tokens, k, temperature):
    """log-prob of each token at its temperature on the teacher's top k and itself."""
    logp = log(logits)
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, logp.topk(k).indices, True).scatter(-1, tokens[:, None], True)
    warm = torch.where(inside, logp, -torch.inf) / temperature[:, None]
    return warm.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def entropy(logits, tokens, k, temperature):
    logp = log(logits)
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, logp.topk(k).indices, True).scatter(-1, tokens[:, None], True)
    warm = (torch.where(inside, logp, -torch.inf) / temperature[:, None]).log_softmax(-1)
    return -torch.where(inside, warm.exp() * warm, 0.0).sum(-1)


def curious_target(answer, k=3):
    """By a grid of 40,001 temperatures in the place of the bisection."""
    logits, tokens = answer.teachers["main"], answer.tokens
    ones = torch.ones(len(tokens), dtype=torch.float64)
    base = entropy(logits, tokens, k, ones)
    wanted = base + 0.5 * torch.sigmoid(2.0 * (base - 1.2))
    grid = torch.linspace(1.1, 1.5, 40_001, dtype=torch.float64)
    found = []
    for n in range(len(tokens)):
        row = logits[n : n + 1].expand(len(grid), -1)
        each = entropy(row, tokens[n].expand(len(grid)), k, grid)
        found.append(grid[int((each - wanted[n]).abs().argmin())])
    temperature = torch.where(base <= 0.03, 1.1, torch.stack(found))
    return tempered_logp(logits, tokens, k, temperature)


def test_curio_sft_from_recipe_to_gradient_and_what_sets_it_apart():
    batch = Batch.make(seed=6)
    for a in batch.answers:
        a.source = "dataset"
    targets = [curious_target(a) for a in batch.answers]
    count = sum(len(a.tokens) for a in batch.answers)

    def loss(answers, weight=1.0):
        pairs = zip(answers, targets, strict=True)
        return sum((-a.at(a.now) + weight * (a.at(a.now) - t) ** 2 / 2).sum() for a, t in pairs) / count

    def recipe(**changes):
        return load("curio_sft", t1__advantage={"curious_teacher": {"k": 3, **changes}})[1]

    batch.expect(recipe(), loss, atol=1e-5)  # the grid's width
    for changed in ({"rise": 0.0}, {"low": 1.0, "high": 1.0001}, {"k": 2}):
        with pytest.raises(AssertionError, match="not close"):
            batch.expect(recipe(**changed), loss, atol=1e-4)
    with pytest.raises(AssertionError, match="not close"):
        batch.expect(recipe(), lambda answers: loss(answers, weight=0.0), atol=1e-4)


def test_the_temperature_raises_the_entropy_by_the_published_amount():
    """H = 1.2 asks for 1.45; a peaked row takes the lowest temperature; at temperature 1 the target is the teacher itself."""
    z = torch.linspace(0.0, 1.0, 400, dtype=torch.float64)
    rows = [torch.stack([torch.zeros_like(z), -3.0 * z, -6.0 * z, -6.0 * z, -9.0 * z], -1)]
    logp = rows[0].log_softmax(-1)
    h = -(logp.exp() * logp).sum(-1)
    row = logp[int((h - 1.2).abs().argmin())]
    assert abs(float(-(row.exp() * row).sum()) - 1.2) < 5e-3
    one = sequence(row[:1], main=row[:1])
    one.scores["main"].ids, one.scores["main"].logp = torch.arange(5)[None], row[None]
    warmest = [float(curious_teacher(one, low=1.0, high=high)) for high in (20.0, 1.0 + 1e-9)]
    assert abs(warmest[1] - float(row[0])) < 1e-7
    temperatures = torch.linspace(1.0, 4.0, 30_001, dtype=torch.float64)
    warm = (row / temperatures[:, None]).log_softmax(-1)
    at = int((-(warm.exp() * warm).sum(-1) - 1.45).abs().argmin())
    assert abs(warmest[0] - float(warm[at, 0])) < 2e-3
    peaked = torch.tensor([0.999, 0.001]).double().log()
    one = sequence(peaked[:1], main=peaked[:1])
    one.scores["main"].ids, one.scores["main"].logp = torch.arange(2)[None], peaked[None]
    assert abs(float(curious_teacher(one)) - float((peaked / 1.1).log_softmax(-1)[0])) < 1e-12
