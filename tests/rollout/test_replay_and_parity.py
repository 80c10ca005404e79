import dataclasses

import pytest
import torch
from opd_rollout.backbone import head_of
from opd_rollout.parity import audit, logprob_gap
from opd_rollout.replay_engine import ReplayEngine
from opd_rollout.scoring import score_tokens
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import GenerateRequest, ModuleWeights, Sampling, ScoreRequest, TokenScores

from tests.rollout.models import prompts, qwen3

STORED = [((1, 2), (3, 4, 9)), ((5,), (6, 9)), ((1, 2), (7, 9))]


def _ask(*texts: tuple[int, ...]) -> list[GenerateRequest]:
    return [GenerateRequest(prompt_ids=text, seed=index) for index, text in enumerate(texts)]


def test_stored_completions_are_served_by_prompt_in_order_and_again() -> None:
    engine = ReplayEngine(STORED)
    first = engine.generate(_ask((1, 2), (5,), (1, 2)), Sampling())
    assert [completion.token_ids for completion in first] == [(3, 4, 9), (6, 9), (7, 9)]
    assert [completion.token_ids for completion in engine.generate(_ask((1, 2)), Sampling())] == [(3, 4, 9)]


def test_nobody_sampled_a_stored_completion() -> None:
    completion = ReplayEngine(STORED).generate(_ask((1, 2)), Sampling(temperature=0.7))[0]
    assert completion.source == "dataset"
    assert completion.logprobs.isnan().all()
    assert completion.logprobs.shape == (3,)
    assert (completion.finish, completion.versions) == ("stop", ())
    assert completion.loss_mask.tolist() == [True] * 3


def test_a_long_stored_completion_is_cut() -> None:
    completion = ReplayEngine(STORED).generate(_ask((1, 2)), Sampling(max_tokens=2))[0]
    assert (completion.token_ids, completion.finish) == ((3, 4), "length")


def test_an_unknown_prompt_is_refused_and_nothing_is_used_up() -> None:
    engine = ReplayEngine(STORED)
    with pytest.raises(ValueError, match="request 1: nothing is stored"):
        engine.generate(_ask((1, 2), (8, 8)), Sampling())
    assert engine.generate(_ask((1, 2)), Sampling())[0].token_ids == (3, 4, 9)


def test_replay_takes_part_in_weight_updates_and_cannot_score() -> None:
    engine = ReplayEngine(STORED)
    engine.load_weights(ModuleWeights(version=1, named=()))
    with pytest.raises(ValueError, match="holds no model"):
        engine.score([ScoreRequest(context_ids=(1,), completion_ids=(2,))], 1.0)


def _audit(scale: float) -> object:
    model, other = qwen3(), qwen3()
    with torch.no_grad():
        other.get_decoder().norm.weight.mul_(scale)

    def score(requests: list[ScoreRequest], temperature: float) -> list[TokenScores]:
        return score_tokens(other, head_of(other), requests, temperature=temperature, token_budget=500, version=0)

    requests = [GenerateRequest(prompt_ids=text, seed=index) for index, text in enumerate(prompts(8))]
    return audit(TorchEngine(model, pad_id=0, token_budget=500), score, requests, Sampling(max_tokens=10, temperature=0.9))


def test_the_audit_passes_equal_models_and_catches_a_drifted_one() -> None:
    equal, drifted = _audit(1.0), _audit(1.05)
    assert equal.num_tokens == 80
    assert equal.mean <= equal.max < 1e-5
    assert drifted.max > drifted.mean > 1e-2


def test_the_gap_by_hand_and_without_unsampled_tokens() -> None:
    engine = TorchEngine(qwen3(), pad_id=0, token_budget=500)
    completion = engine.generate(_ask((3, 4)), Sampling(max_tokens=3))[0]
    scores = engine.score([ScoreRequest(context_ids=(3, 4), completion_ids=completion.token_ids)], 1.0)[0]
    moved = dataclasses.replace(scores, sampled=completion.logprobs + torch.tensor([0.5, -0.25, 7.0]))
    unsampled = dataclasses.replace(completion, logprobs=completion.logprobs * torch.tensor([1.0, 1.0, float("nan")]))
    gap = logprob_gap([unsampled], [moved])
    assert (gap.mean, gap.max, gap.num_tokens) == (pytest.approx(0.375, abs=1e-6), pytest.approx(0.5, abs=1e-6), 2)


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.9}])
def test_distributions_that_cannot_be_compared_are_refused(values: dict[str, float]) -> None:
    engine = TorchEngine(qwen3(), pad_id=0, token_budget=500)
    with pytest.raises(ValueError, match="compares whole distributions"):
        audit(engine, engine.score, _ask((3, 4)), Sampling(**values))
