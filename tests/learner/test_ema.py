"""The average of the weights: by hand, and as a teacher."""

import pytest
import torch
from opd_rollout.types import ScoreRequest
from pytest import approx, mark, raises

from opd.learner.deepspeed_learner import deepspeed_learner
from opd.learner.ema import Shadow
from opd.learner.torch_learner import torch_learner
from tests.learner import cases
from tests.learner.cases import optimizer, settings, tiny_model, train, weights_of

LEARNERS = {"torch": torch_learner} | {
    f"zero{stage}": lambda *parts, stage=stage: deepspeed_learner(*parts, zero_stage=stage) for stage in (0, 2, 3)
}
REQUESTS = [ScoreRequest(context_ids=(5, 6, 7), completion_ids=(8, 9, 2), hidden=True)]


def test_a_tick_by_hand():
    shadow = Shadow({"w": torch.tensor([1.0, 4.0])}, rate=0.25)
    shadow.tick({"w": torch.tensor([2.0, 0.0])})
    assert shadow.tensors["w"].tolist() == [1.25, 3.0]
    shadow.tick({"w": torch.tensor([2.0, 0.0])})
    assert shadow.tensors["w"].tolist() == approx([1.4375, 2.25])


def test_the_average_of_bf16_weights_is_fp32():
    shadow = Shadow({"w": torch.ones(1, dtype=torch.bfloat16)}, rate=0.001)
    shadow.tick({"w": torch.tensor([2.0], dtype=torch.bfloat16)})
    assert shadow.tensors["w"].dtype == torch.float32 and shadow.tensors["w"].item() == approx(1.001)


def test_a_rate_outside_zero_and_one_is_refused():
    with raises(ValueError, match="rate is 1.5"):
        Shadow({}, rate=1.5)


@pytest.fixture(params=LEARNERS)
def learner(request):
    made = LEARNERS[request.param](tiny_model(), optimizer(), settings(ema_rate=0.25, minibatches=2))
    yield made
    made.close()


def test_one_tick_a_rollout_step_whatever_the_number_of_updates(learner):
    start = weights_of(learner)
    train(learner, cases.NLL, 1)
    after_one = weights_of(learner)
    train(learner, cases.NLL, 1)
    after_two = weights_of(learner)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = 0.75 * (0.75 * start[name] + 0.25 * after_one[name]) + 0.25 * after_two[name]
    found = learner._updater.joined(f"model.{name}", learner._shadow.tensors[f"model.{name}"])
    assert torch.allclose(found, expected, atol=1e-6) and not torch.allclose(found, after_two[name], atol=1e-3)


def test_an_average_of_rate_one_every_two_steps_is_a_copy_that_is_renewed_every_other_step():
    learner = LEARNERS["torch"](tiny_model(), optimizer(), settings(ema_rate=1.0, ema_every=2))
    name, seen = "model.layers.0.mlp.up_proj.weight", [weights_of(learner)]
    for step in range(4):
        train(learner, cases.NLL, 1)
        seen.append(weights_of(learner))
        copied = seen[(step + 1) // 2 * 2][name]
        assert torch.equal(learner._shadow.tensors[f"model.{name}"], copied)
    assert not torch.equal(seen[2][name], seen[4][name])
    learner.close()


def test_the_averaged_teacher_scores_like_a_model_with_those_weights_and_the_student_is_untouched(learner):
    train(learner, cases.NLL, 2)
    before = weights_of(learner)
    [found] = learner.teacher_pass(REQUESTS, "ema")
    [live] = learner.teacher_pass(REQUESTS, "live")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(learner).items())
    other = tiny_model()
    average = {name.removeprefix("model."): learner._updater.joined(name, piece) for name, piece in learner._shadow.tensors.items()}
    other.load_state_dict(average, strict=False)
    other.tie_weights()
    logp = other(torch.tensor([[5, 6, 7, 8, 9, 2]])).logits[0, 2:5].log_softmax(-1)
    expected = logp[torch.arange(3), torch.tensor([8, 9, 2])]
    assert torch.allclose(found.sampled, expected, atol=1e-5)
    assert (found.sampled - live.sampled).abs().max() > 1e-3
    assert found.version == live.version == 2


def test_its_head_turns_its_hidden_states_into_its_scores(learner):
    train(learner, cases.NLL, 2)
    for weights in ("ema", "live"):
        [scores] = learner.teacher_pass(REQUESTS, weights)
        logits = scores.hidden @ learner.head(weights).weight.T
        assert torch.allclose(logits.log_softmax(-1)[torch.arange(3), torch.tensor([8, 9, 2])], scores.sampled, atol=1e-5)


def test_a_live_head_does_not_move_under_a_step_of_several_updates(learner):
    head = learner.head("live")
    kept = head.weight.clone()
    train(learner, cases.NLL, 1)
    assert torch.equal(head.weight, kept)


@mark.parametrize("weights", ["ema", "adapter_off"])
def test_weights_that_are_not_kept_are_refused(weights):
    plain = torch_learner(tiny_model(), optimizer(), settings())
    with raises(ValueError, match="set the learner's ema_rate|set model.lora"):
        plain.teacher_pass(REQUESTS, weights)
