"""Save, load, go on: bitwise; and the folder that others load."""

import pytest
import torch
from pytest import mark, raises
from transformers import AutoModelForCausalLM

from opd.learner.deepspeed_learner import deepspeed_learner
from opd.learner.lora import add_lora
from opd.learner.torch_learner import torch_learner
from tests.learner import cases
from tests.learner.cases import losses, optimizer, settings, tiny_model, train, weights_of

LEARNERS = {"torch": torch_learner} | {
    f"zero{stage}": lambda *parts, stage=stage: deepspeed_learner(*parts, zero_stage=stage) for stage in range(4)
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 2]])


@pytest.fixture
def make():
    made = []

    def build(kind, *, dtype=torch.float32, seed=0, lora=False, **changes):
        model = tiny_model(seed, dtype=dtype)
        if lora:
            add_lora(model, rank=4, alpha=8.0, targets="all-linear", seed=0)
        rate = optimizer(schedule="cosine", warmup_steps=2, total_steps=12)
        made.append(LEARNERS[kind](model, rate, settings(**{"ema_rate": 0.1, "minibatches": 2, **changes})))
        return made[-1]

    yield build
    for learner in made:
        learner.close()


@mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@mark.parametrize("kind", LEARNERS)
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(make, tmp_path, kind, dtype):
    whole = make(kind, dtype=dtype)
    wanted = losses(train(whole, cases.HYBRID, 2))
    whole.save(tmp_path)
    torch.rand(7)
    state = torch.get_rng_state()
    wanted = losses(train(whole, cases.HYBRID, 3))
    resumed = make(kind, dtype=dtype, seed=3)
    resumed.load(tmp_path)
    assert resumed.version == 2 and not torch.equal(state, torch.get_rng_state())
    assert losses(train(resumed, cases.HYBRID, 3)) == wanted
    first, second = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensor, resumed._shadow.tensors[name]) for name, tensor in whole._shadow.tensors.items())
    masters = whole._updater.masters(), resumed._updater.masters()
    assert all(torch.equal(masters[0][name], masters[1][name]) for name in masters[0])


@mark.parametrize("kind", ["torch", "zero0", "zero2"])
def test_adapters_resume_bitwise_over_the_same_base(make, tmp_path, kind):
    whole = make(kind, lora=True)
    train(whole, cases.NLL, 2)
    whole.save(tmp_path)
    wanted = losses(train(whole, cases.NLL, 2))
    resumed = make(kind, lora=True)
    resumed.load(tmp_path)
    assert losses(train(resumed, cases.NLL, 2)) == wanted


@mark.parametrize("kind", ["torch", "zero0"])
def test_a_lowered_token_budget_is_remembered(make, tmp_path, kind):
    learner = make(kind)
    learner.token_budget = 24
    learner.save(tmp_path)
    resumed = make(kind)
    resumed.load(tmp_path)
    assert resumed.token_budget == 24


def test_an_average_that_the_recipe_does_not_want_is_refused(make, tmp_path):
    make("torch").save(tmp_path)
    with raises(ValueError, match="disagree on whether an EMA teacher is kept"):
        make("torch", ema_rate=None).load(tmp_path)


@mark.parametrize(("written", "read"), [("torch", "zero0"), ("zero2", "torch")])
def test_a_checkpoint_of_another_learner_is_refused(make, tmp_path, written, read):
    make(written).save(tmp_path)
    with raises(ValueError, match="resume with the learner.kind that wrote it"):
        make(read).load(tmp_path)


@mark.parametrize("tied", [True, False])
@mark.parametrize("kind", LEARNERS)
def test_the_export_loads_as_a_plain_model_with_the_same_logits(tmp_path, kind, tied):
    learner = LEARNERS[kind](tiny_model(tied=tied), optimizer(), settings())
    train(learner, cases.NLL, 2)
    learner.export(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with learner._updater.whole_weights():
        assert torch.equal(loaded(IDS).logits, learner.policy.model(IDS).logits)
    assert (loaded(IDS).logits - tiny_model(tied=tied)(IDS).logits).abs().max() > 1e-3
    learner.close()
