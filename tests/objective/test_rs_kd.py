"""Ids drawn from the teacher: unbiased for the forward KL's gradient, exactly where every outcome is enumerated, and through a real scorer."""

import itertools
import math

import pytest
import torch
from opd_kernels import HeadView
from opd_rollout.backbone import head_of
from opd_rollout.scoring import _at_draws, score_tokens
from opd_rollout.types import ScoreRequest

from tests.learner.cases import tiny_model
from tests.objective.dense import load

Q = torch.tensor([0.5, 0.3, 0.15, 0.05]).double()


def drawn(uniforms, logits, chunk_bytes=None):
    """What the scorer gives for these noises [N, draws] and logits [N, V], through an identity head."""
    view = HeadView(weight=torch.eye(logits.shape[1]).double(), bias=None, softcap=None, logit_scale=1.0, vocab_size=None)
    options = {"temperature": 1.0, "chunk_bytes": chunk_bytes}
    return _at_draws(logits, view, token_N=torch.zeros(len(logits)).long(), noise_NK=uniforms, options=options)


def dense(found, size):
    """Shares [N, V] of the draws."""
    shares = torch.zeros(len(found["ids"]), size).double()
    for row, (ids, logp) in enumerate(zip(found["ids"], found["logp"], strict=True)):
        for number, value in zip(ids.tolist(), logp.tolist(), strict=True):
            if number >= 0:
                shares[row, number] += math.exp(value)
    return shares


def test_shares_by_hand():
    """Cumulative .5 .8 .95 1: noises .1 .6 .7 .99 draw ids 0 1 1 3."""
    found = drawn(torch.tensor([[0.1, 0.6, 0.7, 0.99]]).double(), Q.log()[None])
    assert found["ids"].tolist() == [[0, 1, -1, 3]] and dense(found, 4)[0].tolist() == pytest.approx([0.25, 0.5, 0.0, 0.25])
    assert found["tail_logp"].item() < -9000 and found["logp"][0, 2].item() < -9000


def test_the_mean_over_many_draws_is_the_teacher_and_chunks_change_nothing():
    noise = torch.rand(4000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = Q.log().expand(4000, 4)
    found = drawn(noise, logits)
    shares = dense(found, 4)
    assert shares.sum(-1).tolist() == pytest.approx([1.0] * 4000)
    torch.testing.assert_close(shares.mean(0), Q, rtol=0, atol=5e-3)
    small = drawn(noise[:100], logits[:100], chunk_bytes=16 * 4 * 7)
    assert torch.equal(small["ids"], found["ids"][:100]) and torch.equal(small["logp"], found["logp"][:100])


def test_expected_gradient_is_the_forward_kls(small):
    """Two draws from four ids, all sixteen outcomes with their probabilities, through the recipe's own term."""
    g = torch.Generator().manual_seed(1)
    student = torch.randn(1, 4, dtype=torch.float64, generator=g)
    objective = small.build({"distill": "forward_kl", "support": {"teacher_sample": {"draws": 2}}})
    edges = [0.0, *Q.cumsum(0).tolist()]
    middle = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    total = torch.zeros(1, 4).double()
    for one, other in itertools.product(range(4), repeat=2):
        found = drawn(torch.tensor([[middle[one], middle[other]]]).double(), Q.log()[None])
        rows = small.rows(torch.tensor([0]), {"main": (Q.log()[None], found["ids"])}, terms=("distill",))
        signal = rows.signals["main"]
        rows.signals["main"] = type(signal)(
            available=signal.available, sampled=signal.sampled, entropy=signal.entropy, columns=signal.columns, logp=found["logp"],
            tail_logp=found["tail_logp"], hidden=None,
        )  # fmt: skip
        total += Q[one] * Q[other] * small.run(objective, student, rows).gradient
    torch.testing.assert_close(total, student.softmax(-1) - Q, rtol=0, atol=1e-7)


def test_a_scorer_draws_the_same_ids_for_the_same_answer():
    model = tiny_model(3)
    texts = (((1, 2, 3), (4, 5, 6, 7)), ((1,), (4, 5)))
    requests = [ScoreRequest(context_ids=context, completion_ids=completion, draws=9) for context, completion in texts]
    options = {"temperature": 1.0, "token_budget": 1000, "version": 0}
    first, second = (score_tokens(model, head_of(model), requests, **options) for _ in range(2))
    apart = [score_tokens(model, head_of(model), [request], **options)[0] for request in requests]
    for one, other, alone in zip(first, second, apart, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.ids, alone.ids) and one.ids.shape[1] == 9
        assert torch.where(one.ids >= 0, one.logp.exp(), 0.0).sum(-1).tolist() == pytest.approx([1.0] * len(one.ids), abs=1e-6)
    with pytest.raises(ValueError, match="more than one of support_ids, k = 3 and draws = 2"):
        score_tokens(model, head_of(model), [ScoreRequest(context_ids=(1,), completion_ids=(2,), k=3, draws=2)], **options)


def test_the_recipe_asks_for_draws():
    needs = load("rs_kd")[1].needs.signals["main"]
    assert (needs.draws, needs.k, needs.student_support, needs.hidden) == (50, 0, False, False)
