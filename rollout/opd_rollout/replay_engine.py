"""An engine over stored completions: supervised data, dataset mixtures and tests."""

from collections import defaultdict, deque
from collections.abc import Sequence

import torch

from opd_rollout.types import Completion, GenerateRequest, Sampling, ScoreRequest, TokenScores, WeightSource


class ReplayEngine:
    """Serves stored token ids for each prompt, in their given order and from the start again when they run out; draws nothing.

    stored: (prompt ids, completion ids) pairs; the completion should hold its end token. log-probabilities are NaN, source "dataset".
    A request's seed does not matter: the n-th request for a prompt, over all calls, gets its n-th completion.
    """

    def __init__(self, stored: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        self._stored: dict[tuple[int, ...], deque[tuple[int, ...]]] = defaultdict(deque)
        for prompt, completion in stored:
            self._stored[tuple(prompt)].append(tuple(completion))

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        """Completions cut at sampling.max_tokens, in the order of the requests. Raises ValueError, serving none, for an unknown prompt."""
        for index, request in enumerate(requests):
            if request.prompt_ids not in self._stored:
                raise ValueError(f"request {index}: nothing is stored for its prompt of {len(request.prompt_ids)} tokens; store it first")
        return [self._next(request.prompt_ids, sampling) for request in requests]

    def score(self, requests: Sequence[ScoreRequest], temperature: float) -> list[TokenScores]:
        """Raises ValueError: stored completions have no model."""
        raise ValueError("a replay engine holds no model and cannot score; score with a teacher or a torch engine")

    def load_weights(self, weights: WeightSource) -> None:
        """Takes part in the collective and keeps nothing: stored completions have no weights."""
        for _ in weights.buckets():
            pass

    def close(self) -> None:
        self._stored.clear()

    def _next(self, prompt_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        queue = self._stored[prompt_ids]
        stored = queue[0]
        queue.rotate(-1)
        token_ids = stored[: sampling.max_tokens]
        return Completion(
            token_ids=token_ids,
            logprobs=torch.full((len(token_ids),), float("nan")),
            loss_mask=torch.ones(len(token_ids), dtype=torch.bool),
            source="dataset",
            temperature=sampling.temperature,
            finish="stop" if len(token_ids) == len(stored) else "length",
            versions=(),
        )
