"""Do two implementations of one model agree on the log-probabilities of the same tokens?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from opd_rollout.engine import Engine
from opd_rollout.types import Completion, GenerateRequest, Sampling, ScoreRequest, TokenScores

Scorer = Callable[[Sequence[ScoreRequest], float], list[TokenScores]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobGap:
    """|engine - scorer| over tokens, in nats."""

    mean: float
    max: float
    num_tokens: int


def audit(engine: Engine, score: Scorer, requests: Sequence[GenerateRequest], sampling: Sampling) -> LogprobGap:
    """Generates, scores the same tokens with `score`, and compares.

    Raises ValueError for greedy or truncated sampling, whose log-probabilities are of another distribution than the scorer's.
    """
    if sampling.temperature == 0 or sampling.top_k or sampling.top_p < 1:
        raise ValueError(f"the parity audit compares whole distributions; use temperature > 0, top_k 0 and top_p 1, not {sampling}")
    completions = engine.generate(requests, sampling)
    asked = [
        ScoreRequest(context_ids=request.prompt_ids, completion_ids=completion.token_ids)
        for request, completion in zip(requests, completions, strict=True)
    ]
    return logprob_gap(completions, score(asked, sampling.temperature))


def logprob_gap(completions: Sequence[Completion], scores: Sequence[TokenScores]) -> LogprobGap:
    """Gap over all tokens whose log-probability the completions hold (NaN marks tokens that no policy sampled)."""
    ours = torch.cat([completion.logprobs.double() for completion in completions] or [torch.zeros(0, dtype=torch.float64)])
    theirs = torch.cat([score.sampled.double().cpu() for score in scores] or [torch.zeros(0, dtype=torch.float64)])
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} generated and {len(theirs)} scored tokens cannot be compared; score the same completions")
    gap = (ours - theirs).abs()[~ours.isnan()]
    if len(gap) == 0:
        raise ValueError("no token holds a log-probability to compare; audit an engine that samples")
    return LogprobGap(mean=gap.mean().item(), max=gap.max().item(), num_tokens=len(gap))
