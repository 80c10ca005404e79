import dataclasses
import math

import pytest
import torch
from opd_rollout.backbone import head_of, watch
from opd_rollout.cache import grouped_query_attention
from opd_rollout.sampling import request_seed
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import Completion, GenerateRequest, ModuleWeights, Sampling, ScoreRequest
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.rollout.models import FAMILIES, VOCAB, gemma2, llama, mistral, prompts, qwen3

BUDGET = 10_000


def _engine(model: nn.Module, **changes: object) -> TorchEngine:
    return TorchEngine(model, **{"pad_id": 0, "token_budget": BUDGET, **changes})


def _requests(texts: list[tuple[int, ...]], samples: int = 1) -> list[GenerateRequest]:
    return [
        GenerateRequest(prompt_ids=text, seed=request_seed(0, str(index), sample, 0))
        for index, text in enumerate(texts)
        for sample in range(samples)
    ]


def _tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def _hf_greedy(model: nn.Module, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    output = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
    return tuple(output[0, len(prompt) :].tolist())


class _Watch:
    """Shapes of the ids that the model's decoder was called with."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.get_decoder().register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_face(family: str) -> None:
    model = FAMILIES[family]()
    texts = prompts(7)
    completions = _engine(model).generate(_requests(texts), Sampling(temperature=0, max_tokens=12))
    assert _tokens(completions) == [_hf_greedy(model, text, 12) for text in texts]
    assert len(set(_tokens(completions))) > 1
    assert all(completion.logprobs.tolist() == [0.0] * 12 for completion in completions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 12)])
def test_greedy_with_equal_and_unequal_prompts(attention: str, lengths: tuple[int, int]) -> None:
    model = qwen3(attn_implementation=attention)
    texts = prompts(5, lengths)
    completions = _engine(model).generate(_requests(texts), Sampling(temperature=0, max_tokens=8))
    assert _tokens(completions) == [_hf_greedy(model, text, 8) for text in texts]
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_of_generate_equal_those_of_score(family: str, temperature: float) -> None:
    engine = _engine(FAMILIES[family]())
    requests = _requests(prompts(6), samples=3)
    completions = engine.generate(requests, Sampling(temperature=temperature, max_tokens=15, stop_ids=(5, 9)))
    asked = [
        ScoreRequest(context_ids=request.prompt_ids, completion_ids=completion.token_ids)
        for request, completion in zip(requests, completions, strict=True)
    ]
    for completion, scores in zip(completions, engine.score(asked, temperature), strict=True):
        torch.testing.assert_close(completion.logprobs, scores.sampled, rtol=0, atol=1e-5)
        assert completion.temperature == temperature


def test_same_seeds_give_the_same_bits_and_other_seeds_others() -> None:
    requests = _requests(prompts(4), samples=4)
    first = _engine(qwen3()).generate(requests, Sampling(max_tokens=12, stop_ids=(5,)))
    second = _engine(qwen3()).generate(requests, Sampling(max_tokens=12, stop_ids=(5,)))
    assert _tokens(first) == _tokens(second)
    assert all(torch.equal(one.logprobs, two.logprobs) for one, two in zip(first, second, strict=True))
    moved = [dataclasses.replace(request, seed=request.seed + 1) for request in requests]
    assert _tokens(_engine(qwen3()).generate(moved, Sampling(max_tokens=12, stop_ids=(5,)))) != _tokens(first)


def test_other_splits_and_orders_give_the_same_tokens_in_fp64() -> None:
    model = qwen3().double()
    requests = _requests(prompts(6), samples=3)
    sampling = Sampling(max_tokens=14, stop_ids=(5, 9, 13))
    whole = _engine(model).generate(requests, sampling)
    for budget in (1, 60, 130):
        split = _engine(model, token_budget=budget).generate(requests, sampling)
        assert _tokens(split) == _tokens(whole)
    backwards = _engine(model).generate(requests[::-1], sampling)
    assert _tokens(backwards[::-1]) == _tokens(whole)
    alone = [_engine(model).generate([request], sampling)[0] for request in requests]
    assert _tokens(alone) == _tokens(whole)
    assert len({len(completion.token_ids) for completion in whole}) > 3  # rows finished at different steps and were dropped


def test_a_seed_is_all_that_tells_samples_of_a_prompt_apart() -> None:
    prompt = prompts(1)[0]
    requests = [GenerateRequest(prompt_ids=prompt, seed=seed) for seed in (1, 2, 1)]
    first, second, third = _engine(qwen3().double()).generate(requests, Sampling(max_tokens=10))
    assert first.token_ids == third.token_ids != second.token_ids


def test_first_tokens_follow_the_models_distribution() -> None:
    model, prompt, count = qwen3(), prompts(1)[0], 4000
    requests = [GenerateRequest(prompt_ids=prompt, seed=request_seed(3, "p", sample, 0)) for sample in range(count)]
    completions = _engine(model, token_budget=10**6).generate(requests, Sampling(max_tokens=1, temperature=2.0))
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 2.0, dim=0) * count
    found = torch.bincount(torch.tensor(_tokens(completions)).flatten(), minlength=VOCAB)
    assert expected.min() > 2
    degrees = VOCAB - 1
    assert ((found - expected) ** 2 / expected).sum() < degrees + 4 * math.sqrt(2 * degrees)


def test_truncated_sampling_reports_the_truncated_distribution() -> None:
    model = llama()
    engine = _engine(model)
    requests = _requests(prompts(5), samples=4)
    completions = engine.generate(requests, Sampling(max_tokens=4, top_k=3, temperature=1.3))
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.tensor([request.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / 1.3, dim=-1)
        top, top_ids = logp.topk(3)
        token = torch.tensor(completion.token_ids)
        assert (top_ids == token[:, None]).any(dim=1).all()
        expected = logp.gather(1, token[:, None])[:, 0] - top.logsumexp(dim=1)
        torch.testing.assert_close(completion.logprobs, expected, rtol=0, atol=1e-5)


def test_a_stop_id_ends_a_completion_and_belongs_to_it() -> None:
    model = qwen3()
    texts = prompts(8)
    free = _engine(model).generate(_requests(texts), Sampling(max_tokens=12, temperature=0))
    stop = free[0].token_ids[4]
    stopped = _engine(model).generate(_requests(texts), Sampling(max_tokens=12, temperature=0, stop_ids=(stop, VOCAB - 1)))
    for before, after in zip(free, stopped, strict=True):
        ends = [index for index, token in enumerate(before.token_ids) if token in (stop, VOCAB - 1)]
        length = ends[0] + 1 if ends else 12
        assert after.token_ids == before.token_ids[:length]
        assert after.finish == ("stop" if ends else "length")
        assert after.loss_mask.tolist() == [True] * length
        assert after.logprobs.shape == (length,)
        assert after.versions == ((0, 0, length),)


def test_a_stop_id_as_the_last_allowed_token_counts_as_stop() -> None:
    model = qwen3()
    text = prompts(1)
    token = _engine(model).generate(_requests(text), Sampling(max_tokens=1, temperature=0))[0].token_ids[0]
    completion = _engine(model).generate(_requests(text), Sampling(max_tokens=1, temperature=0, stop_ids=(token,)))[0]
    assert (completion.token_ids, completion.finish) == ((token,), "stop")


def test_a_prompt_is_prefilled_once_for_all_its_samples() -> None:
    model = qwen3()
    engine, watch = _engine(model), _Watch(model)
    texts = prompts(3, (9, 9))
    engine.generate(_requests(texts, samples=5), Sampling(max_tokens=3))
    assert watch.shapes == [(3, 9), (15, 1), (15, 1)]


def test_finished_rows_are_dropped() -> None:
    model = qwen3()
    engine, watch = _engine(model), _Watch(model)
    completions = engine.generate(_requests(prompts(8), samples=8), Sampling(max_tokens=20, stop_ids=tuple(range(1, 12))))
    rows = [rows for rows, length in watch.shapes if length == 1]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 16
    still_open = [sum(len(completion.token_ids) > step + 1 for completion in completions) for step in range(len(rows))]
    assert all(row * 0.75 <= open_rows <= row for row, open_rows in zip(rows, still_open, strict=True))


def test_batches_stay_within_the_token_budget() -> None:
    model = qwen3()
    engine, watch = _engine(model, token_budget=100), _Watch(model)
    engine.generate(_requests(prompts(10), samples=3), Sampling(max_tokens=8))
    column = 0
    for rows, length in watch.shapes:
        column = length if length > 1 else column + 1
        assert rows * column <= 100
    assert max(rows for rows, _ in watch.shapes) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_the_model_that_gave_them_can_be_trained_with(family: str) -> None:
    model = FAMILIES[family]().train()
    [completion] = _engine(model).generate(_requests(prompts(1)), Sampling(max_tokens=6))
    weight = torch.ones(6, requires_grad=True)
    (weight * completion.logprobs).sum().backward()  # saves the log-probs for the backward pass, which inference tensors refuse
    assert torch.equal(weight.grad, completion.logprobs)
    model(input_ids=torch.tensor([completion.token_ids])).logits.square().sum().backward()
    assert all(parameter.grad is not None and not parameter.is_inference() for parameter in model.parameters())


def test_what_hooks_put_into_a_module_can_be_trained() -> None:
    model, seen = qwen3(), []

    def gather(module: nn.Module, args: tuple) -> None:
        seen.append(torch.is_inference_mode_enabled())
        module.weight.data = module.weight.data.clone()  # as ZeRO-3 does

    handle = model.get_decoder().norm.register_forward_pre_hook(gather)
    _engine(model).generate(_requests(prompts(1)), Sampling(max_tokens=3))
    handle.remove()
    assert seen and not any(seen)
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
    assert model.get_decoder().norm.weight.grad.abs().sum() > 0


def test_buffers_that_a_generation_makes_anew_are_ordinary_tensors() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    model = llama(rope_parameters=rope | {"original_max_position_embeddings": 8})
    before = model.get_decoder().rotary_emb.inv_freq.clone()
    _engine(model).generate(_requests(prompts(1)), Sampling(max_tokens=12))
    found = model.get_decoder().rotary_emb.inv_freq
    assert torch.allclose(found * 2, before)
    found.mul_(1)  # as a broadcast to other ranks does, which inference tensors refuse


def test_a_watch_is_asked_before_every_pass_and_changes_nothing_else() -> None:
    model, looks = qwen3(), []
    watch(model, lambda: looks.append(torch.is_inference_mode_enabled()))
    [completion] = _engine(model).generate(_requests(prompts(1)), Sampling(max_tokens=6))
    assert looks[:2] == [False, False] and looks[2:] == [True] * 6  # the head is checked; one prompt, five tokens
    model.get_decoder().norm.register_forward_pre_hook(lambda *_: None)
    again = _engine(model).generate(_requests(prompts(1)), Sampling(max_tokens=6))
    assert again[0].token_ids == completion.token_ids and looks[8:] == [False] * 8


def test_broken_weights_of_a_large_vocabulary_are_named() -> None:
    model = qwen3(vocab_size=5000, tie_word_embeddings=False)
    engine = _engine(model)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        engine.generate(_requests(prompts(1)), Sampling(max_tokens=3))


def test_mistral_heeds_its_window_whatever_layer_types_say() -> None:
    model = mistral(layer_types=["full_attention"] * 2)
    context, engine = prompts(1)[0], _engine(model)
    [completion] = engine.generate(_requests([context]), Sampling(max_tokens=20))
    [scores] = engine.score([ScoreRequest(context_ids=context, completion_ids=completion.token_ids, k=0)], 1.0)
    assert torch.allclose(completion.logprobs, scores.sampled, atol=1e-4)


def test_padded_columns_are_never_drawn() -> None:
    model = qwen3(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[30:] = model.lm_head.weight[7] * 2
    engine = _engine(model, vocab_size=30)
    requests = _requests(prompts(6), samples=4)
    completions = engine.generate(requests, Sampling(max_tokens=10, temperature=2.0))
    assert max(max(tokens) for tokens in _tokens(completions)) < 30
    greedy = engine.generate(requests, Sampling(max_tokens=10, temperature=0))
    for request, completion in zip(requests, greedy, strict=True):
        output = model.generate(
            torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=10, suppress_tokens=list(range(30, VOCAB)), pad_token_id=0
        )
        assert tuple(output[0, len(request.prompt_ids) :].tolist()) == completion.token_ids


def test_no_requests_give_no_completions() -> None:
    assert _engine(qwen3()).generate([], Sampling()) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (tuple([3] * 60), "request 1 has a prompt of 60 tokens, and with max_tokens 8 exceeds the model's 64 positions"),
        ((), "request 1 has an empty prompt"),
        ((3, VOCAB), f"request 1 holds a token id outside 0 to {VOCAB - 1}"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_before_any_work(prompt: tuple[int, ...], message: str) -> None:
    model = qwen3()
    engine, watch = _engine(model), _Watch(model)
    requests = [GenerateRequest(prompt_ids=(1, 2), seed=0), GenerateRequest(prompt_ids=prompt, seed=1)]
    with pytest.raises(ValueError, match=message):
        engine.generate(requests, Sampling(max_tokens=8))
    assert watch.shapes == []


def test_a_completion_may_use_the_last_position() -> None:
    completion = _engine(qwen3()).generate([GenerateRequest(prompt_ids=tuple([3] * 56), seed=0)], Sampling(max_tokens=8))[0]
    assert len(completion.token_ids) == 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite_are_reported(temperature: float) -> None:
    model = qwen3()
    engine = _engine(model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        engine.generate(_requests(prompts(2)), Sampling(max_tokens=4, temperature=temperature))


def test_a_shared_module_comes_back_as_it_was() -> None:
    model = qwen3()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    engine = _engine(model)
    engine.generate(_requests(prompts(2)), Sampling(max_tokens=3))
    engine.score([ScoreRequest(context_ids=(1, 2), completion_ids=(3,))], 1.0)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def _weights(model: nn.Module, version: int) -> ModuleWeights:
    return ModuleWeights(version=version, named=tuple(model.named_parameters()))


@pytest.mark.parametrize("make", [qwen3, llama])
def test_loaded_weights_speak_next(make: object) -> None:
    source, target = make(), make()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    requests, sampling = _requests(prompts(5)), Sampling(max_tokens=10)
    engine = _engine(target)
    before = engine.generate(requests, sampling)
    engine.load_weights(_weights(source, version=4))
    after = engine.generate(requests, sampling)
    assert _tokens(after) == _tokens(_engine(source).generate(requests, sampling)) != _tokens(before)
    assert {completion.versions for completion in after} == {((4, 0, 10),)}
    assert all(one.data_ptr() != two.data_ptr() for one, two in zip(source.parameters(), target.parameters(), strict=True))


def test_a_module_of_its_own_only_changes_the_version() -> None:
    model = qwen3()
    engine = _engine(model)
    counters = [parameter._version for parameter in model.parameters()]
    engine.load_weights(_weights(model, version=2))
    assert [parameter._version for parameter in model.parameters()] == counters
    assert engine.generate(_requests(prompts(1)), Sampling(max_tokens=2))[0].versions == ((2, 0, 2),)


def test_weights_that_do_not_fit_change_nothing() -> None:
    engine = _engine(llama())
    before = [parameter.clone() for parameter in engine.model.parameters()]
    whole = _weights(llama(), version=1)
    missing = dataclasses.replace(whole, named=whole.named[:-1])
    renamed = dataclasses.replace(whole, named=(*whole.named, ("model.extra", torch.zeros(1))))
    reshaped = dataclasses.replace(whole, named=(("model.embed_tokens.weight", torch.zeros(2, 2)), *whole.named[1:]))
    for wrong, message in ((missing, "missing"), (renamed, "model.extra"), (reshaped, "model.embed_tokens.weight has shape")):
        with pytest.raises(ValueError, match=message):
            engine.load_weights(wrong)
    assert engine.version == 0
    assert all(torch.equal(one, two) for one, two in zip(before, engine.model.parameters(), strict=True))


def test_tied_weights_may_arrive_under_either_name() -> None:
    source, engine = qwen3(), _engine(qwen3())
    with torch.no_grad():
        source.lm_head.weight.mul_(1.5)
    named = [("lm_head.weight" if name == "model.embed_tokens.weight" else name, tensor) for name, tensor in source.named_parameters()]
    engine.load_weights(ModuleWeights(version=1, named=tuple(named)))
    assert torch.equal(engine.model.get_input_embeddings().weight, source.lm_head.weight)


def test_layers_that_cannot_be_cached_are_refused() -> None:
    model = qwen3()
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        _engine(model)


def test_a_family_with_unknown_constants_is_refused() -> None:
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.1)
    with pytest.raises(ValueError, match="does more after its head"):
        _engine(model)


def test_attention_of_single_queries_equals_attention_over_repeated_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 1, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, 5, 8, generator=generator)
    mask = torch.zeros(3, 1, 1, 5)
    mask[1, ..., :2] = torch.finfo(torch.float32).min
    found, _ = grouped_query_attention(nn.Module(), query, key, value, mask, scaling=0.3)
    weights = (query @ key.repeat_interleave(3, dim=1).transpose(2, 3) * 0.3 + mask).softmax(dim=-1)
    expected = (weights @ value.repeat_interleave(3, dim=1)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_head_installed_by_a_learner_serves_the_engine() -> None:
    plain, model = gemma2(), gemma2()
    model.set_output_embeddings(head_of(model))
    requests, sampling = _requests(prompts(4)), Sampling(max_tokens=8)
    assert _tokens(_engine(model).generate(requests, sampling)) == _tokens(_engine(plain).generate(requests, sampling))


def test_an_adapter_speaks_through_the_engine() -> None:
    model = qwen3()
    requests, sampling = _requests(prompts(4)), Sampling(max_tokens=8, temperature=0)
    plain = _tokens(_engine(model).generate(requests, sampling))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)).eval()
    engine = _engine(adapted)
    assert _tokens(engine.generate(requests, sampling)) == plain  # the second factor starts at zero
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    changed = _tokens(engine.generate(requests, sampling))
    assert changed == [_hf_greedy(adapted, request.prompt_ids, 8) for request in requests] != plain
    engine.load_weights(_weights(adapted, version=1))
    assert engine.version == 1
