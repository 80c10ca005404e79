"""Examines a student on a fixed list of problems: answers, verdicts, one line of eval.jsonl, one file of generations."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_rollout.engine import Engine
from opd_rollout.sampling import request_seed
from opd_rollout.types import Completion, GenerateRequest, Sampling

from opd.accuracy import EvalResult, decoding_name, final_results, summarise, write_evaluation
from opd.launcher.ranks import ALONE, Ranks
from opd.types import Prompt, Verdict, Verifier
from opd.verify import judge_all

__all__ = ["Codec", "EvalResult", "EvalSettings", "decoding_name", "evaluate", "final_results", "write_evaluation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """Text to tokens and back. `answer` gives the final answer that maj@k votes on, "" for none."""

    encode: Callable[[Prompt], tuple[int, ...]]
    decode: Callable[[tuple[int, ...]], str]
    answer: Callable[[Prompt, str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How one suite is evaluated; `temperature` 0 is greedy and needs one answer a problem. Seeds of answers derive from `seed`."""

    suite: str
    split: str
    samples: int
    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    top_p: float = 1.0
    top_k: int = 0


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    verify: Verifier,
    codec: Codec,
    settings: EvalSettings,
    *,
    step: int = 0,
    ranks: Ranks = ALONE,
) -> EvalResult:
    """Answer every prompt `samples` times (once when greedy), judge, and summarise. The ranks share the problems and all get the result.

    `tokens` counts generated tokens, `seconds` the whole evaluation. Raises ValueError for an empty list or repeated prompt ids.
    """
    _check(prompts, settings)
    started = time.perf_counter()
    k = settings.samples if settings.temperature > 0 else 1
    of_ranks = ranks.gather(judged_answers(engine, prompts[ranks.rank :: ranks.count], verify, codec, settings, step))
    generations = tuple(of_ranks[n // k % ranks.count][n // k // ranks.count * k + n % k] for n in range(k * len(prompts)))
    return EvalResult(row=evaluation_row(generations, settings, step, time.perf_counter() - started), generations=generations)


def evaluation_row(generations: Sequence[Mapping[str, Any]], settings: EvalSettings, step: int, seconds: float) -> dict[str, Any]:
    """A line of eval.jsonl from judged answers, k to a problem."""
    decoding = decoding_name(settings.temperature, settings.top_p, settings.top_k)
    return {
        "step": step,
        "suite": settings.suite,
        "split": settings.split,
        "decoding": decoding,
        "temperature": settings.temperature,
        **summarise(generations, settings.samples if settings.temperature > 0 else 1),
        "tokens": sum(line["length"] for line in generations),
        "seconds": round(seconds, 3),
        "generations": f"generations/{settings.suite}-{settings.split}-{decoding.replace(' ', '-')}-step-{step:06d}.jsonl",
    }


def judged_answers(
    engine: Engine, prompts: Sequence[Prompt], verify: Verifier, codec: Codec, settings: EvalSettings, step: int
) -> list[dict[str, Any]]:
    """The judged answers to these problems, in order, k to a problem: lines of a generations file."""
    k = settings.samples if settings.temperature > 0 else 1
    requests = [
        GenerateRequest(prompt_ids=ids, seed=request_seed(settings.seed, prompt.id, sample, step))
        for prompt in prompts
        for ids in [codec.encode(prompt)]
        for sample in range(k)
    ]
    sampling = Sampling(
        temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k, max_tokens=settings.max_tokens, stop_ids=settings.stop_ids
    )
    completions = engine.generate(requests, sampling) if requests else []
    assert len(completions) == len(requests)
    texts = [codec.decode(completion.token_ids) for completion in completions]
    verdicts = judge_all(verify, [(prompts[n // k], text) for n, text in enumerate(texts)])
    return [
        generation_record(prompts[n // k], n % k, completion, text, verdict, codec)
        for n, (completion, text, verdict) in enumerate(zip(completions, texts, verdicts, strict=True))
    ]


def _check(prompts: Sequence[Prompt], settings: EvalSettings) -> None:
    if not prompts:
        raise ValueError(f"evaluation of {settings.suite!r}, split {settings.split!r}: no problems; give at least one, or number 0")
    if len({prompt.id for prompt in prompts}) != len(prompts):
        raise ValueError(f"evaluation of {settings.suite!r}, split {settings.split!r}: prompt ids repeat; give every problem its own id")
    if "/" in settings.suite or "/" in settings.split:
        raise ValueError(f"evaluation suite {settings.suite!r} and split {settings.split!r} name a file: leave out '/'")


def generation_record(prompt: Prompt, sample: int, completion: Completion, text: str, verdict: Verdict, codec: Codec) -> dict[str, Any]:
    """One line of a generations file. Status "error" and "abstain" leave the denominators."""
    return {
        "problem": prompt.id,
        "sample": sample,
        "question": prompt.messages[-1]["content"],
        "text": text,
        "answer": codec.answer(prompt, text),
        "expected": prompt.answer,
        "status": verdict.status,
        "reward": verdict.reward,
        "correct": verdict.correct,
        "feedback": verdict.feedback,
        "domain": prompt.domain,
        "length": len(completion.token_ids),
        "finish": completion.finish,
    }
