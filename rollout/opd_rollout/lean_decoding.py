"""One more token of every row through a decoder of Llama's shape, in far fewer calls than its modules make.

A step of a small model costs its calls, not its arithmetic. Weights are the module's own, read at every step; what a family adds beyond this
shape (adapters, hooks, windows, other activations) keeps to the module.

Legend: B rows, D hidden size, Q query heads, H key-value heads, d their width, T positions.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from transformers.activations import SiLUActivation

from opd_rollout.backbone import Watch, has_hooks, watches
from opd_rollout.cache import GROUPED_ATTENTION, grouped_query_attention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on how long a sequence has become."""
_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, SiLUActivation, nn.SiLU)


class _Norm(NamedTuple):
    shape: tuple[int, ...]
    weight: Tensor
    eps: float


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One layer's own parameters."""

    module: nn.Module
    before_attention: _Norm
    query: _Linear
    key: _Linear
    value: _Linear
    query_norm: _Norm | None
    key_norm: _Norm | None
    out: _Linear
    width: int
    scale: float
    before_mlp: _Norm
    gate: _Linear
    up: _Linear
    down: _Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanDecoder:
    """A module's parameters as a step needs them, and cosines and sines [T, 1, d] of its positions (the sines' first half negated)."""

    watches: tuple[Watch, ...]
    embedding: Tensor
    layers: tuple[_Layer, ...]
    last_norm: _Norm
    cos: Tensor
    sin: Tensor


def lean_decoder(model: nn.Module, num_positions: int) -> LeanDecoder | None:
    """What `decode_token` needs for positions below num_positions; None where it would not give what the model's modules give.

    It does for fp32 models of FAMILIES with full attention and nothing put in, around or in the place of their modules.
    """
    config, decoder = model.config.get_text_config(), model.get_decoder()
    if (
        config.model_type not in FAMILIES
        or config._attn_implementation != GROUPED_ATTENTION
        or has_hooks(model)
        or not _is_plain(decoder, f"transformers.models.{config.model_type}.modeling_{config.model_type}")
        or decoder.rotary_emb.rope_type not in _FIXED_ROTATIONS
        or decoder.embed_tokens.max_norm is not None
        or torch.is_autocast_enabled(model.device.type)
    ):
        return None
    embedding = decoder.embed_tokens.weight
    cos, sin = decoder.rotary_emb(embedding[:1], torch.arange(num_positions, device=embedding.device).unsqueeze(0))
    half = sin.shape[-1] // 2
    return LeanDecoder(
        watches=watches(model),
        embedding=embedding,
        layers=tuple(map(_layer, decoder.layers[: config.num_hidden_layers])),
        last_norm=_norm(decoder.norm),
        cos=cos[0].unsqueeze(1),
        sin=torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1).unsqueeze(1),
    )


def _is_plain(decoder: nn.Module, home: str) -> bool:
    """Whether every part is what transformers defines in the module `home`, and every parameter an fp32 tensor on one device.

    Subclasses, adapters, quantised or parametrised layers, wrappers, and methods that somebody replaced are more than that.
    """
    for part in decoder.modules():
        if type(part) not in _PLAIN and not type(part).__module__ == type(part).forward.__module__ == home:  # decorated ones keep the name
            return False
    device = next(decoder.parameters()).device
    return all(type(one) is nn.Parameter and one.dtype == torch.float32 and one.device == device for one in decoder.parameters())


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    has_norms = hasattr(attention, "q_norm")
    return _Layer(
        module=attention,
        before_attention=_norm(layer.input_layernorm),
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        query_norm=_norm(attention.q_norm) if has_norms else None,
        key_norm=_norm(attention.k_norm) if has_norms else None,
        out=_linear(attention.o_proj),
        width=attention.head_dim,
        scale=attention.scaling,
        before_mlp=_norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
    )


def _norm(module: Any) -> _Norm:
    return _Norm(tuple(module.weight.shape), module.weight, module.variance_epsilon)


def _linear(module: Any) -> _Linear:
    return _Linear(module.weight, module.bias)


def decode_token(decoder: LeanDecoder, token_B: Tensor, position_B: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """Final hidden states [B, D] of one more token a row; its keys and values go into the cache. mask: additive [B, 1, 1, columns]."""
    for each in decoder.watches:
        each.look()
    cos, sin = decoder.cos[position_B], decoder.sin[position_B]
    hidden = decoder.embedding[token_B]
    for layer, kept in zip(decoder.layers, cache.layers, strict=True):
        hidden = hidden + _attention(layer, rms_norm(hidden, *layer.before_attention), cos, sin, kept, mask)
        normed = rms_norm(hidden, *layer.before_mlp)
        gated = silu(linear(normed, *layer.gate), inplace=True).mul_(linear(normed, *layer.up))
        hidden = hidden + linear(gated, *layer.down)
    return rms_norm(hidden, *decoder.last_norm)


def _attention(layer: _Layer, normed: Tensor, cos: Tensor, sin: Tensor, kept: Any, mask: Tensor | None) -> Tensor:
    shape = (len(normed), -1, layer.width)
    query, key = linear(normed, *layer.query).view(shape), linear(normed, *layer.key).view(shape)
    if layer.query_norm is not None and layer.key_norm is not None:
        query, key = rms_norm(query, *layer.query_norm), rms_norm(key, *layer.key_norm)
    half = layer.width // 2  # swapped, as the signs of the sines expect
    query = torch.addcmul(query * cos, query.roll(half, -1), sin)
    key = torch.addcmul(key * cos, key.roll(half, -1), sin)
    keys, values = kept.update(key.unsqueeze(2), linear(normed, *layer.value).view(shape).unsqueeze(2))
    attended, _ = grouped_query_attention(layer.module, query.unsqueeze(2), keys, values, mask, scaling=layer.scale)
    return linear(attended.flatten(1), *layer.out)
