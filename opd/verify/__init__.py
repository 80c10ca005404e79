"""Verifiers: text in, Verdict out. A verifier that fails gives status "error", which leaves baselines and denominators, never a zero
reward."""

import inspect
import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opd.config.choices import Count, Positive, Share, nearest, resolve, split_choice
from opd.tasks import TASKS
from opd.types import Prompt, Verdict, Verifier
from opd.verify.adapt import as_verifier, judge, judge_all
from opd.verify.answers import final_answer
from opd.verify.code import code_verdict, gold_tests_problem, require_isolation
from opd.verify.deadline import SECONDS
from opd.verify.judge_model import DEFAULT_ASK, DEFAULT_VERDICT, Ask, Reading, check_request, judge_verifier, read_pattern
from opd.verify.math import MathVerifier, math_reads, math_verdict
from opd.verify.parts import is_rubric, read_clip, read_parts, rubric_verifier, sum_verifier
from opd.verify.simple import choice_verdict, chosen_letter, exact_verdict, json_verdict, regex_verdict

__all__ = [
    "FACTORIES", "VERIFIERS", "MathVerifier", "adapted", "as_verifier", "final_answer", "gold_choice", "gold_problem", "judge", "judge_all",
    "make_verifier", "read_answer", "reads_of", "version_of",
]  # fmt: skip


OpenJudge = Callable[[str, str, int], Ask]  # (model, server, max_tokens) -> how it is asked


def make_verifier(choice: Any, open_judge: OpenJudge | None = None, seconds: float = SECONDS) -> Verifier:
    """The verifier that a recipe names: a name, {name: {parameter: value}} or {fn: module:function}. Raises ValueError with the fix.

    open_judge: how a judge's model is opened; without it a judge is refused. seconds: longest time for one verdict of a function of one's own.
    """
    name = split_choice(choice, "data.verifier")[0]
    verifier = resolve(choice, {**VERIFIERS, **FACTORIES}, "data.verifier")
    if name in REQUIRES:
        REQUIRES[name]()
    if name in FACTORIES:
        return verifier(open_judge, seconds)
    if name != "fn":
        return verifier
    return adapted(verifier, seconds)


def adapted(function: Any, seconds: float = SECONDS) -> Verifier:
    """A function of one's own or a rubric of such functions; `seconds` is the longest time for one verdict."""
    return rubric_verifier(function, seconds) if is_rubric(function) else as_verifier(function, seconds=seconds)


def make_sum(open_judge: OpenJudge | None, seconds: float, *, of: dict, correct: str = "", clip: list | None = None) -> Verifier:
    """Several parts, added; see opd.verify.parts. correct: the part whose correctness counts, the first by default."""
    parts = read_parts(of, partial(make_verifier, open_judge=open_judge, seconds=seconds))
    if correct and correct not in parts:
        raise ValueError(f"data.verifier: sum.correct is {correct!r}{nearest(correct, parts)}, which is no part; parts: {', '.join(parts)}")
    return sum_verifier(parts, correct or next(iter(parts)), read_clip(clip, "data.verifier: sum.clip"))


def make_judge(
    open_judge: OpenJudge | None,
    _: float,
    *,
    model: str = "",
    server: str = "",
    ask: str = DEFAULT_ASK,
    role: str = "",
    verdict: str = DEFAULT_VERDICT,
    right: list | None = None,
    wrong: list | None = None,
    best: Positive = 1.0,
    correct_at: Share = 1.0,
    max_tokens: Count = 256,
) -> Verifier:
    """A language model as judge; see opd.verify.judge_model. Replies are greedy."""
    check_request(ask)
    words = {key: tuple(map(str, value)) for key, value in (("right", right), ("wrong", wrong)) if value is not None}
    reading = Reading(pattern=read_pattern(verdict), best=best, correct_at=correct_at, **words)
    if open_judge is None:
        raise ValueError("data.verifier judge needs a model, which is not opened here; use it as a recipe's verifier")
    return judge_verifier(open_judge(model, server, max_tokens), ask, role, reading)


def read_answer(choice: Any) -> Callable[[Prompt, str], str]:
    """What a vote counts under this verifier: the letter of a choice, nothing for programs, else the final answer."""
    name, parameters = split_choice(choice, "verifier")
    if name == "choice":
        return lambda prompt, text: chosen_letter(text, **parameters)
    return (lambda prompt, text: "") if name == "code" else final_answer


def gold_choice(choice: Any) -> Any:
    """The part of a choice that judges a bare gold answer (for a sum, its `correct` part); None where no part does."""
    name, parameters = split_choice(choice, "data.verifier")
    if name == "sum":
        of = parameters.get("of") or {}
        part = of.get(parameters.get("correct") or next(iter(of), ""))
        return gold_choice(part["verifier"] if isinstance(part, dict) and "verifier" in part else part) if part else None
    return choice if name in READS_BARE else None


def version_of(choice: Any, function: Callable[..., Any] | None = None, more: str = "") -> str:
    """Names a verifier with what decides its verdicts: the choice, our version, math-verify's, the files of functions of one's own, `more`.

    The whole file counts, for a function calls others of it. Raises ValueError for a function whose source cannot be read.
    """
    own = [function] if function else [resolve(each, {}, "data.verifier") for each in _functions(choice)]
    try:
        sources = [_source(getattr(each, "func", each)) for each in own]
    except (OSError, TypeError) as error:
        raise ValueError(f"data.verdict_cache: {error}, so the verifier's verdicts have no version; leave the cache out") from None
    library = version("math-verify") if find_spec("math_verify") else ""
    return json.dumps([None if function else choice, VERSION, library, sources, more], sort_keys=True, default=str)


def _source(function: Callable[..., Any]) -> str:
    own, file = inspect.getsource(function), inspect.getsourcefile(function)
    return own + (Path(file).read_text(encoding="utf-8") if file and Path(file).is_file() else "")


def _functions(choice: Any) -> list[Any]:
    if not isinstance(choice, dict):
        return []
    return [choice] if "fn" in choice else [found for value in choice.values() for found in _functions(value)]


def reads_of(choice: Any) -> Callable[[str], str]:
    """What of a text the verifier reads: a math answer where that is all, else everything."""
    return math_reads if split_choice(choice, "data.verifier")[0] in ("math", "gsm8k") else str


def gold_problem(verify: Verifier, prompt: Prompt) -> str:
    """Why a verifier does not accept the gold answer itself; "" when it does. For verifiers that judge a bare answer, and for tests."""
    if not prompt.answer:
        return "there is no gold answer"
    if getattr(verify, "func", verify) is code_verdict:
        return gold_tests_problem(prompt)
    verdict = judge(verify, prompt, f"#### {prompt.answer}")
    if verdict.correct and verdict.status == "score":
        return ""
    return f"the gold answer {prompt.answer[:80]!r} cannot be graded: {verdict.feedback or 'the verifier refuses it'}"


def task_verdict(prompt: Prompt, text: str) -> Verdict:
    """The embedded task's own verifier, found by the prompt's domain "task/difficulty". Raises ValueError for a prompt of no task."""
    name = prompt.domain.partition("/")[0]
    if name not in TASKS:
        raise ValueError(
            f"prompt {prompt.id!r} of domain {prompt.domain!r} belongs to no embedded task{nearest(name, TASKS)}; set data.verifier"
        )
    return TASKS[name].verify(prompt, text)


VERIFIERS: dict[str, Callable[..., Verdict]] = {
    "task": task_verdict,
    "exact": exact_verdict,
    "choice": choice_verdict,
    "math": math_verdict,
    "gsm8k": math_verdict,
    "json": json_verdict,
    "regex": regex_verdict,
    "code": code_verdict,
}

FACTORIES: dict[str, Callable[..., Verifier]] = {"sum": make_sum, "judge": make_judge}
"""Verifiers made of others or of a model, from how a judge's model is opened and the longest time for a verdict of a function of one's own."""

READS_BARE = frozenset({"exact", "choice", "math", "gsm8k", "json", "code"})
"""Verifiers that can judge a gold answer as it stands."""

VERSION = 3
"""Counts up when a verifier's verdicts change, so that cached ones are not taken for the new ones'."""

REQUIRES: dict[str, Callable[[], None]] = {"code": require_isolation}
"""What must hold on this machine before a verifier may serve; raises ValueError."""
