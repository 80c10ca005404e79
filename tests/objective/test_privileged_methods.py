"""Privileged self-distillation methods, from their recipe to the gradient, against numbers by hand and dense fp64 formulas."""

from pathlib import Path

import pytest
import torch

from opd.config import load_recipe
from opd.objective import Setting, build_objective

FOLDER = Path(__file__).parents[2] / "recipes" / "methods"


def load(name):
    recipe = load_recipe(str(FOLDER / f"{name}.yaml"))
    source = recipe.rollout.source if isinstance(recipe.rollout.source, str) else next(iter(recipe.rollout.source))
    return build_objective(recipe.objective, Setting(signals=tuple(recipe.signals), group=recipe.group, source=source))


def gradient(function, logits):
    """Of the sum over rows of function(student log-probs [N, V])."""
    logits = logits.detach().requires_grad_()
    [found] = torch.autograd.grad(function(logits.log_softmax(-1)).sum(), logits)
    return found


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# OPSD (arXiv:2601.18734): the variants differ in divergence and support alone


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("opsd", lambda p, q: (q.exp() * (q - p)).clamp_max(0.05).sum(-1)),
        ("opsd_reverse", lambda p, q: (p.exp() * (p - q)).sum(-1)),
        ("opsd_jsd", lambda p, q: sum(0.5 * (one.exp() * (one - ((p.exp() + q.exp()) / 2).log())).sum(-1) for one in (p, q))),
    ],
)
def test_opsd_on_the_whole_vocabulary(small, fixture_logits, name, formula):
    student, teacher = fixture_logits
    token = torch.tensor([1])
    found = small.run(load(name), student, small.rows(token, {"main": (teacher, token[:, None])}, terms=("distill",)))
    target = teacher.log_softmax(-1)
    close(found.loss, formula(student.detach().log_softmax(-1), target).sum())
    close(found.gradient, gradient(lambda logp: formula(logp, target), student))


def test_opsd_clip_gradient_is_the_published_one(small, fixture_logits):
    student, teacher = fixture_logits
    token = torch.tensor([1])
    found = small.run(load("opsd"), student, small.rows(token, {"main": (teacher, token[:, None])}, terms=("distill",)))
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    keep = q * (q.log() - p.log()) < 0.05
    close(found.gradient, p * (keep * q).sum() - keep * q)


def test_opsd_on_the_teachers_top_renormalises_both_sides(small):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, 80, dtype=torch.float64, generator=generator) for _ in range(2))
    token = torch.tensor([0, 7, 79, 3])
    rows = small.rows(token, {"main": (teacher, small.top_ids(teacher, 64, token))}, terms=("distill",))
    found = small.run(load("opsd_topk"), student, rows)
    ids = teacher.topk(64).indices
    inside = teacher.log_softmax(-1).gather(-1, ids).log_softmax(-1)

    def renormalised(logp):
        return (inside.exp() * (inside - logp.gather(-1, ids).log_softmax(-1))).sum(-1) / 4

    close(found.loss, renormalised(student.log_softmax(-1)).sum())
    close(found.gradient, gradient(renormalised, student))
    outside = torch.ones_like(student).scatter(-1, ids, 0.0).bool()
    assert found.gradient[outside].abs().max() < 1e-15, "nothing pushes on the tail: renormalised, not a bucket"


def test_opsd_sampled_has_the_reverse_kls_gradient_in_expectation(small, fixture_logits):
    student, teacher = fixture_logits
    token, count = torch.arange(7), 7
    logp, target = student.detach().log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    rows = small.rows(
        token, {"main": (teacher.expand(count, -1).contiguous(), token[:, None])},
        advantage={"policy": target - logp}, route={"policy": logp.exp()},
    )  # fmt: skip
    found = small.run(load("opsd_sampled"), student.expand(count, -1).contiguous(), rows, {"policy": 1.0, "*": 1.0})
    close(found.gradient.sum(0, keepdim=True), gradient(lambda p: (p.exp() * (p - teacher.log_softmax(-1))).sum(-1), student))


@pytest.mark.parametrize("name", ["opsd", "opsd_reverse", "opsd_jsd", "opsd_topk"])
def test_a_teacher_that_sees_nothing_more_teaches_nothing(small, name):
    logits = torch.randn(3, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    token = torch.tensor([1, 2, 69])
    rows = small.rows(token, {"main": (logits, small.top_ids(logits, 64, token))}, terms=("distill",))
    found = small.run(load(name), logits, rows)
    close(found.loss, torch.zeros((), dtype=torch.float64))
    close(found.gradient, torch.zeros_like(logits))
