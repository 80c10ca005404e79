"""The in-process engine around an unmodified Hugging Face module: prefill once a prompt, batched decode over a preallocated cache.

Legend: P distinct prompts of a batch, B requests still open, L longest prompt, T most tokens of a completion, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opd_kernels import Head
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from opd_rollout.backbone import check_head, dense_logits, evaluating, head_of
from opd_rollout.layout import split_by_budget
from opd_rollout.sampling import check_sampling, draw, uniforms
from opd_rollout.scoring import score_tokens
from opd_rollout.types import Completion, GenerateRequest, Sampling, ScoreRequest, TokenScores, WeightSource

_COMPACT_BELOW = 0.75
"""Share of open rows at which finished ones are dropped: moving the cache costs about as much as one decode step."""

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: the prompts' own after prefill, then rows of one preallocated buffer, written in place."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        if start == 0:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
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
        """Gives every request its copy of its prompt's entries, moved to end at column L, with room for `capacity` columns."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Requests that decode together: noise [B, T] fp64, the distinct prompts, and which of them each request continues."""

    prompts: list[tuple[int, ...]]
    row_of_B: Tensor
    noise_BT: Tensor


class TorchEngine:
    """Engine (see opd_rollout.engine) in this process, on the module's own device; the module may be shared with a learner.

    token_budget bounds rows x (longest prompt + max_tokens) of a batch, in tokens; pad_id fills short rows and is never read.
    vocab_size: valid ids where the head is padded. The module is put into evaluation mode for each call and back afterwards.
    Identical batches give identical tokens; in other batch shapes fp32 logits move by about 1e-5, and a token may change.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_id: int,
        token_budget: int,
        version: int = 0,
        packed_scores: bool = False,
        chunk_bytes: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Raises ValueError for a model whose cache or head this engine cannot serve."""
        self.model = model
        self.version = version
        self._pad_id = pad_id
        self._token_budget = token_budget
        self._packed_scores = packed_scores
        self._chunk_bytes = chunk_bytes
        self._vocab_size = vocab_size
        self._config = model.config.get_text_config()
        _check_layers(self._config, type(model).__name__)
        with evaluating(model):
            check_head(model, self._head())

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        """Completions in the order of the requests. Raises ValueError before any work for values or prompts that cannot be served."""
        check_sampling(sampling)
        self._check_prompts([request.prompt_ids for request in requests], sampling.max_tokens)
        first_seen: dict[tuple[int, ...], int] = {}
        for index, request in enumerate(requests):
            first_seen.setdefault(request.prompt_ids, index)
        grouped = sorted(range(len(requests)), key=lambda index: first_seen[requests[index].prompt_ids])
        lengths = [len(requests[index].prompt_ids) + sampling.max_tokens for index in grouped]
        completions: dict[int, Completion] = {}
        with evaluating(self.model), torch.no_grad():
            for batch in split_by_budget(lengths, self._token_budget):
                members = [grouped[position] for position in batch]
                completions.update(zip(members, self._decode([requests[index] for index in members], sampling), strict=True))
        return [completions[index] for index in range(len(requests))]

    def score(self, requests: Sequence[ScoreRequest], temperature: float) -> list[TokenScores]:
        """See opd_rollout.scoring.score_tokens."""
        return score_tokens(
            self.model,
            self._head(),
            requests,
            temperature=temperature,
            token_budget=self._token_budget,
            version=self.version,
            chunk_bytes=self._chunk_bytes,
            packed=self._packed_scores,
        )

    def load_weights(self, weights: WeightSource) -> None:
        """Copies the source's tensors into the module, except those that are the module's own memory.

        Raises ValueError, before a weight changes, unless names and shapes cover exactly the module's parameters.
        """
        own = dict(self.model.named_parameters(remove_duplicate=False))
        metadata = weights.metadata()
        _check_manifest(own, metadata.names, metadata.shapes)
        with torch.no_grad():
            for bucket in weights.buckets():
                for name, tensor in bucket:
                    if tensor.data_ptr() != own[name].data_ptr():
                        own[name].copy_(tensor)
        self.version = weights.version

    def close(self) -> None:
        """Nothing outlives a call, so there is nothing to release."""

    def _head(self) -> Head:
        return head_of(self.model, vocab_size=self._vocab_size)

    def _check_prompts(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> None:
        limit = getattr(self._config, "max_position_embeddings", None)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"request {index} has an empty prompt; it needs at least one token")
            if limit is not None and len(prompt) + max_tokens > limit:
                raise ValueError(
                    f"request {index} has a prompt of {len(prompt)} tokens, and with max_tokens {max_tokens} exceeds the model's "
                    f"{limit} positions; shorten the prompt or lower max_tokens"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise ValueError(f"request {index} holds a token id outside 0 to {vocabulary - 1}; use the model's own tokenizer")

    def _decode(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        prompt_rows: dict[tuple[int, ...], int] = {}
        row_of = [prompt_rows.setdefault(request.prompt_ids, len(prompt_rows)) for request in requests]
        head = self._head()
        device = head.weight.device
        batch = _Batch(
            prompts=list(prompt_rows),
            row_of_B=torch.tensor(row_of, device=device),
            noise_BT=uniforms([request.seed for request in requests], sampling.max_tokens).to(device),
        )
        tokens_BT, logprobs_BT = self._decode_batch(batch, head, sampling)
        return _completions(tokens_BT.cpu(), logprobs_BT.float().cpu(), sampling, self.version)

    def _decode_batch(self, batch: _Batch, head: Head, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities [B, T]; what stands after a row's stop id is not part of its completion."""
        decoder = self.model.get_decoder()
        device = head.weight.device
        lengths_B = torch.tensor([len(prompt) for prompt in batch.prompts], device=device)[batch.row_of_B]
        logits, cache = self._prefill(decoder, head, batch, sampling.max_tokens)
        mask = _DecodeMask(lengths_B, sampling.max_tokens, self._config, logits.dtype)
        num_rows = len(batch.row_of_B)
        tokens_BT = torch.zeros((num_rows, sampling.max_tokens), dtype=torch.int64, device=device)
        logprobs_BT = logits.new_zeros((num_rows, sampling.max_tokens))
        stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
        rows, noise, positions = torch.arange(num_rows, device=device), batch.noise_BT, lengths_B.unsqueeze(1)
        is_open = torch.ones(num_rows, dtype=torch.bool, device=device)
        for step in range(sampling.max_tokens):
            token, logp = draw(
                logits, noise[:, step], temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
            )
            tokens_BT[rows, step], logprobs_BT[rows, step] = token, logp
            is_open &= ~torch.isin(token, stops)
            num_open = int(is_open.sum())
            if num_open == 0 or step + 1 == sampling.max_tokens:
                break
            if num_open <= _COMPACT_BELOW * len(rows):
                index = is_open.nonzero().squeeze(1)
                rows, noise, positions, token = rows[index], noise[index], positions[index], token[index]
                is_open = is_open[index]
                mask.select(index)
                for layer in cache.layers:
                    layer.select(index)
            hidden = decoder(
                input_ids=token.unsqueeze(1),
                attention_mask=mask.at(step),
                position_ids=positions + step,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = head(hidden[:, -1], dense_logits)
        return tokens_BT, logprobs_BT

    def _prefill(self, decoder: nn.Module, head: Head, batch: _Batch, max_tokens: int) -> tuple[Tensor, Cache]:
        """Logits [B, V] of the first completion token, and a cache in which every prompt ends at column L."""
        device = head.weight.device
        longest = max(len(prompt) for prompt in batch.prompts)
        ids = torch.tensor([[*prompt, *[self._pad_id] * (longest - len(prompt))] for prompt in batch.prompts], device=device)
        lengths_P = torch.tensor([len(prompt) for prompt in batch.prompts], device=device)
        cache = Cache(layers=[SlotLayer() for _ in range(self._config.num_hidden_layers)])
        # pads stand on the right here: no real token of a causal model looks at them, so no mask is needed
        hidden = decoder(
            input_ids=ids,
            position_ids=torch.arange(longest, device=device).expand(len(ids), -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        last = hidden[torch.arange(len(ids), device=device), lengths_P - 1]
        column_BL = None
        if int(lengths_P.min()) < longest:
            shifted = torch.arange(longest, device=device) - (longest - lengths_P).unsqueeze(1)
            column_BL = shifted.clamp_(min=0)[batch.row_of_B]
        for layer in cache.layers:
            layer.spread(batch.row_of_B, column_BL, longest + max_tokens - 1)
        return head(last, dense_logits)[batch.row_of_B], cache


class _DecodeMask:
    """Hides the columns left of each row's prompt; None while every row fills all columns.

    Where all layers attend to everything a ready additive mask [B, 1, 1, columns] is sliced; else the model gets a two-dimensional
    mask and builds one for each kind of layer.
    """

    def __init__(self, lengths_B: Tensor, max_tokens: int, config: Any, dtype: torch.dtype) -> None:
        self._longest = int(lengths_B.max())
        self._columns: Tensor | None = None
        ready = set(_layer_types(config)) == {"full_attention"} and config._attn_implementation in ("sdpa", "eager")
        if int(lengths_B.min()) < self._longest:
            columns = torch.arange(self._longest + max_tokens - 1, device=lengths_B.device)
            real = columns >= (self._longest - lengths_B).unsqueeze(1)
            if ready:
                hidden = torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill_(~real, torch.finfo(dtype).min)
                self._columns = hidden[:, None, None]
            else:
                self._columns = real.to(torch.int64)

    def select(self, index: Tensor) -> None:
        if self._columns is not None:
            self._columns = self._columns[index]

    def at(self, step: int) -> Tensor | None:
        return None if self._columns is None else self._columns[..., : self._longest + step + 1]


def _completions(tokens_BT: Tensor, logprobs_BT: Tensor, sampling: Sampling, version: int) -> list[Completion]:
    stops = set(sampling.stop_ids)
    completions = []
    for row, logprobs in zip(tokens_BT.tolist(), logprobs_BT, strict=True):
        end = next((index for index, token in enumerate(row) if token in stops), None)
        length = sampling.max_tokens if end is None else end + 1
        completions.append(
            Completion(
                token_ids=tuple(row[:length]),
                logprobs=logprobs[:length],
                loss_mask=torch.ones(length, dtype=torch.bool),
                source="student",
                temperature=sampling.temperature,
                finish="length" if end is None else "stop",
                versions=((version, 0, length),),
            )
        )
        if not completions[-1].logprobs.isfinite().all():
            raise ValueError("the model's logits are NaN or infinite, so its weights are; go back to a checkpoint from before that")
    return completions


def _layer_types(config: Any) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is None:
        kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        types = [kind] * config.num_hidden_layers
    return list(types)


def _check_layers(config: Any, name: str) -> None:
    others = sorted(set(_layer_types(config)) - _PLAIN_LAYERS)
    if others or getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{name} has layers ({', '.join(others) or 'shared key-value caches'}) that torch_engine cannot cache; use the vLLM engine"
        )


def _check_manifest(own: dict[str, nn.Parameter], names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
    unknown = [name for name in names if name not in own]
    reached = {own[name].data_ptr() for name in names if name in own}
    missing = [name for name, parameter in own.items() if parameter.data_ptr() not in reached]
    if unknown or missing:
        raise ValueError(
            f"the weights do not fit the engine's module: unknown {unknown[:3]}, missing {missing[:3]}; "
            "send every parameter once, under its Hugging Face name"
        )
    for name, shape in zip(names, shapes, strict=True):
        if tuple(own[name].shape) != tuple(shape):
            raise ValueError(f"{name} has shape {list(shape)}, but the engine's is {list(own[name].shape)}; send weights of the same model")
