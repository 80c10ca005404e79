"""Tiny models of several families, with weights large enough that their distributions are far from uniform."""

import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 48
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def qwen3(**changes: object) -> nn.Module:
    return _made(Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, **changes})


def llama(**changes: object) -> nn.Module:
    return _made(LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False, **changes})


def gemma(**changes: object) -> nn.Module:
    return _made(GemmaForCausalLM, GemmaConfig, {"num_key_value_heads": 1, **changes})


def gemma2(**changes: object) -> nn.Module:
    """Soft-capped logits and attention, sliding layers between full ones."""
    return _made(Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 6, "final_logit_softcapping": 3.0, **changes})


def gemma3(**changes: object) -> nn.Module:
    """A sliding layer, with rotary frequencies of its own, before a full one."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "query_pre_attn_scalar": 8}
    return _made(Gemma3ForCausalLM, Gemma3TextConfig, {**layers, **changes})


def mistral(**changes: object) -> nn.Module:
    """Every layer sliding, over 5 tokens."""
    return _made(MistralForCausalLM, MistralConfig, {"sliding_window": 5, **changes})


def granite(**changes: object) -> nn.Module:
    return _made(GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0, **changes}, drop=("head_dim",))


def cohere(**changes: object) -> nn.Module:
    return _made(CohereForCausalLM, CohereConfig, {"logit_scale": 0.25, **changes}, drop=("head_dim",))


FAMILIES = {
    "qwen3": qwen3,
    "llama": llama,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "mistral": mistral,
    "granite": granite,
    "cohere": cohere,
}


def _made(model: type, config: type, values: dict[str, object], drop: tuple[str, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    shape = {name: value for name, value in SHAPE.items() if name not in drop}
    made = model(config(**{**shape, **values})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25, generator=generator)
    return made


def prompts(count: int, lengths: tuple[int, int] = (3, 12), seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(1, VOCAB, (size,), generator=generator).tolist()) for size in sizes]
