"""Enumeration against every sequence of a small language, sampling against enumeration, both on the embedded task."""

import itertools
import math
import random

import pytest
import torch
from opd_rollout.types import Completion, TokenScores

from opd.diagnosis.branches import Branch, Judge, exact_success, sampled_success
from opd.types import Prompt, Verdict

V, STOP, LONGEST = 4, 0, 4
PROMPT = Prompt(id="p", messages=({"role": "user", "content": "?"},))


def next_probabilities(context):
    """A language in which the next token depends on the sum of all before."""
    weights = [math.exp(math.sin(1.7 * token + sum(context))) for token in range(V)]
    return [weight / sum(weights) for weight in weights]


def fake_score(requests):
    found = []
    for request in requests:
        p = torch.tensor([next_probabilities(request.context_ids)])
        top = p.topk(request.k)
        ids = torch.cat([torch.tensor([request.completion_ids]), top.indices.masked_fill(top.indices == request.completion_ids[0], -1)], 1)
        logp = torch.where(ids >= 0, p.gather(1, ids.clamp_min(0)).log(), -1e4)
        rest = {"tail_logp": torch.zeros(1), "entropy": torch.zeros(1), "temperature": 1.0, "version": 0, "view_hash": ""}
        found.append(TokenScores(sampled=logp[:, 0], ids=ids, logp=logp, **rest))
    return found


def fake_generate(requests, sampling):
    found = []
    for request in requests:
        rng, tokens = random.Random(request.seed), []
        while len(tokens) < sampling.max_tokens and (not tokens or tokens[-1] not in sampling.stop_ids):
            tokens.append(rng.choices(range(V), next_probabilities(request.prompt_ids + tuple(tokens)))[0])
        n = len(tokens)
        found.append(
            Completion(token_ids=tuple(tokens), logprobs=torch.zeros(n), loss_mask=torch.ones(n, dtype=torch.bool), source="", temperature=1.0,
                       finish="stop", versions=())
        )  # fmt: skip
    return found


def even(prompt, text):
    return Verdict(correct=sum(map(int, text.split())) % 2 == 0)


JUDGE = Judge(verify=even, decode=lambda ids: " ".join(map(str, ids)), stop_ids=(STOP,), max_tokens=LONGEST)
BRANCHES = [Branch(prompt=PROMPT, prompt_ids=(2, 1), tokens=tokens) for tokens in ((1,), (2, 3), (3, 0), (1, 1, 2), (2, 2, 2, 2), ())]


def brute_force(branch):
    """Sum over every completion of length up to LONGEST."""
    if JUDGE.done(branch.tokens):
        return float(JUDGE.right(branch, branch.tokens))
    total = 0.0
    for length in range(1, LONGEST - len(branch.tokens) + 1):
        for tail in itertools.product(range(V), repeat=length):
            tokens = branch.tokens + tail
            if not JUDGE.done(tokens) or any(JUDGE.done(tokens[:n]) for n in range(len(branch.tokens) + 1, len(tokens))):
                continue
            chance = math.prod(next_probabilities(branch.prompt_ids + tokens[:n])[tokens[n]] for n in range(len(branch.tokens), len(tokens)))
            total += chance * JUDGE.right(branch, tokens)
    return total


def test_enumeration_is_exact():
    for branch, found in zip(BRANCHES, exact_success(BRANCHES, fake_score, JUDGE, k=V, smallest=0.0), strict=True):
        assert found.rate == pytest.approx(brute_force(branch), abs=1e-6) and found.slack == pytest.approx(0.0, abs=1e-6)


def test_an_undecided_student_is_not_enumerated():
    assert exact_success(BRANCHES, fake_score, JUDGE, k=V, smallest=0.0, most=10) is None


@pytest.mark.parametrize(("k", "smallest"), [(2, 0.0), (V, 0.2), (2, 0.1)])
def test_what_was_given_up_bounds_the_error(k, smallest):
    found = exact_success(BRANCHES, fake_score, JUDGE, k=k, smallest=smallest)
    assert max(one.slack for one in found) > 0.01
    for branch, one in zip(BRANCHES, found, strict=True):
        assert abs(one.rate - brute_force(branch)) <= one.slack + 1e-6


def test_sampling_agrees_with_enumeration():
    exact = exact_success(BRANCHES, fake_score, JUDGE, k=V, smallest=0.0)
    sampled = sampled_success(BRANCHES, fake_generate, JUDGE, rollouts=2000, temperature=1.0, seed=3)
    for truth, one in zip(exact, sampled, strict=True):
        for estimate, count in ((one.rate, 2000), (one.halves[0], 1000), (one.halves[1], 1000)):
            assert abs(estimate - truth.rate) <= 4 * math.sqrt(max(truth.rate * (1 - truth.rate), 1e-9) / count) + 1e-9
        assert one.rate == pytest.approx(sum(one.halves) / 2)
    assert sampled == sampled_success(BRANCHES, fake_generate, JUDGE, rollouts=2000, temperature=1.0, seed=3)
