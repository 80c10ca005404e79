"""The Head in the place of an lm_head: plain logits, tied, frozen, padded and adapter-wrapped models, weights freed between passes."""

import opd_kernels
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.kernels.cases import relative
from tests.kernels.head_models import TinyModel, expected_gradients, loss_of

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip


def qwen(tied: bool):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied)).eval()


def put_head(model, **constants) -> opd_kernels.Head:
    model.lm_head = opd_kernels.Head.from_lm_head(model.lm_head, **constants)
    return model.lm_head


@pytest.mark.parametrize("tied", [False, True])
def test_plain_logits_and_names_do_not_change(tied):
    model, tokens = qwen(tied), torch.arange(10)[None]
    names, before = list(model.state_dict()), model(input_ids=tokens).logits
    weight = model.lm_head.weight
    put_head(model)
    assert model.lm_head.weight is weight and list(model.state_dict()) == names
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_transformer_equal_the_logits_way(tied):
    tokens, ids = torch.randint(0, 64, (2, 9)), torch.randint(0, 64, (18, 4))
    eager, ours = qwen(tied), qwen(tied)
    logits = eager(input_ids=tokens).logits.flatten(0, 1)
    logits.log_softmax(dim=1).gather(1, ids).sum().backward()
    head = put_head(ours)
    hidden = ours.model(input_ids=tokens).last_hidden_state.flatten(0, 1)
    loss = head(hidden, lambda h, view: opd_kernels.selected_logprobs(h, view.weight, ids, **view.keywords()).logp.sum())
    loss.backward()
    for (name, wanted), actual in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert relative(actual.grad, wanted.grad) < 1e-5, name


def test_gemma_softcap_reaches_requests_and_not_plain_logits():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.05, query_pre_attn_scalar=16)).eval()
    tokens, ids = torch.arange(8)[None], torch.arange(24).view(8, 3)
    before = model(input_ids=tokens).logits
    head = put_head(model, softcap=model.config.final_logit_softcapping)
    assert torch.equal(model(input_ids=tokens).logits, before)
    hidden = model.model(input_ids=tokens).last_hidden_state[0]
    logp = head(hidden, lambda h, view: opd_kernels.selected_logprobs(h, view.weight, ids, **view.keywords()).logp)
    torch.testing.assert_close(logp, before[0].log_softmax(dim=1).gather(1, ids), rtol=0, atol=1e-5)


def test_lora_on_the_body_leaves_a_frozen_head_without_gradient():
    model = qwen(tied=False)
    put_head(model)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tokens, ids = torch.arange(9)[None], torch.randint(0, 64, (9, 2))
    head = lora.base_model.model.lm_head
    hidden = lora.base_model.model.model(input_ids=tokens).last_hidden_state[0]
    loss = head(hidden, lambda h, v: opd_kernels.fused_sparse_loss(h, v.weight, ids, lambda s: (s.logp.sum(), {}), **v.keywords())[0])
    loss.backward()
    assert not head.weight.requires_grad and head.weight.grad is None
    trained = {name: p.grad for name, p in lora.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and grad is not None for name, grad in trained.items())
    reference = torch.autograd.grad(
        lora(input_ids=tokens).logits[0].log_softmax(dim=1).gather(1, ids).sum(), [p for p in lora.parameters() if p.requires_grad]
    )
    assert all(relative(actual, wanted) < 1e-5 for actual, wanted in zip(trained.values(), reference, strict=True))


def test_an_adapter_on_the_head_is_refused():
    lora = get_peft_model(qwen(tied=False), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="merge or drop an adapter on the head"):
        opd_kernels.Head.from_lm_head(lora.base_model.model.lm_head)


@pytest.mark.parametrize("kind", ["composable", "fused", "dense"])
def test_a_padded_head_learns_nothing_in_its_padding(kind):
    grads = expected_gradients(kind, 1)
    assert grads["lm_head.weight"][:90].any() and not grads["lm_head.weight"][90:].any() and not grads["lm_head.bias"][90:].any()


@pytest.mark.parametrize("kind", ["composable", "fused", "dense"])
def test_a_frozen_head_passes_the_gradient_on(kind):
    frozen, free = expected_gradients(kind, 1, frozen_head=True), expected_gradients(kind, 1)
    assert set(free) - set(frozen) == {"lm_head.weight", "lm_head.bias"}
    assert all(relative(grad, free[name]) < 1e-6 for name, grad in frozen.items())


@pytest.mark.parametrize("kind", ["composable", "fused", "dense"])
def test_a_weight_emptied_between_the_passes(kind):
    """What ZeRO-3 does: the Parameter's data is replaced by nothing after forward and brought back before backward."""
    model = TinyModel()
    loss = loss_of(model, kind, 0)
    weight = model.lm_head.weight
    full, weight.data = weight.data, torch.empty(0)
    weight.data = full.clone()
    loss.backward()
    wanted = expected_gradients(kind, 1)
    assert all(torch.equal(parameter.grad, wanted[name]) for name, parameter in model.named_parameters())


def test_what_a_runtime_cannot_see_is_refused():
    head = opd_kernels.Head(nn.Parameter(torch.randn(5, 3)))
    ids = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="the request returned a SelectedLogprobs; return tensors"):
        head(torch.randn(2, 3), lambda h, view: opd_kernels.selected_logprobs(h, view.weight, ids))
    visible = head(torch.randn(2, 3), lambda h, view: {"a": [h, (None, h)]})
    assert visible["a"][0] is visible["a"][1][1]
