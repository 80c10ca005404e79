"""Several engines with the same weights as one: requests are shared out by prompt, answers come back in order."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from opd_rollout.engine import Engine
from opd_rollout.types import Completion, GenerateRequest, Sampling, ScoreRequest, TokenScores, WeightSource

T = TypeVar("T")


class Replicas:
    """Engine (see opd_rollout.engine) over engines that work at the same time, each in a process of its own."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        """Raises ValueError for no engine at all."""
        if not engines:
            raise ValueError("replicas need at least one engine")
        self.engines = tuple(engines)
        self._pool = ThreadPoolExecutor(len(self.engines), "replicas")

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        """Completions in the order of the requests; samples of one prompt are drawn by one replica."""
        return self._shared(requests, lambda request: request.prompt_ids, lambda engine, part: engine.generate(part, sampling))

    def score(self, requests: Sequence[ScoreRequest], temperature: float) -> list[TokenScores]:
        """Scores in the order of the requests."""
        return self._shared(requests, lambda request: request.context_ids, lambda engine, part: engine.score(part, temperature))

    def load_weights(self, weights: WeightSource) -> None:
        """The same weights into every replica, one after the other; `buckets` is iterated once a replica."""
        for engine in self.engines:
            engine.load_weights(weights)

    def close(self) -> None:
        """Closes every replica, then the threads that waited for them."""
        for engine in self.engines:
            engine.close()
        self._pool.shutdown()

    def _shared(self, requests: Sequence[T], key: Callable[[T], Hashable], call: Callable[[Engine, list[T]], list[Any]]) -> list[Any]:
        shares = shares_by_key([key(request) for request in requests], len(self.engines))
        work = [
            (share, self._pool.submit(call, engine, [requests[index] for index in share]))
            for engine, share in zip(self.engines, shares, strict=True)
            if share
        ]
        found: dict[int, Any] = {}
        for share, future in work:
            found.update(zip(share, future.result(), strict=True))
        return [found[index] for index in range(len(requests))]


def shares_by_key(keys: Sequence[Hashable], num_shares: int) -> list[list[int]]:
    """Indices for each share: equal keys stay together, new keys go round, e.g. (a, b, a, c) in two shares: [0, 2, 3], [1]."""
    share_of: dict[Hashable, int] = {}
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for index, key in enumerate(keys):
        shares[share_of.setdefault(key, len(share_of) % num_shares)].append(index)
    return shares
