"""The learner's weights in an engine: shared module, own module, sharded student."""

import pytest
import torch
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import GenerateRequest, Sampling, ScoreRequest
from pytest import mark

from opd.learner.deepspeed_learner import deepspeed_learner
from opd.learner.torch_learner import torch_learner
from tests.learner import cases
from tests.learner.cases import optimizer, settings, tiny_model, train

LEARNERS = {"torch": torch_learner} | {
    f"zero{stage}": lambda *parts, stage=stage: deepspeed_learner(
        *parts, zero_stage=stage, zero_options={"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    )
    for stage in (0, 2, 3)
}
REQUESTS = [ScoreRequest(context_ids=(5, 6, 7), completion_ids=(8, 9, 2))]


def engine_over(model) -> TorchEngine:
    return TorchEngine(model, pad_id=0, token_budget=512)


@pytest.fixture(params=LEARNERS)
def learner(request):
    made = LEARNERS[request.param](tiny_model(), optimizer(), settings())
    yield made
    made.close()


def test_an_engine_with_its_own_module_follows_the_student(learner):
    engine = engine_over(tiny_model(4))
    for _ in range(2):
        train(learner, cases.NLL, 1)
        engine.load_weights(learner.weights(learner.version))
        [live] = learner.teacher_pass(REQUESTS, "live")
        [found] = engine.score(REQUESTS, 1.0)
        assert torch.equal(found.sampled, live.sampled)
        assert engine.version == learner.version


@mark.parametrize("kind", ["torch", "zero0", "zero2"])
def test_an_engine_that_shares_the_module_follows_without_a_copy(kind):
    model = tiny_model()
    learner = LEARNERS[kind](model, optimizer(), settings())
    engine = engine_over(model)
    request, greedy = [GenerateRequest(prompt_ids=(5, 6, 7), seed=1)], Sampling(temperature=0.0, max_tokens=8)
    before = engine.generate(request, greedy)[0].token_ids
    train(learner, cases.NLL, 6)
    engine.load_weights(learner.weights(learner.version))
    [completion] = engine.generate(request, greedy)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 3:]
    assert completion.token_ids == tuple(expected.tolist()) != before
    assert completion.versions == ((6, 0, 8),)
    learner.close()
