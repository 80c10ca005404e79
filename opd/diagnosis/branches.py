"""What becomes of an answer after a forced token: success rates by sampling, or exactly, by following every branch that matters.

Legend: a branch is (prompt, tokens of the answer so far); the student goes on from there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_rollout.sampling import request_seed
from opd_rollout.types import Completion, GenerateRequest, Sampling, ScoreRequest, TokenScores

from opd.types import Prompt, Verifier

Generate = Callable[[Sequence[GenerateRequest], Sampling], Sequence[Completion]]
Score = Callable[[Sequence[ScoreRequest]], Sequence[TokenScores]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """`tokens` of an answer to `prompt` (encoded as prompt_ids); the last one may be a stop token, then nothing follows."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Success:
    """rate: estimated chance of a right answer. halves: two independent estimates (equal when exact). slack: largest error of an exact rate."""

    rate: float
    halves: tuple[float, float]
    slack: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Turns finished tokens into right or wrong; an answer without a verdict counts as wrong."""

    verify: Verifier
    decode: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...]
    max_tokens: int

    def right(self, branch: Branch, tokens: tuple[int, ...]) -> bool:
        verdict = self.verify(branch.prompt, self.decode(tokens))
        return verdict.status == "score" and verdict.correct

    def done(self, tokens: tuple[int, ...]) -> bool:
        return len(tokens) >= self.max_tokens or bool(tokens) and tokens[-1] in self.stop_ids


def sampled_success(branches: Sequence[Branch], generate: Generate, judge: Judge, *, rollouts: int, temperature: float, seed: int) -> list[Success]:
    """Success rates from `rollouts` continuations of each branch (an even number, half for each estimate)."""
    assert rollouts >= 2 and rollouts % 2 == 0
    wins = [[0, 0] for _ in branches]
    requests: dict[int, list[tuple[int, int, GenerateRequest]]] = {}
    for number, branch in enumerate(branches):
        if judge.done(branch.tokens):
            wins[number] = [rollouts // 2 * judge.right(branch, branch.tokens)] * 2
            continue
        context = branch.prompt_ids + branch.tokens
        name = f"{branch.prompt.id}/{','.join(map(str, branch.tokens))}"
        left = judge.max_tokens - len(branch.tokens)
        for draw in range(rollouts):
            request = GenerateRequest(prompt_ids=context, seed=request_seed(seed, name, draw, 0))
            requests.setdefault(left, []).append((number, draw % 2, request))
    for left, asked in requests.items():
        sampling = Sampling(temperature=temperature, max_tokens=left, stop_ids=judge.stop_ids)
        for (number, half, _), completion in zip(asked, generate([request for *_, request in asked], sampling), strict=True):
            wins[number][half] += judge.right(branches[number], branches[number].tokens + completion.token_ids)
    half = rollouts // 2
    return [Success(rate=(a + b) / rollouts, halves=(a / half, b / half)) for a, b in wins]


def exact_success(
    branches: Sequence[Branch], score: Score, judge: Judge, *, k: int, smallest: float = 1e-3, most: int = 20_000
) -> list[Success] | None:
    """Success rates by enumeration: all branches are followed together, a token at a time, through each student's k likeliest tokens.

    Paths whose probability (from their branch on) falls under `smallest` are given up; their mass and that outside the k tokens bounds the error:
    the true rate lies in [rate - slack, rate + slack]. score: the student's scores, at the temperature that it samples with. None where more than
    `most` paths are open at once: the student is too undecided to be enumerated.
    """
    won, lost = [0.0] * len(branches), [0.0] * len(branches)
    frontier: dict[tuple[int, tuple[int, ...]], float] = {(number, branch.tokens): 1.0 for number, branch in enumerate(branches)}
    cache: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, float]]] = {}
    while frontier:
        open_paths: dict[tuple[int, tuple[int, ...]], float] = {}
        for (number, tokens), mass in frontier.items():
            if judge.done(tokens):
                target = won if judge.right(branches[number], tokens) else lost
                target[number] += mass
            elif mass >= smallest:
                open_paths[number, tokens] = mass
        if len(open_paths) > most:
            return None
        _expand(open_paths, branches, score, k, cache)
        frontier = {}
        for (number, tokens), mass in open_paths.items():
            for token, probability in cache[branches[number].prompt_ids, tokens]:
                frontier[number, (*tokens, token)] = mass * probability
    found = []
    for a, b in zip(won, lost, strict=True):
        unknown = max(0.0, 1.0 - a - b)
        found.append(Success(rate=a + unknown / 2, halves=(a + unknown / 2,) * 2, slack=unknown / 2))
    return found


def _expand(
    paths: dict[tuple[int, tuple[int, ...]], float],
    branches: Sequence[Branch],
    score: Score,
    k: int,
    cache: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, float]]],
) -> None:
    """Put the student's next tokens after every path into `cache`; equal prefixes are asked for once."""
    missing = list(dict.fromkeys((branches[n].prompt_ids, tokens) for n, tokens in paths if (branches[n].prompt_ids, tokens) not in cache))
    requests = [ScoreRequest(context_ids=prompt_ids + tokens, completion_ids=(0,), k=k) for prompt_ids, tokens in missing]
    for place, scores in zip(missing, score(requests) if requests else (), strict=True):
        known = {}
        for token, logp in zip(scores.ids[0].tolist(), scores.logp[0].exp().tolist(), strict=True):
            if token >= 0:
                known[token] = logp
        cache[place] = list(known.items())
