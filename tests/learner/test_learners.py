"""What holds for every learner: same update from torch and DeepSpeed, however samples are packed, and refused when it is not finite."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from pytest import approx, mark, raises
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from opd.learner.deepspeed_learner import deepspeed_learner
from opd.learner.packing import pack
from opd.learner.torch_learner import torch_learner
from opd.objective import build_objective, denominators
from tests.learner import cases
from tests.learner.cases import ALL_OBJECTIVES, answers, losses, optimizer, settings, tiny_model, train, weights_of


def ds(stage):
    return lambda *parts, **options: deepspeed_learner(*parts, zero_stage=stage, **options)


LEARNERS = {"torch": torch_learner, "zero0": ds(0), "zero1": ds(1), "zero2": ds(2), "zero3": ds(3)}
FEW = {name: LEARNERS[name] for name in ("torch", "zero0", "zero2")}


@pytest.fixture
def make():
    """Learners by name, closed after the test."""
    made = []

    def build(kind, model=None, *, optimizer_settings=None, **changes):
        made.append(LEARNERS[kind](model or tiny_model(), optimizer_settings or optimizer(), settings(**changes)))
        return made[-1]

    yield build
    for learner in made:
        learner.close()


@mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_the_bucket_of_gradients_is_no_larger_than_what_is_trained(make, kind):
    """DeepSpeed's default allocates 2 GB for adapters of a few megabytes."""
    learner = make(kind)
    trained = sum(value.numel() for value in weights_of(learner).values())
    assert learner._updater.module.optimizer.reduce_bucket_size == trained < 500_000_000


def gap(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@mark.parametrize("objective", ALL_OBJECTIVES)
def test_deepspeed_and_torch_take_the_same_five_steps(make, objective):
    """Bitwise at ZeRO 0: the clip is the same code. From ZeRO 1 on DeepSpeed's own clip differs by rounding."""
    plain, zero0, zero2 = make("torch"), make("zero0"), make("zero2")
    before = weights_of(plain)
    wanted = losses(train(plain, ALL_OBJECTIVES[objective], 5))
    assert losses(train(zero0, ALL_OBJECTIVES[objective], 5)) == wanted
    assert gap(weights_of(plain), weights_of(zero0)) == 0.0
    assert losses(train(zero2, ALL_OBJECTIVES[objective], 5)) == approx(wanted, abs=1e-5)
    assert gap(weights_of(plain), weights_of(zero2)) < 1e-4
    assert gap(before, weights_of(plain)) > 1e-3


def test_zero_3_takes_the_same_steps_with_an_untied_head(make):
    plain, zero3 = make("torch", tiny_model(tied=False)), make("zero3", tiny_model(tied=False))
    wanted = losses(train(plain, cases.HYBRID, 3))
    assert losses(train(zero3, cases.HYBRID, 3)) == approx(wanted, abs=1e-5)


@mark.parametrize("objective", ALL_OBJECTIVES)
@mark.parametrize("changes", [{"token_budget": 1}, {"token_budget": 4096, "packed": True}, {"token_budget": 40, "packed": True}], ids=str)
def test_how_answers_are_packed_changes_nothing(make, objective, changes):
    """One padded batch against one answer a micro-batch (gradient accumulation) and against packed rows; fp64, so only order differs."""
    one = make("torch", tiny_model(dtype=torch.float64), token_budget=4096)
    other = make("torch", tiny_model(dtype=torch.float64), **changes)
    teacher = tiny_model(5, dtype=torch.float64)
    wanted = train(one, ALL_OBJECTIVES[objective], 2, teacher_model=teacher)
    found = train(other, ALL_OBJECTIVES[objective], 2, teacher_model=teacher)
    assert losses(found) == approx(losses(wanted), abs=1e-6)
    assert gap(weights_of(one), weights_of(other)) < 1e-6
    for name in ("tokens/learner", "entropy/student"):
        assert found[0].meters[name].sum == approx(wanted[0].meters[name].sum, rel=1e-6)


@mark.parametrize("kind", FEW)
def test_gradient_checkpointing_changes_nothing(make, kind):
    plain, recomputing = make(kind), make(kind, gradient_checkpointing=True)
    assert losses(train(plain, cases.NLL, 2)) == losses(train(recomputing, cases.NLL, 2))
    assert gap(weights_of(plain), weights_of(recomputing)) == 0.0


def spoiled(samples, value):
    """The same samples, the first advantage of the first that has any replaced."""
    index = next(i for i, sample in enumerate(samples) if len(sample.advantage["policy"]) and sample.judged.completion.loss_mask[0])
    advantage = samples[index].advantage["policy"].clone()
    advantage[0] = value
    return [*samples[:index], replace(samples[index], advantage={"policy": advantage}), *samples[index + 1 :]]


def policy_samples(learner, seed=0):
    objective = build_objective(cases.GRPO)
    scorer = cases.teacher_of(tiny_model(5), objective)
    return cases.samples_for(learner, answers(seed=seed), objective, scorer), objective.at(0, {})


@mark.parametrize("kind", LEARNERS)
@mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_refused_and_leaves_no_trace(make, kind, value):
    clean, hit = make(kind), make(kind, ema_rate=0.5)
    samples, objective = policy_samples(clean)
    before = weights_of(hit)
    report = hit.step(spoiled(samples, value), objective, {})
    assert report.skipped == "the loss or its gradient is not finite" and report.meters["updates/skipped"].sum == 1
    assert gap(before, weights_of(hit)) == 0.0
    assert "gradient_norm" not in report.meters
    for learner in (clean, hit):
        later = learner.step(samples, objective, {})
        assert later.skipped == "" and later.meters["updates/skipped"].sum == 0
    assert gap(weights_of(clean), weights_of(hit)) == 0.0
    assert gap(before, weights_of(hit)) > 1e-3


@mark.parametrize("kind", LEARNERS)
def test_a_gradient_that_is_not_finite_is_refused_though_the_loss_is(make, kind):
    learner = make(kind)
    samples, objective = policy_samples(learner)
    before = weights_of(learner)
    norm_weight = learner.policy.model.model.norm.weight
    handle = norm_weight.register_hook(lambda gradient: gradient * float("nan"))
    report = learner.step(samples, objective, {})
    handle.remove()
    assert report.skipped and report.meters["loss/total"].mean == report.meters["loss/total"].mean
    assert gap(before, weights_of(learner)) == 0.0


@mark.parametrize("kind", FEW)
def test_the_gradient_is_clipped_and_its_norm_reported(make, kind):
    """With plain SGD-like first AdamW steps the clip is invisible, so two steps: the second moment remembers the clipped sizes."""
    loose, tight = make(kind, optimizer_settings=optimizer(clip=1e9)), make(kind, optimizer_settings=optimizer(clip=1e-3))
    found = [train(learner, cases.NLL, 1)[0].meters["gradient_norm"].mean for learner in (loose, tight)]
    assert found[0] == approx(found[1], rel=1e-5) and found[0] > 0.1
    assert gap(weights_of(loose), weights_of(tight)) > 1e-5


def test_the_reported_loss_is_the_mean_negative_log_likelihood(make):
    """By hand from the model's own logits."""
    learner = make("torch", optimizer_settings=optimizer(lr=1e-9))
    judged = answers(seed=0)
    total, count = 0.0, 0
    judged = [one for one in judged if one.completion.token_ids]
    for one in judged:
        ids = torch.tensor([[*one.prompt_ids, *one.completion.token_ids]])
        logp = learner.policy.model(ids).logits[0].log_softmax(-1)
        for n, token in enumerate(one.completion.token_ids):
            if one.completion.loss_mask[n]:
                total, count = total - logp[len(one.prompt_ids) + n - 1, token].item(), count + 1
    report = train(learner, cases.NLL, 1)[0]
    assert report.meters["loss/total"].mean == approx(total / count, abs=1e-5)
    assert report.meters["loss/total"].count == count
    assert report.meters["tokens/learner"].sum == sum(len(one.prompt_ids) + len(one.completion.token_ids) for one in judged)
    padding = report.meters["padding/learner"]
    assert padding.count - padding.sum == report.meters["tokens/learner"].sum and 0 < padding.mean < 1
    assert train(make("torch", packed=True), cases.NLL, 1)[0].meters["padding/learner"].sum == 0


FAMILIES = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0, **SHAPE)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"], **SHAPE)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SHAPE)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(logit_scale=0.5, **SHAPE)),
}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@mark.parametrize("family", FAMILIES)
def test_soft_caps_logit_scales_sliding_windows_and_padded_vocabularies_reach_the_loss(family):
    """By hand from the model's own logits over the 61 valid of 64 ids; packed rows give the same, before and after an update."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    judged = [one for one in answers() if one.completion.token_ids]
    total, count = 0.0, 0
    for one in judged:
        logits = model(torch.tensor([[*one.prompt_ids, *one.completion.token_ids]])).logits[0, :, : cases.VOCABULARY]
        logp = logits.log_softmax(-1)[len(one.prompt_ids) - 1 :]
        for n, token in enumerate(one.completion.token_ids):
            if one.completion.loss_mask[n]:
                total, count = total - logp[n, token].item(), count + 1
    found = []
    for packed in (False, True):
        learner = torch_learner(copy.deepcopy(model), optimizer(), settings(packed=packed), vocab_size=cases.VOCABULARY)
        found.append(losses(train(learner, cases.NLL, 2)))
        assert found[-1][0] == approx(total / count, abs=1e-5)
    assert found[0][1] == approx(found[1][1], abs=1e-4) and abs(found[0][1] - found[0][0]) > 1e-3


def test_learning_rate_follows_optimiser_steps(make):
    learner = make("torch", optimizer_settings=optimizer(lr=1.0e-3, warmup_steps=4), minibatches=2)
    reports = train(learner, cases.NLL, 2)
    assert [report.meters["learning_rate"].sum for report in reports] == approx([0.25e-3 + 0.5e-3, 0.75e-3 + 1e-3])


@mark.parametrize("kind", FEW)
def test_old_log_probs_are_those_before_the_first_of_several_updates(make, kind):
    """Two minibatches of GRPO: the first has ratio 1, the second has moved; one update a batch needs no preparation at all."""
    single, double = make(kind), make(kind, minibatches=2)
    needs = build_objective(cases.GRPO).needs
    assert single.prepare(answers(), needs) == [None] * 8
    prepared = double.prepare(answers(), needs)
    assert all(one.old_logp.shape == (len(judged.completion.token_ids),) for one, judged in zip(prepared, answers(), strict=True))
    report = train(double, cases.GRPO, 1)[0]
    assert abs(report.meters["ratio/policy"].mean - 1.0) > 1e-4


@mark.parametrize("kind", FEW)
def test_older_answers_are_read_with_the_present_weights(make, kind):
    """From the replay buffer or an asynchronous engine: with one update a batch, too, p_old is not what drew the tokens."""
    learner = make(kind)
    teacher_logratio = [{"policy": "reinforce", "advantage": "teacher_logratio", "weight": "sampler_ratio"}]
    whole, sampled = build_objective(cases.REVERSE_KL_FULL).needs, build_objective(teacher_logratio).needs
    plain = answers()
    kept = [replace(one, completion=replace(one.completion, source="replay")) for one in plain]
    late = [replace(one, completion=replace(one.completion, versions=((-1, 0, len(one.completion.token_ids)),))) for one in plain]
    for older in (kept, late):
        assert learner.prepare(older, whole) == [None] * 8, "nothing compares with what drew the tokens"
        for needs in (sampled, build_objective(cases.GRPO).needs):
            pairs = [(one.old_logp, judged.completion.logprobs) for one, judged in zip(learner.prepare(older, needs), older, strict=True)]
            assert all((now - then).abs().max() > 0.1 for now, then in pairs if now.numel())
    assert learner.prepare(plain, sampled) == [None] * 8


def test_student_topk_ids_start_with_the_sampled_token(make):
    learner = make("torch")
    judged = answers()
    for one, found in zip(judged, learner.prepare(judged, build_objective(cases.STUDENT_TOPK).needs), strict=True):
        assert found.topk_ids.shape == (len(one.completion.token_ids), 6)
        assert tuple(found.topk_ids[:, 0].tolist()) == one.completion.token_ids
        assert torch.equal(found.topk_logp[:, 0], found.old_logp)


@mark.parametrize("kind", ["torch", "zero0"])
def test_when_memory_runs_out_the_minibatch_is_replayed_in_smaller_pieces(make, kind, monkeypatch):
    calm, tight = make(kind, token_budget=64), make(kind, token_budget=64)
    wanted = train(calm, cases.NLL, 2)
    sizes = []
    plain_forward = type(tight.policy).forward

    def forward(self, layout, request):
        sizes.append(layout.input_ids.numel())
        if sizes[-1] > 32:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return plain_forward(self, layout, request)

    monkeypatch.setattr(type(tight.policy), "forward", forward)
    found = train(tight, cases.NLL, 2)
    assert tight.token_budget == 32 and max(sizes) > 32
    assert [report.meters["learner/replays"].sum for report in found] == [1.0, 0.0]
    assert losses(found) == approx(losses(wanted), abs=1e-5)
    assert gap(weights_of(calm), weights_of(tight)) < 1e-4


def test_memory_that_runs_out_in_the_backward_pass_leaves_no_half_gradient(make, monkeypatch):
    calm, tight = make("torch"), make("torch")
    wanted = losses(train(calm, cases.NLL, 1))
    plain_backward, calls = type(tight._updater).backward, []

    def backward(self, loss):
        plain_backward(self, loss)
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected after the gradient was added")

    monkeypatch.setattr(type(tight._updater), "backward", backward)
    assert losses(train(tight, cases.NLL, 1)) == approx(wanted, abs=1e-5)
    assert gap(weights_of(calm), weights_of(tight)) < 1e-4


def test_memory_that_does_not_suffice_for_one_sequence_is_an_error_with_a_fix(make, monkeypatch):
    learner = make("torch")

    def forward(self, layout, request):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(type(learner.policy), "forward", forward)
    with raises(ValueError, match="single sequence of .* tokens"):
        train(learner, cases.NLL, 1)


@mark.parametrize("kind", ["torch", "zero0"])
def test_another_error_is_not_swallowed(make, kind, monkeypatch):
    learner = make(kind)

    def forward(self, layout, request):
        raise RuntimeError("something else")

    monkeypatch.setattr(type(learner.policy), "forward", forward)
    with raises(RuntimeError, match="something else"):
        train(learner, cases.NLL, 1)


def test_a_tied_head_is_sent_once_and_an_untied_one_by_name(make):
    tied, untied = make("torch"), make("torch", tiny_model(tied=False))
    names = list(weights_of(tied))
    assert "lm_head.weight" not in names and names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" in weights_of(untied)
    assert len(names) == len(set(names)) == len(list(tiny_model().named_parameters()))


def test_dropout_is_off_while_training(make):
    learner = make("torch")
    learner.policy.train()
    assert all(layer.self_attn.attention_dropout == 0.0 for layer in learner.policy.model.model.layers)


@mark.parametrize("kind", FEW)
def test_bf16_weights_are_trained_through_fp32_masters(make, kind):
    """Updates far below bf16's resolution of 1/256 must add up: 12 steps of lr 1e-4 on weights of size 1."""
    learner = make(kind, tiny_model(dtype=torch.bfloat16), optimizer_settings=optimizer(lr=1e-4))
    train(learner, cases.NLL, 12)
    assert weights_of(learner)["model.norm.weight"].dtype == torch.bfloat16
    master = next(tensor for name, tensor in learner._updater.masters().items() if name.endswith("model.norm.weight"))
    assert master.dtype == torch.float32
    assert (master - 1.0).abs().max() > 5e-4


def test_micro_batches_share_one_denominator():
    objective = build_objective(cases.NLL).at(0, {})
    judged = answers()
    learner = torch_learner(tiny_model(), optimizer(), settings())
    samples = cases.samples_for(learner, judged, objective, cases.teacher_of(tiny_model(), objective))
    for budget in (1, 30, 4096):
        batches = pack(samples, signals=(), token_budget=budget, packed=False, temperature=1.0, pad_id=0)
        assert denominators(objective, batches, lambda x: x)["nll"] == sum(int(one.completion.loss_mask.sum()) for one in judged)


@mark.parametrize("kind", ["torch", "zero0", "zero1", "zero2"])
def test_closed_learners_leave_nothing_behind(kind):
    """At ZeRO 3 DeepSpeed itself keeps the last modules in registries of its own."""
    alive = []
    for _ in range(3):
        model = tiny_model()
        learner = LEARNERS[kind](model, optimizer(), settings(ema_rate=0.1))
        train(learner, cases.NLL, 1)
        learner.close()
        alive.append(weakref.ref(model))
        del learner, model
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


def test_a_model_without_anything_to_train_is_refused():
    with raises(ValueError, match="nothing to train"):
        torch_learner(tiny_model().requires_grad_(False), optimizer(), settings())
