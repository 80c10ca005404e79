"""What every rollout engine can do; nothing here knows a tokenizer, a reward or a learner."""

from collections.abc import Sequence
from typing import Protocol

from opd_rollout.types import Completion, GenerateRequest, Sampling, ScoreRequest, TokenScores, WeightSource


class EngineLost(RuntimeError):
    """What generates is gone and does not come back; the message says why and how to go on."""


class Engine(Protocol):
    """Completions and scores come back in the order of the requests."""

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]: ...

    def score(self, requests: Sequence[ScoreRequest], temperature: float) -> list[TokenScores]: ...

    def load_weights(self, weights: WeightSource) -> None: ...

    def close(self) -> None: ...
