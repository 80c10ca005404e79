"""What decoding adds to an unmodified Hugging Face module: a preallocated cache, its mask, and attention for single queries.

Legend: P distinct prompts, B requests still open, L longest prompt, H key-value heads, G queries a key-value head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GROUPED_ATTENTION = "opd_grouped_query"
FEW_KEYS = 256
"""Up to here two batched products beat the CPU's fused kernel, whose blocks a single query cannot fill: 36 against 109 us at 20 keys, B = 32."""


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: the prompts' own after prefill, then rows of one preallocated buffer, written in place."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def spread(self, row_of_B: Tensor, column_BL: Tensor | None, capacity: int) -> None:
        """Gives every request a copy of its prompt's entries, moved to end at column L, with room for `capacity` columns."""
        self.keys = _spread(self.keys, row_of_B, column_BL, capacity)
        self.values = _spread(self.values, row_of_B, column_BL, capacity)

    def select(self, index: Tensor) -> None:
        """Keeps the rows at `index` (ascending), in place."""
        for name in ("keys", "values"):
            buffer = getattr(self, name)
            buffer[: len(index), :, : self.length] = buffer[index, :, : self.length]
            setattr(self, name, buffer[: len(index)])


def _spread(source: Tensor, row_of_B: Tensor, column_BL: Tensor | None, capacity: int) -> Tensor:
    _, heads, length, width = source.shape
    buffer = source.new_empty((len(row_of_B), heads, capacity, width))
    if column_BL is None:
        buffer[:, :, :length] = source[row_of_B]
    else:
        buffer[:, :, :length] = source.transpose(1, 2)[row_of_B.unsqueeze(1), column_BL].transpose(1, 2)
    return buffer


def slot_cache(config: Any) -> Cache:
    return Cache(layers=[SlotLayer() for _ in range(config.num_hidden_layers)])


class DecodeMask:
    """Hides the columns left of each row's prompt; None while every row fills all columns.

    Where all layers attend to everything a ready additive mask [B, 1, 1, columns] is sliced; else the model gets a two-dimensional
    mask and builds one for each kind of layer.
    """

    def __init__(self, lengths_B: Tensor, longest: int, max_tokens: int, config: Any, dtype: torch.dtype) -> None:
        self._longest = longest
        self._columns: Tensor | None = None
        if int(lengths_B.min()) == longest:
            return
        real = torch.arange(longest + max_tokens - 1, device=lengths_B.device) >= (longest - lengths_B).unsqueeze(1)
        if config._attn_implementation in (GROUPED_ATTENTION, "eager") and _attends_fully(config):
            additive = torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill_(~real, torch.finfo(dtype).min)
            self._columns = additive[:, None, None]
        else:
            self._columns = real.to(torch.int64)

    def select(self, index: Tensor) -> None:
        if self._columns is not None:
            self._columns = self._columns[index]

    def at(self, step: int) -> Tensor | None:
        return None if self._columns is None else self._columns[..., : self._longest + step + 1]


def grouped_query_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Single queries [B, H*G, 1, d] over keys [B, H, columns, d] without a copy of the keys for every query head.

    The G query heads of a key-value head become G queries of it: the same numbers, five times faster at B = 128, H = G = 2 on a CPU.
    """
    if query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, query_heads, _, width = query.shape
    queries = query.reshape(rows, key.shape[1], query_heads // key.shape[1], width)
    attend = _few_keys if query.device.type == "cpu" and key.shape[2] <= FEW_KEYS else nn.functional.scaled_dot_product_attention
    attended = attend(queries, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return attended.reshape(rows, 1, query_heads, value.shape[-1]), None


def _few_keys(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-1, -2))
    if attn_mask is not None:
        scores += attn_mask
    return torch.matmul(scores.softmax(-1), value)


AttentionInterface.register(GROUPED_ATTENTION, grouped_query_attention)


@contextmanager
def grouped_attention(config: Any) -> Iterator[None]:
    """Lets a model that runs sdpa on full attention decode with grouped_query_attention; other models stay as they are."""
    before = config._attn_implementation
    if before == "sdpa" and _attends_fully(config) and getattr(config, "attn_logit_softcapping", None) is None:
        config._attn_implementation = GROUPED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def check_layers(config: Any, name: str) -> None:
    """Raises ValueError for kinds of layers whose state is not keys and values of their own."""
    others = sorted(set(_layer_types(config)) - {"full_attention", "sliding_attention"})
    if others or getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{name} has layers ({', '.join(others) or 'shared key-value caches'}) that torch_engine cannot cache; use the vLLM engine"
        )


def _attends_fully(config: Any) -> bool:
    return set(_layer_types(config)) == {"full_attention"}


def _layer_types(config: Any) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is None or config.model_type == "mistral":  # whose modules read sliding_window alone
        types = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    return list(types)
