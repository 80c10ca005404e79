"""Tokens from two models: the law of each token enumerated, and an engine with a partner against both models' own scores."""

import pytest
import torch
from opd_rollout.mixing import Partner, interleave, mixture, teacher_only
from opd_rollout.sampling import request_seed
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import GenerateRequest, Sampling, ScoreRequest

from tests.rollout.models import VOCAB, prompts, qwen3

P, Q = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double(), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).double()


def test_a_mixture_by_hand():
    assert mixture(P.log(), Q.log(), share=0.2).exp()[0].tolist() == pytest.approx([0.42, 0.28, 0.18, 0.12])
    assert torch.equal(mixture(P.log(), Q.log(), share=0.0), P.log()) and torch.equal(mixture(P.log(), Q.log(), share=1.0), Q.log())


def test_interleaving_by_hand():
    """Teacher's top 2 are ids 2 and 3: the student keeps .15 and .05 there, and its other .8 are drawn by the teacher."""
    assert interleave(P.log(), Q.log(), k=2).exp()[0].tolist() == pytest.approx([0.08, 0.16, 0.15 + 0.24, 0.05 + 0.32])
    torch.testing.assert_close(interleave(P.log(), Q.log(), k=4), P.log())
    torch.testing.assert_close(interleave(P.log(), Q.log(), k=99), P.log())
    for k in (1, 2, 3):
        assert float(interleave(P.log(), Q.log(), k=k).exp().sum()) == pytest.approx(1.0)


def test_interleaving_is_what_proposing_and_replacing_does():
    """Each student token kept or replaced by each teacher token, summed."""
    for k in (1, 2, 3):
        top = set(Q[0].topk(k).indices.tolist())
        law = torch.zeros(4).double()
        for proposed, p in enumerate(P[0]):
            for drawn, q in enumerate(Q[0]):
                law[proposed if proposed in top else drawn] += p * q
        assert interleave(P.log(), Q.log(), k=k).exp()[0].tolist() == pytest.approx(law.tolist())


def answers(engine, sampling=Sampling(max_tokens=9)):  # noqa: B008
    requests = [
        GenerateRequest(prompt_ids=text, seed=request_seed(0, str(n), sample, 0)) for n, text in enumerate(prompts(5)) for sample in range(2)
    ]
    return engine.generate(requests, sampling), requests


def engine_of(model, **more):
    return TorchEngine(model, pad_id=0, token_budget=10_000, **more)


@pytest.fixture(scope="module")
def models():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = qwen3()
        torch.manual_seed(2)
        other = qwen3()
    for parameter in other.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter.shape))))
    return one, other


def mixed(models, mix):
    return engine_of(models[0], partner=Partner(model=models[1], mix=mix))


def test_a_partner_without_a_say_changes_nothing(models):
    plain, _ = answers(engine_of(models[0]))
    silent, _ = answers(mixed(models, lambda p, q: p))
    kept, _ = answers(mixed(models, lambda p, q: interleave(p, q, k=VOCAB)))
    assert [c.token_ids for c in plain] == [c.token_ids for c in silent] == [c.token_ids for c in kept]


def test_the_teacher_alone_is_the_teachers_own_engine(models):
    own, _ = answers(engine_of(models[1]))
    drawn, _ = answers(mixed(models, teacher_only))
    assert [c.token_ids for c in own] == [c.token_ids for c in drawn]
    assert [c.token_ids for c in drawn] != [c.token_ids for c in answers(engine_of(models[0]))[0]]


def test_log_probs_are_of_what_was_sampled_also_when_rows_end(models):
    def half(p, q):
        return mixture(p, q, share=0.5)

    free, _ = answers(mixed(models, half))
    stop = free[0].token_ids[2]
    completions, requests = answers(mixed(models, half), Sampling(max_tokens=9, stop_ids=(stop,), temperature=0.7))
    assert {c.finish for c in completions} == {"stop", "length"}
    scored = [ScoreRequest(context_ids=r.prompt_ids, completion_ids=c.token_ids) for r, c in zip(requests, completions, strict=True)]
    for completion, one, other in zip(completions, *(engine_of(model).score(scored, 0.7) for model in models), strict=True):
        expected = torch.logaddexp(one.sampled, other.sampled) - torch.tensor(2.0).log()
        torch.testing.assert_close(completion.logprobs, expected, rtol=0, atol=1e-4)


def test_two_models_have_no_greedy_token(models):
    with pytest.raises(ValueError, match="no greedy token"):
        answers(mixed(models, teacher_only), Sampling(temperature=0, max_tokens=2))
