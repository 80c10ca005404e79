"""Log-probabilities of given completions under a model: what teachers, the learner's preparation and the engine share.

Legend: N completion tokens of a batch, T of one request, K support size, D hidden size.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from opd_kernels import PAD_LOGP, Head, HeadView, selected_logprobs, topk_logprobs
from torch import Tensor, nn

from opd_rollout.backbone import dense_logits, evaluating, hidden_states
from opd_rollout.layout import PASS_TOKENS, lay_out, split_by_budget, to_device
from opd_rollout.sampling import uniforms
from opd_rollout.types import ScoreRequest, TokenScores


@torch.no_grad()
def score_tokens(
    model: nn.Module,
    head: Head,
    requests: Sequence[ScoreRequest],
    *,
    temperature: float,
    token_budget: int,
    version: int,
    chunk_bytes: int | None = None,
    packed: bool = False,
) -> list[TokenScores]:
    """Scores in the order of the requests, on the CPU but for hidden states; no gradient, evaluation mode.

    token_budget bounds the padded tokens of one forward pass and chunk_bytes the head's scratch. `k` = 0 without support_ids gives one
    column: the completion's own token. Raises ValueError for a request that asks for both, or whose sequence exceeds the model.
    """
    _check_requests(requests, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    scores: dict[int, TokenScores] = {}
    with evaluating(model):
        for kind in sorted({_kind(request) for request in requests}):
            alike = [index for index, request in enumerate(requests) if _kind(request) == kind]
            lengths = [len(requests[index].context_ids) + len(requests[index].completion_ids) for index in alike]
            for batch in split_by_budget(lengths, token_budget, pass_tokens=None if packed else PASS_TOKENS):
                members = [alike[position] for position in batch]
                pieces = _score_batch(
                    model, head, [requests[index] for index in members], temperature=temperature, chunk_bytes=chunk_bytes, packed=packed
                )
                for index, piece in zip(members, pieces, strict=True):
                    hashed = view_hash(requests[index].context_ids)
                    scores[index] = TokenScores(**piece, temperature=temperature, version=version, view_hash=hashed)
    return [scores[index] for index in range(len(requests))]


def view_hash(context_ids: Sequence[int]) -> str:
    """16 hexadecimal digits that name a context's token ids."""
    return hashlib.blake2b(",".join(map(str, context_ids)).encode(), digest_size=8).hexdigest()


def _kind(request: ScoreRequest) -> tuple[int, int, int]:
    """Requests of one kind share a call of the head: (columns of support_ids or 0, k, draws)."""
    return (0 if request.support_ids is None else request.support_ids.shape[1], request.k, request.draws)


def _check_requests(requests: Sequence[ScoreRequest], limit: int | None) -> None:
    for index, request in enumerate(requests):
        length = len(request.context_ids) + len(request.completion_ids)
        if limit is not None and length > limit:
            raise ValueError(
                f"request {index} has {len(request.context_ids)} context and {len(request.completion_ids)} completion tokens, but the "
                f"scorer has {limit} positions; shorten the context (its hint)"
            )
        if (request.support_ids is not None) + (request.k > 0) + (request.draws > 0) > 1:
            raise ValueError(f"request {index} asks for more than one of support_ids, k = {request.k} and draws = {request.draws}; choose one")
        if request.support_ids is None:
            continue
        if request.support_ids.dim() != 2 or len(request.support_ids) != len(request.completion_ids) or not request.support_ids.shape[1]:
            raise ValueError(
                f"request {index} has support_ids of shape {list(request.support_ids.shape)}; it must be "
                f"[{len(request.completion_ids)}, K], a row a completion token"
            )


def _score_batch(
    model: nn.Module, head: Head, requests: Sequence[ScoreRequest], *, temperature: float, chunk_bytes: int | None, packed: bool
) -> list[dict[str, Any]]:
    layout = to_device(lay_out([(request.context_ids, request.completion_ids) for request in requests], packed=packed), head.weight.device)
    hidden_ND = hidden_states(model, layout)[layout.predict_at]
    options = {"temperature": temperature, "chunk_bytes": chunk_bytes}
    if requests[0].support_ids is not None:
        support_NK = torch.cat([request.support_ids.to(hidden_ND.device) for request in requests if request.support_ids is not None])
        found = head(hidden_ND, partial(_at_support, token_N=layout.token, support_NK=support_NK, options=options))
    elif requests[0].k:
        found = head(hidden_ND, partial(_at_topk, token_N=layout.token, k=requests[0].k, options=options))
    elif requests[0].draws:
        noise = torch.cat([_noise(request) for request in requests]).to(hidden_ND.device)
        found = head(hidden_ND, partial(_at_draws, token_N=layout.token, noise_NK=noise, options=options))
    else:
        found = head(hidden_ND, partial(_at_token, token_N=layout.token, options=options))
    counts = [len(request.completion_ids) for request in requests]
    split = {name: tensor.cpu().split(counts) for name, tensor in found.items()}
    hidden = hidden_ND.split(counts)
    return [
        {name: parts[index] for name, parts in split.items()} | {"hidden": hidden[index] if request.hidden else None}
        for index, request in enumerate(requests)
    ]


def _at_token(hidden_ND: Tensor, view: HeadView, *, token_N: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    ids = token_N.unsqueeze(1)
    found = selected_logprobs(hidden_ND, view.weight, ids, **view.keywords(), **options)
    return {"sampled": found.logp[:, 0], "ids": ids, "logp": found.logp, "tail_logp": found.tail_logp, "entropy": found.entropy}


def _at_topk(hidden_ND: Tensor, view: HeadView, *, token_N: Tensor, k: int, options: dict[str, Any]) -> dict[str, Tensor]:
    found = topk_logprobs(hidden_ND, view.weight, k, always_include=token_N, **view.keywords(), **options)
    return {"sampled": found.logp[:, 0], "ids": found.ids, "logp": found.logp, "tail_logp": found.tail_logp, "entropy": found.entropy}


def _noise(request: ScoreRequest) -> Tensor:
    """Uniform numbers [T, draws] that depend on the request's tokens alone: the same answer gets the same draws."""
    seed = int(view_hash((*request.context_ids, *request.completion_ids)), 16) >> 1
    return uniforms([seed], len(request.completion_ids) * request.draws).view(len(request.completion_ids), request.draws)


def _at_draws(
    hidden_ND: Tensor, view: HeadView, *, token_N: Tensor, noise_NK: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Ids drawn with replacement from each token's distribution, each once, with the log of its share of the draws."""
    found = _at_token(hidden_ND, view, token_N=token_N, options=options)
    draws, pad = noise_NK.shape[1], torch.tensor(PAD_LOGP, device=hidden_ND.device)
    rows = max(1, (options["chunk_bytes"] or 1 << 26) // (16 * view.weight.shape[0]))  # fp32 logits, fp64 sums and what lies between
    pieces = []
    for hidden, noise in zip(hidden_ND.split(rows), noise_NK.split(rows), strict=True):
        logits = dense_logits(hidden, view) / options["temperature"]
        cumulative = logits.double().softmax(-1).cumsum(-1)
        pieces.append(torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1))
    ids = (torch.cat(pieces) if pieces else noise_NK.long()).sort(-1).values
    counts = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).sum(-1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    logp = torch.where(first, (counts / draws).log(), pad).to(found["logp"])
    return found | {"ids": torch.where(first, ids, -1), "logp": logp, "tail_logp": torch.full_like(found["tail_logp"], PAD_LOGP)}


def _at_support(
    hidden_ND: Tensor, view: HeadView, *, token_N: Tensor, support_NK: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    ids = torch.cat([token_N.unsqueeze(1), support_NK], dim=1)
    found = selected_logprobs(hidden_ND, view.weight, ids, **view.keywords(), **options)
    sampled = found.logp[:, 0]
    # the kernel's tail lies outside the support and the sampled token; a sampled token outside the support belongs to its tail
    outside = sampled.masked_fill((support_NK == token_N.unsqueeze(1)).any(dim=1), float("-inf"))
    tail_logp = torch.logaddexp(found.tail_logp, outside)
    return {"sampled": sampled, "ids": support_NK, "logp": found.logp[:, 1:], "tail_logp": tail_logp, "entropy": found.entropy}
