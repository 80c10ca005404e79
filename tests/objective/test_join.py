"""From judged answers and scores to samples: groups, credit, routes, and what an answer without verdict or view takes part in."""

import pytest
import torch
from opd_rollout.types import Completion, TokenScores

from opd.objective import join
from opd.types import Judged, Prepared, Prompt, Verdict


def answer(group, member, reward, *, status="score", tokens=2, mask=None):
    completion = Completion(
        token_ids=tuple(range(tokens)),
        logprobs=torch.full((tokens,), -1.0),
        loss_mask=torch.ones(tokens, dtype=torch.bool) if mask is None else torch.tensor(mask),
        source="engine",
        temperature=1.0,
        finish="stop",
        versions=((0, 0, tokens),),
    )
    verdict = Verdict(status=status, reward=reward, correct=reward > 0.5)
    prompt = Prompt(id=f"p{group}", messages=({"role": "user", "content": "?"},))
    return Judged(prompt=prompt, prompt_ids=(1,), completion=completion, text="", verdict=verdict, group=group, member=member)


def scores(tokens=2, sampled=-0.5):
    empty = torch.zeros((tokens, 0))
    column = torch.full((tokens,), sampled)
    return TokenScores(sampled=column, ids=empty.long(), logp=empty, tail_logp=column, entropy=column, temperature=1.0, version=0, view_hash="")


def joined(small, specs, judged, found=None, prepared=None):
    return join(judged, prepared or [None] * len(judged), found or [{}] * len(judged), small.build(*specs))


POLICY = {"policy": "reinforce", "advantage": "group_centered"}


def test_credit_follows_groups_even_when_their_answers_are_interleaved(small):
    judged = [answer(5, 0, 1.0), answer(2, 0, 0.0), answer(5, 1, 0.0), answer(2, 1, 0.0), answer(5, 2, 0.5)]
    samples = joined(small, [POLICY], judged)
    assert [s.advantage["policy"].tolist() for s in samples] == [[0.5, 0.5], [0.0, 0.0], [-0.5, -0.5], [0.0, 0.0], [0.0, 0.0]]
    assert [s.judged is j for s, j in zip(samples, judged, strict=True)] == [True] * 5
    assert samples[0].fields == {} and samples[0].route == {"policy": 1.0}


def test_an_answer_without_a_verdict_leaves_group_terms_but_is_still_distilled(small):
    judged = [answer(0, 0, 1.0), answer(0, 1, 7.0, status="error"), answer(0, 2, 0.0), answer(0, 3, 7.0, status="abstain")]
    samples = joined(small, [POLICY, {"distill": "forward_kl"}], judged, [{"main": scores()}] * 4)
    assert [s.route["policy"] for s in samples] == [1.0, 0.0, 1.0, 0.0]
    assert [s.route["distill"] for s in samples] == [1.0] * 4
    assert [s.advantage["policy"][0].item() for s in samples] == [0.5, 0.0, -0.5, 0.0]


def test_answers_without_a_view_leave_the_terms_that_read_it(small):
    judged = [answer(0, 0, 1.0), answer(0, 1, 0.0)]
    specs = [
        {"policy": "reinforce", "advantage": "teacher_logratio"},
        {"distill": "forward_kl", "route": "all"},
        {"nll": {}},
    ]
    with_view, without = joined(small, specs, judged, [{"main": scores()}, {}])
    assert with_view.route == {"policy": 1.0, "distill": 1.0, "nll": 1.0} and without.route == {"policy": 0.0, "distill": 0.0, "nll": 1.0}
    assert with_view.advantage["policy"].tolist() == [0.5, 0.5] and without.advantage["policy"].tolist() == [0.0, 0.0]


def test_the_prepared_log_probs_take_the_place_of_the_engines(small):
    prepared = Prepared(old_logp=torch.tensor([-1.5, -0.5]), entropy=torch.zeros(2))
    specs = [{"policy": "reinforce", "advantage": "teacher_logratio"}]
    [sample] = joined(small, specs, [answer(0, 0, 1.0)], [{"main": scores()}], [prepared])
    assert sample.advantage["policy"].tolist() == [1.0, 0.0] and sample.prepared is prepared


def test_the_hybrid_routes_every_answer_to_exactly_one_term(small):
    specs = [{**POLICY, "route": "not_wrong_with_view"}, {"distill": "forward_kl", "route": "wrong_with_view"}]
    judged = [answer(0, 0, 1.0), answer(0, 1, 0.0), answer(1, 0, 0.0), answer(1, 1, 0.0)]
    samples = joined(small, specs, judged, [{}, {"main": scores()}, {}, {}])
    assert [tuple(s.route.values()) for s in samples] == [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.0)]


def test_answer_lengths_count_unmasked_tokens_that_the_gates_keep(small):
    judged = [answer(0, 0, 1.0, tokens=4, mask=[True, True, False, True]), answer(0, 1, 0.0, tokens=0)]
    specs = [
        {"nll": {}, "reduce": "sequence_mean"},
        {"nll": {}, "name": "later", "reduce": "sequence_mean", "weight": {"skip_first": {"tokens": 1}}},
        {"nll": {}, "name": "flat"},
    ]
    first, empty = joined(small, specs, judged)
    assert first.fields["length/nll"].tolist() == [3.0] * 4 and first.fields["length/later"].tolist() == [2.0] * 4
    assert set(first.fields) == {"length/nll", "length/later"} and empty.fields["length/nll"].shape == (0,)


def test_masked_tokens_have_no_advantage(small):
    judged = [answer(0, 0, 1.0, mask=[True, False]), answer(0, 1, 0.0)]
    first, _ = joined(small, [POLICY], judged)
    assert first.advantage["policy"].tolist() == [0.5, 0.0]


def test_lists_of_different_lengths_are_a_bug(small):
    with pytest.raises(AssertionError, match="one entry an answer"):
        join([answer(0, 0, 1.0)], [], [], small.build({"nll": {}}))
