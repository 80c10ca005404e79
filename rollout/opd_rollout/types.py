"""Token ids in, completions and scores out: the records that cross the engine's border.

Legend: L prompt or context tokens, T completion tokens, K support size, D hidden size.
Every per-token array is indexed by completion token: entry n is about predicting completion token n.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn; `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 keep the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One completion to draw; `seed` is the 63-bit hash of (run seed, prompt id, sample, rollout step)."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine returns for one request; the stop id, when one was drawn, is the last token.

    logprobs [T] fp32, nats, of the distribution that was sampled (after temperature, top-p, top-k); NaN where no policy sampled.
    loss_mask [T] bool. finish: "stop" or "length". versions: (weight version, first token, one past the last token) spans.
    Example: token_ids (8, 9, 2), versions ((3, 0, 3),): all three tokens drawn with weights of version 3.
    """

    token_ids: tuple[int, ...]
    logprobs: Tensor
    loss_mask: Tensor
    source: str
    temperature: float
    finish: str
    versions: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Score `completion_ids` after `context_ids`; `support_ids` [T, K] int64 (-1 pads) asks for log-probs at given ids,
    `k` > 0 for the scorer's own top-k joined with the completion's token (both only of a scorer with another tokenizer, see
    opd.teacher.aligned), `draws` > 0 for that many ids drawn from its distribution at each
    token, `hidden` for the final hidden states."""

    context_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    support_ids: Tensor | None = None
    k: int = 0
    draws: int = 0
    hidden: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """True log-probabilities (nats, never renormalised) of one completion under one scorer and one context.

    sampled [T]: of the completion's own tokens. ids [T, K] int64, logp [T, K], tail_logp [T]: the support, -1 and -1e4 where padded;
    with `k` > 0 column 0 is the completion's token and columns 1..k the top-k; with `draws` > 0 the ids drawn, each once, at the logarithm of
    how often it was drawn (the one exception: an estimate), and no tail. entropy [T], nats. hidden [T, D] or None.
    view_hash identifies the context's token ids; version the scorer's weights. span [T] int64 or None: for a scorer with another tokenizer,
    which tokens were scored together (equal numbers, -1 for none); `sampled` then holds equal shares of a span's log-prob.
    """

    sampled: Tensor
    ids: Tensor
    logp: Tensor
    tail_logp: Tensor
    entropy: Tensor
    hidden: Tensor | None = None
    temperature: float
    version: int
    view_hash: str
    span: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMetadata:
    """Name, shape and dtype name ("float32") of every tensor that `buckets` will yield, in order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


class WeightSource(Protocol):
    """Weights on their way to an engine. `buckets` is collective: every rank iterates it to the end."""

    version: int

    def metadata(self) -> WeightMetadata: ...

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleWeights:
    """A WeightSource over an ordinary module's named parameters (Hugging Face names, tied ones once)."""

    version: int
    named: tuple[tuple[str, Tensor], ...] = field(repr=False)

    def metadata(self) -> WeightMetadata:
        return WeightMetadata(
            names=tuple(name for name, _ in self.named),
            shapes=tuple(tuple(tensor.shape) for _, tensor in self.named),
            dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in self.named),
        )

    def buckets(self) -> Iterator[list[tuple[str, Any]]]:
        yield list(self.named)
