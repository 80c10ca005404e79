"""Adapters: the frozen teacher without a second copy, and the merged student that others load."""

import pytest
import torch
from opd_rollout.backbone import has_hooks
from opd_rollout.types import ScoreRequest
from peft import PeftModel
from pytest import mark, raises
from transformers import AutoModelForCausalLM

from opd.learner.deepspeed_learner import deepspeed_learner
from opd.learner.lora import add_lora
from opd.learner.policy import Policy
from opd.learner.torch_learner import torch_learner
from tests.learner import cases
from tests.learner.cases import optimizer, settings, tiny_model, train, weights_of

LEARNERS = {"torch": torch_learner} | {
    f"zero{stage}": lambda *parts, stage=stage: deepspeed_learner(*parts, zero_stage=stage) for stage in (0, 2)
}
REQUESTS = [ScoreRequest(context_ids=(5, 6, 7), completion_ids=(8, 9, 2))]
IDS = torch.tensor([[5, 6, 7, 8, 9, 2]])


def adapted(seed=0):
    model = tiny_model()
    add_lora(model, rank=4, alpha=8.0, targets="all-linear", seed=seed)
    return model


@pytest.fixture(params=LEARNERS)
def learner(request):
    made = LEARNERS[request.param](adapted(), optimizer(), settings(merge_adapters=True, ema_rate=0.5))
    yield made
    made.close()


def test_only_the_factors_are_trained_and_the_frozen_teacher_is_the_base_bitwise(learner):
    [before] = learner.teacher_pass(REQUESTS, "live")
    train(learner, cases.NLL, 2)
    [off] = learner.teacher_pass(REQUESTS, "adapter_off")
    [live] = learner.teacher_pass(REQUESTS, "live")
    assert torch.equal(off.sampled, before.sampled) and off.version == 0
    assert (live.sampled - before.sampled).abs().max() > 1e-3
    trained = {name for name, parameter in learner.policy.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_distilling_from_the_adapter_off_teacher_starts_at_zero(learner):
    """Same weights, same context: no divergence before the first update."""
    objective = cases.build_objective(cases.REVERSE_KL_FULL)
    weights = cases.Weights(
        scores=lambda requests: learner.teacher_pass(requests, "adapter_off"), head=lambda: learner.head("adapter_off")
    )
    scorer = cases.SignalScorer({"main": weights}, objective.needs.signals)
    judged = cases.answers()
    prepared = learner.prepare(judged, objective.needs)
    scores = scorer.score(judged, {"main": [one.prompt_ids for one in judged]}, prepared)
    report = learner.step(cases.join(judged, prepared, scores, objective), objective.at(0, {}), scorer.heads())
    assert abs(report.meters["loss/total"].mean) < 1e-6


def test_the_merged_student_has_hugging_face_names_and_the_same_logits(learner, tmp_path):
    train(learner, cases.NLL, 2)
    expected = learner.policy.model(IDS).logits
    assert set(weights_of(learner)) == {name for name, _ in tiny_model().named_parameters()}
    other = tiny_model(9)
    other.load_state_dict(weights_of(learner), strict=False)
    other.tie_weights()
    assert torch.allclose(other(IDS).logits, expected, atol=1e-5)
    learner.export(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.allclose(loaded(IDS).logits, expected, atol=1e-5)
    assert torch.equal(learner.policy.model(IDS).logits, expected)


def test_the_averaged_factors_are_a_teacher(learner):
    train(learner, cases.NLL, 2)
    [ema], [live] = learner.teacher_pass(REQUESTS, "ema"), learner.teacher_pass(REQUESTS, "live")
    assert (ema.sampled - live.sampled).abs().max() > 1e-4
    assert torch.equal(learner.teacher_pass(REQUESTS, "live")[0].sampled, live.sampled)


def test_an_engine_that_shares_the_module_gets_its_own_parameters():
    learner = torch_learner(adapted(), optimizer(), settings())
    source = learner.weights(3)
    assert set(source.metadata().names) == {name for name, _ in learner.policy.model.named_parameters()} and source.version == 3


@mark.parametrize("seed", [0, 1])
def test_the_first_factor_is_drawn_from_the_seed_alone(seed):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = adapted(seed)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(456)
    second = adapted(seed)
    named = dict(second.named_parameters())
    assert all(torch.equal(parameter, named[name]) for name, parameter in first.named_parameters())


def test_adapters_on_the_head_are_refused():
    with raises(ValueError, match="lm_head"):
        add_lora(tiny_model(), rank=4, alpha=8.0, targets=["q_proj", "lm_head"], seed=0)


def test_the_adapters_alone_on_the_base_are_the_merged_export(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    learner = torch_learner(adapted(), optimizer(), settings(merge_adapters=True))
    train(learner, cases.NLL, 2)
    learner.export(tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run/adapter")
    expected, found = merged(IDS).logits, loaded(IDS).logits
    assert (expected - found).abs().max() < 1e-5 < (expected - base(IDS).logits).abs().max()
    learner.close()


def test_recomputed_activations_keep_adapters_gradients_and_leave_no_hook():
    """Over frozen embeddings; a hook would take generation off its lean step."""
    grads = []
    for recomputed in (False, True):
        model = adapted()
        Policy(model, gradient_checkpointing=recomputed).train()
        assert not has_hooks(model)
        model.get_decoder()(input_ids=IDS).last_hidden_state.square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert any(grad.abs().sum() > 0 for grad in grads[0])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
