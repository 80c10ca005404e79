"""The in-process engine around an unmodified Hugging Face module: prefill once a prompt, batched decode over a preallocated cache.

Legend: P distinct prompts of a batch, B requests still open, L longest prompt, T most tokens of a completion, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from opd_kernels import Head
from torch import Tensor, nn
from transformers.cache_utils import Cache

from opd_rollout.backbone import check_head, dense_logits, evaluating, head_of, untracked
from opd_rollout.cache import DecodeMask, check_layers, grouped_attention, slot_cache
from opd_rollout.layout import split_by_budget
from opd_rollout.lean_decoding import LeanDecoder, decode_token, lean_decoder
from opd_rollout.mixing import Partner
from opd_rollout.sampling import check_sampling, draw, truncate, uniforms
from opd_rollout.scoring import score_tokens
from opd_rollout.types import Completion, GenerateRequest, Sampling, ScoreRequest, TokenScores, WeightSource

_COMPACT_BELOW = 0.75
"""Share of open rows at which finished ones are dropped: moving the cache costs about as much as one decode step."""


@dataclass(slots=True, kw_only=True)
class _Stream:
    """One model in the midst of decoding: logits [B, V] of the next token, and a cache in which every prompt ends at column L."""

    model: nn.Module
    head: Head
    logits: Tensor
    cache: Cache
    mask: DecodeMask
    lean: LeanDecoder | None

    def select(self, index: Tensor) -> None:
        """Only these rows go on."""
        for holder in (self.mask, *self.cache.layers):
            holder.select(index)

    def feed(self, token: Tensor, position: Tensor, step: int) -> None:
        """Reads one more token of every row."""
        if self.lean is not None:
            self.logits = self.head(decode_token(self.lean, token, position.squeeze(1), self.cache, self.mask.at(step)), dense_logits)
            return
        hidden = self.model.get_decoder()(
            input_ids=token.unsqueeze(1),
            attention_mask=self.mask.at(step),
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.logits = self.head(hidden[:, -1], dense_logits)


class TorchEngine:
    """Engine (see opd_rollout.engine) in this process, on the module's own device; the module may be shared with a learner.

    token_budget bounds rows x (longest prompt + max_tokens) of a batch, in tokens; pad_id fills short rows and is never read.
    vocab_size: valid ids where the head is padded. The module is put into evaluation mode for each call and back afterwards.
    Identical batches give identical tokens; in other batch shapes fp32 logits move by about 1e-5, and a token may change. With a partner,
    tokens are drawn from what the two models make together (see opd_rollout.mixing); only the own model gets weights and scores.
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
        partner: Partner | None = None,
    ) -> None:
        """Raises ValueError for a model whose cache or head this engine cannot serve."""
        self._partner = partner
        self.model = model
        self.version = version
        self._pad_id = pad_id
        self._token_budget = token_budget
        self._packed_scores = packed_scores
        self._chunk_bytes = chunk_bytes
        self._vocab_size = vocab_size
        self._config = model.config.get_text_config()
        for each in self._models():
            check_layers(each.config.get_text_config(), type(each).__name__)
            with evaluating(each):
                check_head(each, self._head(each))

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        """Completions in the order of the requests. Raises ValueError before any work for values or prompts that cannot be served."""
        check_sampling(sampling)
        if self._partner is not None and sampling.temperature == 0:
            raise ValueError("temperature is 0, and a mixture of two models has no greedy token; sample at a positive temperature")
        self._check_prompts([request.prompt_ids for request in requests], sampling.max_tokens)
        first_seen: dict[tuple[int, ...], int] = {}
        for index, request in enumerate(requests):
            first_seen.setdefault(request.prompt_ids, index)
        grouped = sorted(range(len(requests)), key=lambda index: first_seen[requests[index].prompt_ids])
        lengths = [len(requests[index].prompt_ids) + sampling.max_tokens for index in grouped]
        completions: dict[int, Completion] = {}
        with ExitStack() as prepared:
            for model in self._models():
                prepared.enter_context(evaluating(model))
                prepared.enter_context(grouped_attention(model.config.get_text_config()))
            for batch in split_by_budget(lengths, self._token_budget):
                members = [grouped[position] for position in batch]
                completions.update(zip(members, self._decode([requests[index] for index in members], sampling), strict=True))
        return [completions[index] for index in range(len(requests))]

    def score(self, requests: Sequence[ScoreRequest], temperature: float) -> list[TokenScores]:
        """See opd_rollout.scoring.score_tokens."""
        return score_tokens(
            self.model,
            self._head(self.model),
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

    def _models(self) -> tuple[nn.Module, ...]:
        return (self.model,) if self._partner is None else (self.model, self._partner.model)

    def _head(self, model: nn.Module) -> Head:
        return head_of(model, vocab_size=self._vocab_size)

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
        device = self._head(self.model).weight.device
        noise_BT = uniforms([request.seed for request in requests], sampling.max_tokens).to(device)
        row_of_B, longest = torch.tensor(row_of, device=device), max(map(len, prompt_rows))
        ids = torch.tensor([[*prompt, *[self._pad_id] * (longest - len(prompt))] for prompt in prompt_rows], device=device)
        lengths_P = torch.tensor([len(prompt) for prompt in prompt_rows], device=device)
        with untracked(*self._models()):
            streams = [self._prefill(model, ids, lengths_P, row_of_B, sampling.max_tokens) for model in self._models()]
            tokens_BT, logprobs_BT, versions_T = self._decode_rows(streams, lengths_P[row_of_B], noise_BT, sampling)
        logprobs_BT = logprobs_BT.float().clone()  # out here a tensor that others may train with
        return _completions(tokens_BT.cpu(), logprobs_BT.cpu(), sampling, versions_T)

    def _prefill(self, model: nn.Module, ids: Tensor, lengths_P: Tensor, row_of_B: Tensor, max_tokens: int) -> _Stream:
        config, head, longest = model.config.get_text_config(), self._head(model), ids.shape[1]
        cache = slot_cache(config)
        # pads stand on the right here, where no real token of a causal model looks, so no mask is needed
        hidden = model.get_decoder()(
            input_ids=ids,
            position_ids=torch.arange(longest, device=ids.device).expand(len(ids), -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), lengths_P - 1]
        column_BL = None
        if int(lengths_P.min()) < longest:
            column_PL = torch.arange(longest, device=ids.device) - (longest - lengths_P).unsqueeze(1)
            column_BL = column_PL.clamp_(min=0)[row_of_B]
        for layer in cache.layers:
            layer.spread(row_of_B, column_BL, longest + max_tokens - 1)
        mask = DecodeMask(lengths_P[row_of_B], longest, max_tokens, config, model.dtype)
        logits, lean = head(last, dense_logits)[row_of_B], lean_decoder(model, longest + max_tokens)
        return _Stream(model=model, head=head, logits=logits, cache=cache, mask=mask, lean=lean)

    def _decode_rows(
        self, streams: Sequence[_Stream], lengths_B: Tensor, noise: Tensor, sampling: Sampling
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Tokens and log-probabilities [B, T], and the weight version behind each column; what stands after a row's stop id is not part of
        its completion."""
        versions_T: list[int] = []
        tokens_BT = torch.zeros(noise.shape, dtype=torch.int64, device=noise.device)
        logprobs_BT = streams[0].logits.new_zeros(noise.shape)
        stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=noise.device)
        rows, positions = torch.arange(len(noise), device=noise.device), lengths_B.unsqueeze(1)
        is_open = torch.ones_like(rows, dtype=torch.bool)
        for step in range(sampling.max_tokens):
            token, logp = self._draw(streams, noise[:, step], sampling)
            versions_T.append(self.version)  # a hook may load weights before a forward pass, and only there
            tokens_BT[rows, step], logprobs_BT[rows, step] = token, logp
            is_open &= ~torch.isin(token, stops)
            num_open = int(is_open.sum())
            if num_open == 0 or step + 1 == sampling.max_tokens:
                break
            if num_open <= _COMPACT_BELOW * len(rows):
                index = is_open.nonzero().squeeze(1)
                rows, noise, positions, token, is_open = (each[index] for each in (rows, noise, positions, token, is_open))
                for stream in streams:
                    stream.select(index)
            for stream in streams:
                stream.feed(token, positions + step, step)
        return tokens_BT, logprobs_BT, versions_T

    def _draw(self, streams: Sequence[_Stream], uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        if self._partner is None:
            options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            return draw(streams[0].logits, uniform, **options)
        width = min(stream.logits.shape[-1] for stream in streams)  # heads may be padded differently
        own, other = ((stream.logits[:, :width] / sampling.temperature).log_softmax(-1) for stream in streams)
        if sampling.top_k or sampling.top_p < 1:
            own = truncate(own, top_p=sampling.top_p, top_k=sampling.top_k)
        return draw(self._partner.mix(own, other), uniform, temperature=1.0)


def _completions(tokens_BT: Tensor, logprobs_BT: Tensor, sampling: Sampling, versions_T: Sequence[int]) -> list[Completion]:
    stops = set(sampling.stop_ids)
    completions = []
    for row, logprobs in zip(tokens_BT.tolist(), logprobs_BT.cpu(), strict=True):
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
                versions=spans(versions_T[:length]),
            )
        )
        if not completions[-1].logprobs.isfinite().all():
            raise ValueError("the model's logits are NaN or infinite, so its weights are; go back to a checkpoint from before that")
    return completions


def spans(versions: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(version, first token, one past the last) for every run of equal versions, e.g. [3, 3, 4] -> ((3, 0, 2), (4, 2, 3))."""
    starts = [index for index, version in enumerate(versions) if index == 0 or version != versions[index - 1]]
    return tuple((versions[start], start, end) for start, end in zip(starts, [*starts, len(versions)][1:], strict=True))


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
