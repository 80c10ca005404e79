"""Weights and selections made for a whole batch: by hand, over ranks, and out of the denominator."""

import math
from dataclasses import replace

import pytest
import torch
from opd_rollout.types import TokenScores

from opd.credit import SequenceSignals
from opd.objective import fields
from opd.objective.fields import batch_confidence, extrapolation_budget, largest, opener, soft_or, span_ratio, top_entropy
from opd.objective.targets import extrapolate
from opd.pooling import alone


def scores(logits, ids):
    logp = logits.log_softmax(-1)
    rest = torch.ones_like(logp).scatter(-1, ids, 0.0).bool()
    tail = torch.where(rest, logp, -torch.inf).logsumexp(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return TokenScores(
        sampled=logp[:, 0], ids=ids, logp=logp.gather(-1, ids), tail_logp=tail, entropy=entropy, temperature=1.0, version=0, view_hash=""
    )


def answer(entropy, mask=None, **more):
    entropy = torch.tensor(entropy)
    mask = torch.ones(len(entropy), dtype=torch.bool) if mask is None else torch.tensor(mask)
    return SequenceSignals(
        student_logp=torch.zeros(len(entropy)), scores={}, advantage=torch.zeros(len(entropy)), loss_mask=mask, entropy=entropy, **more
    )


def test_the_unsurest_tokens_of_the_batch():
    one, other = answer([0.1, 0.9, 0.5], [True, True, False]), answer([0.7, 0.2, 0.3])
    assert [kept.tolist() for kept in top_entropy([one, other], alone, share=0.4)] == [[False, True, False], [True, False, False]]
    assert sum(int(kept.sum()) for kept in top_entropy([one, other], alone, share=0.0)) == 1
    assert [kept.tolist() for kept in top_entropy([one, other], alone, share=1.0)] == [[True, True, False], [True, True, True]]
    assert top_entropy([], alone) == []


def test_a_selection_is_the_same_on_two_ranks_and_ties_are_all_in():
    one, other = answer([0.1, 0.9]), answer([0.7, 0.7])
    together = top_entropy([one, other], alone, share=0.5)
    for mine, theirs, expected in ((one, other, together[0]), (other, one, together[1])):
        [found] = top_entropy([mine], lambda values, theirs=theirs: torch.cat([values, theirs.entropy.double()]), share=0.5)
        assert torch.equal(found, expected)
    assert together[1].tolist() == [True, True]
    assert largest([], [], 0.5, lambda values: torch.ones(3)) == []


def test_the_opener_ends_with_the_token_that_reaches_its_share():
    assert opener([answer([4.0, 3.0, 2.0, 1.0])], alone, share=0.4)[0].tolist() == [True, False, False, False]
    assert opener([answer([4.0, 3.0, 2.0, 1.0])], alone, share=0.41)[0].tolist() == [True, True, False, False]
    assert opener([answer([4.0, 3.0, 2.0, 1.0], [False, True, True, True])], alone, share=0.5)[0].tolist() == [False, True, False, False]
    assert opener([answer([4.0, 3.0], [True, True])], alone, share=1.0)[0].tolist() == [True, True]


def test_soft_or_by_the_papers_example(monkeypatch):
    """h (0, .5, 1, .2), d (1, .5, 0, .1) -> 1, .75, 1, .28: half of the tokens are the first and the third."""
    monkeypatch.setattr(fields, "_shared_reverse_kl", lambda one, signal: torch.tensor([10.0, 6.0, 2.0, 2.8]))
    one = answer([1.0, 2.0, 3.0, 1.4])
    seen = []
    monkeypatch.setattr(fields, "largest", lambda values, masks, share, pool: seen.append(values[0]) or largest(values, masks, share, pool))
    assert soft_or([one], alone, share=0.5, outliers=0.0)[0].tolist() == [True, False, True, False]
    assert seen[0].tolist() == pytest.approx([1.0, 0.75, 1.0, 0.28])
    assert soft_or([one], alone, share=1.0)[0].all()


def test_the_divergence_of_soft_or_is_the_lumped_reverse_kl():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 7, generator=g).double(), torch.randn(4, 7, generator=g).double()
    ids = student.topk(3, dim=-1).indices
    known = replace(answer([0.0] * 4), topk_logp=student.log_softmax(-1).gather(-1, ids), scores={"main": scores(teacher, ids)})
    p, q = (torch.cat([z.softmax(-1).gather(-1, ids), 1 - z.softmax(-1).gather(-1, ids).sum(-1, keepdim=True)], -1) for z in (student, teacher))
    torch.testing.assert_close(fields._shared_reverse_kl(known, "main"), (p * (p / q).log()).sum(-1), rtol=0, atol=1e-12)


def test_srpos_weights_have_mean_one_over_the_batch():
    def with_entropy(values, mask):
        known = answer([0.0] * len(values), mask)
        blank = torch.zeros(len(values), 0)
        one = TokenScores(
            sampled=known.student_logp, ids=blank.long(), logp=blank, tail_logp=known.student_logp, entropy=torch.tensor(values),
            temperature=1.0, version=0, view_hash="",
        )  # fmt: skip
        return replace(known, scores={"main": one})

    found = batch_confidence([with_entropy([0.1, 0.5], [True, True]), with_entropy([2.0, 1.0, 0.0], [True, True, False])], alone)
    assert [*found[0].tolist(), *found[1].tolist()[:2]] == pytest.approx([1.79658, 1.20428, 0.26871, 0.73043], abs=1e-5)
    flat = batch_confidence([with_entropy([0.1, 3.0], [True, True])], alone, beta=0.0)
    assert flat[0].tolist() == [1.0, 1.0] and batch_confidence([], alone) == []


def test_aligndistil_by_the_pinned_numbers():
    """Logits (1, 0) and (0, 1): distance .9242, step 13.86, weight .00721."""
    up, down = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    ids = torch.tensor([[0, 1]])
    known = replace(answer([0.0]), scores={"main": scores(up, ids), "reference": scores(down, ids)})
    [weight] = extrapolation_budget([known], alone)
    assert weight.item() == pytest.approx(0.00721, abs=5e-6)
    step = 0.1 / weight.item()
    assert step == pytest.approx(13.86, abs=5e-3)
    lp, lq = up.log_softmax(-1), down.log_softmax(-1)
    expected = (lp + step * (lp - lq)).log_softmax(-1)
    torch.testing.assert_close(extrapolate(lp, lp, lq), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(extrapolate(lp, lp, lp), lp, rtol=0, atol=1e-12)
    [equal] = extrapolation_budget([replace(known, scores={"main": scores(up, ids), "reference": scores(up, ids)})], alone)
    assert math.isclose(float(equal), 100.0)


def test_span_ratio_is_one_truncated_geometric_mean_for_each_weight_version():
    behaviour = torch.tensor([-1.0, -2.0, -3.0, -1.0, -2.0])
    one = SequenceSignals(
        student_logp=behaviour + torch.tensor([0.2, 0.4, 9.0, -1.0, -3.0]),
        scores={},
        advantage=torch.zeros(5),
        loss_mask=torch.tensor([True, True, False, True, True]),  # what is no loss token does not count in its span
        behaviour_logp=behaviour,
        versions=((3, 0, 3), (4, 3, 5)),
    )
    expected = [math.exp(0.3)] * 3 + [math.exp(-2.0)] * 2
    [found] = span_ratio([one], alone)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    [held] = span_ratio([one], alone, low=0.5, high=1.2)
    assert held.tolist() == [1.2] * 3 + [0.5] * 2
    [none] = span_ratio([replace(one, versions=())], alone)
    assert none.tolist() == [1.0] * 5
