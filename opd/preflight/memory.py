"""How much memory each role of a run needs, from a model's configuration alone. Bytes everywhere.

What training keeps for the backward pass is not estimated: one layer of the real widths runs on the CPU for a few tokens, and the tensors
that autograd saves are counted. The rest is arithmetic.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from opd.build.pretrained import num_experts
from opd.learner.types import LARGEST_BUCKET
from opd.timing.flops import Products

COUNTED_TOKENS = 16
ALL_LINEAR = "all-linear"
DEEPSPEED_LIVE = 1_000_000_000
"""Weights that ZeRO 3 keeps gathered, at most: DeepSpeed's default."""
VLLM_BUFFER = 512 << 20  # opd_rollout.vllm_sending.BUFFER_BYTES, which needs vLLM to be read


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model is made of. trainable: parameters that learn (all, or the adapters). item: bytes of a weight.

    saved_per_token, checkpoint_per_token: bytes that a training forward keeps for every token, without and with gradient checkpointing;
    layer_per_token: of one layer. cache_per_token: keys and values. products: where the weights multiply; all experts of a mixture.
    """

    parameters: int
    trainable: int
    layers: int
    hidden: int
    vocabulary: int
    item: int
    saved_per_token: int
    layer_per_token: int
    checkpoint_per_token: int
    cache_per_token: int
    products: Products


def model_facts(config: Any, dtype: torch.dtype, *, lora_rank: int = 0, targets: str | Sequence[str] = ALL_LINEAR) -> ModelFacts:
    """Counts a configuration's parameters on the meta device and its activations on one real layer; no weight is made.

    lora_rank: of adapters on the layers that `targets` names, 0 for none.
    """
    text, item = config.get_text_config(), dtype.itemsize
    layers = text.num_hidden_layers
    outline = _outline(config, dtype)
    adapters = _adapters(outline, lora_rank, targets)
    parameters = sum(p.numel() for p in outline.parameters())
    one, two = (_saved(config, dtype, depth) for depth in (1, 2))
    layer = (two - one) // COUNTED_TOKENS
    outside = max(0, one // COUNTED_TOKENS - layer)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return ModelFacts(
        parameters=parameters,
        trainable=adapters if lora_rank else parameters,
        layers=layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        item=item,
        saved_per_token=outside + layers * layer,
        layer_per_token=layer,
        checkpoint_per_token=outside + layers * text.hidden_size * item,
        cache_per_token=2 * layers * heads * head_dim * item,
        products=_products(config, outline, adapters),
    )


def learner_memory(
    model: ModelFacts, *, ranks: int, zero_stage: int, average: bool, micro_tokens: int, checkpointing: bool, chunk_bytes: int
) -> dict[str, int]:
    """Bytes on one learner rank, by what they hold. Weights below fp32 train with fp32 masters and fp32 gradients (ZeRO 1 at least)."""
    stage = max(1, zero_stage) if model.item < 4 else zero_stage
    shares = {part: ranks if stage >= lowest else 1 for part, lowest in (("weights", 3), ("gradients", 2), ("optimizer", 1))}
    masters = 0 if model.item == 4 else 4
    kept = model.checkpoint_per_token + model.layer_per_token if checkpointing else model.saved_per_token + model.layer_per_token
    return {
        "weights": model.parameters * model.item // shares["weights"],
        "gradients": model.trainable * 4 // shares["gradients"],
        "optimizer": model.trainable * (8 + masters) // shares["optimizer"],
        "average": model.trainable * 4 if average else 0,
        "activations": micro_tokens * kept,
        "head": min(chunk_bytes, 3 * micro_tokens * model.vocabulary * 4) + micro_tokens * model.hidden * (4 + model.item),
    }


def sync_buffers(model: ModelFacts, *, zero_stage: int, transfer: str) -> int:
    """Bytes that one DeepSpeed rank holds for what it sends: gradients on their way to their owners, gathered weights (ZeRO 3), weights for vLLM.

    transfer: engine.transfer where there are actors, else "".
    """
    bucket = min(LARGEST_BUCKET, model.trainable)
    stage = max(1, zero_stage) if model.item < 4 else zero_stage
    gradients = bucket * (model.item if stage == 2 else 4) if stage else 0
    gathered = min(DEEPSPEED_LIVE, model.parameters) * model.item if stage == 3 else 0
    return gradients + gathered + {"nccl": 2, "ipc": 1}.get(transfer, 0) * VLLM_BUFFER


def engine_memory(model: ModelFacts, *, rows: int, tokens: int, own_weights: bool) -> dict[str, int]:
    """Bytes of a rollout engine that decodes `rows` sequences of up to `tokens` tokens; its weights are the learner's unless own_weights."""
    return {
        "weights": model.parameters * model.item if own_weights else 0,
        "cache": rows * tokens * model.cache_per_token,
        "logits": rows * model.vocabulary * 4 * 3,
    }


def teacher_memory(model: ModelFacts, *, own_weights: bool, micro_tokens: int, num_tokens: int, hidden: bool, chunk_bytes: int) -> dict[str, int]:
    """Bytes of a scorer: its weights, one layer's activations of a pass, and the hidden states it hands over for support "full"."""
    return {
        "weights": model.parameters * model.item if own_weights else 0,
        "activations": micro_tokens * (model.layer_per_token + 4 * model.hidden * model.item),
        "hand-over": num_tokens * model.hidden * model.item if hidden else 0,
        "head": chunk_bytes,
    }


def total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def products(config: Any, *, lora_rank: int = 0) -> Products:
    """Where the weights of a configuration multiply; no weight is made. Raises ValueError for experts, of which a token meets only some."""
    if experts := num_experts(config):
        raise ValueError(f"a mixture of {experts} experts: how many weights a token meets is not counted")
    outline = _outline(config, torch.float32)
    return _products(config, outline, _adapters(outline, lora_rank))


def _outline(config: Any, dtype: torch.dtype) -> Any:
    """The modules of a configuration without memory for their weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def untargeted(config: Any, targets: str | Sequence[str]) -> list[str]:
    """Those of peft's target names that no linear layer of the configuration answers to."""
    layers = _linear(_outline(config, torch.float32))
    given = [targets] if isinstance(targets, str) else list(targets)
    return [name for name in given if not any(_is_target(layer, targets if isinstance(targets, str) else [name]) for layer in layers)]


def linear_names(config: Any) -> list[str]:
    """The last names of the linear layers, as peft's target_modules may name them."""
    return sorted({layer.rpartition(".")[2] for layer in _linear(_outline(config, torch.float32))})


def _adapters(outline: Any, rank: int, targets: str | Sequence[str] = ALL_LINEAR) -> int:
    """Parameters of LoRA factors of that rank on the layers that `targets` names."""
    return sum(rank * (m.in_features + m.out_features) for name, m in _linear(outline).items() if _is_target(name, targets))


def _linear(outline: Any) -> dict[str, torch.nn.Linear]:
    """Name -> every linear layer but the head."""
    head = outline.get_output_embeddings()
    return {name: m for name, m in outline.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def _is_target(layer: str, targets: str | Sequence[str]) -> bool:
    """As peft reads target_modules: all, a pattern for whole names, or a list of last names."""
    if isinstance(targets, str):
        return targets == ALL_LINEAR or re.fullmatch(targets, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in targets)


def _products(config: Any, outline: Any, adapters: int) -> Products:
    text, head = config.get_text_config(), outline.get_output_embeddings()
    tables = {id(m.weight) for m in outline.modules() if isinstance(m, torch.nn.Embedding)} | {id(head.weight)}
    width = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) * text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return Products(
        body=sum(p.numel() for p in outline.parameters() if p.dim() >= 2 and id(p) not in tables),
        head=head.weight.numel(),
        heads=(width,) * len(kinds),
        windows=tuple(text.sliding_window if kind == "sliding_attention" else 0 for kind in kinds),
        adapters=adapters,
    )


def _saved(config: Any, dtype: torch.dtype, layers: int) -> int:
    """Bytes that autograd keeps for COUNTED_TOKENS tokens of a model of `layers` layers with the real widths, weights not counted."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = layers, 8, None
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:layers] * (1 if len(text.layer_types) >= layers else layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small, dtype=dtype, attn_implementation="sdpa")
    decoder = model.to_empty(device="cpu").get_decoder()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def count(tensor: torch.Tensor) -> None:
        """Detached and not handed back: a graph that holds its own outputs is never freed, and the weights with it."""
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()

    with saved_tensors_hooks(count, lambda nothing: nothing):
        output = decoder(input_ids=torch.zeros((1, COUNTED_TOKENS), dtype=torch.int64), use_cache=False).last_hidden_state
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
