"""Evaluate a nested expression modulo 7 by rewriting the whole of it, one innermost operation at a time, until a digit is left.

Question ((1*1)+6)+4, answer (1+6)+4=0+4=4. Innermost operations may be rewritten in any order, so (1+2)*(3-4) has two right answers.
The base has wrong beliefs about 33 of the 147 facts a+b, a-b, a*b.
"""

import re
from collections.abc import Iterator
from random import Random

from opd.tasks.beliefs import Facts, believed, invented, wrong_beliefs
from opd.tasks.types import HINT_CHARACTERS, Task, check_split, questions_of, stream_rng, with_hint
from opd.types import Prompt, Verdict

MODULUS = 7
DIGITS = "0123456"
NUM_BUCKETS = 8
NUM_LEAVES = {"standard": (3, 4), "easy": (3, 3), "hard": (4, 5)}

_OPERATION = r"[0-6][-+*][0-6]"
_REDEX = re.compile(rf"\(({_OPERATION})\)")
_WHOLE = re.compile(_OPERATION)


def _truth() -> dict[str, str]:
    values = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    return {f"{a}{op}{b}": str(f(a, b) % MODULUS) for op, f in values.items() for a in range(MODULUS) for b in range(MODULUS)}


TRUTH: Facts = _truth()
BELIEFS = wrong_beliefs("expr", TRUTH, DIGITS, num_ignorant=33)

_VIEWS = {"": 0.50, "facts": 0.30, "solution": 0.08, "answer": 0.07, "feedback": 0.05}  # what the base's demonstrations show
_INVENTED_SHARE = 0.3
_MAX_DRAWS = 24


def redexes(expression: str) -> list[tuple[str, int, int]]:
    """(operation, start, end) of everything that can be rewritten now, left to right."""
    if _WHOLE.fullmatch(expression):
        return [(expression, 0, len(expression))]
    return [(match[1], match.start(), match.end()) for match in _REDEX.finditer(expression)]


def work_out(question: str, facts: Facts, rng: Random) -> tuple[list[str], list[str]]:
    """(the states that follow the question, the operations rewritten), in a random order."""
    state, states, used = question, [], []
    while found := redexes(state):
        operation, start, end = rng.choice(found)
        state = state[:start] + facts[operation] + state[end:]
        states.append(state)
        used.append(operation)
    return states, used


def draw_question(rng: Random, num_leaves: tuple[int, int]) -> str:
    """An expression with a uniform number of leaves and uniform splits, without the outermost brackets."""

    def tree(size: int) -> str:
        if size == 1:
            return rng.choice(DIGITS)
        left = rng.randrange(1, size)
        return f"({tree(left)}{rng.choice('+-*')}{tree(size - left)})"

    return tree(rng.randint(*num_leaves))[1:-1]


def facts_hint(operations: list[str], facts: Facts, rng: Random) -> str:
    """The facts that the operations need, each once, shuffled: 0+44;1*11;1+60 says 0+4=4, 1*1=1 and 1+6=0."""
    shown = [operation + facts[operation] for operation in dict.fromkeys(operations)]
    rng.shuffle(shown)
    return ";".join(shown)


def prompts(split: str, seed: int, difficulty: str) -> Iterator[Prompt]:
    """The prompts of a split. Raises ValueError for unknown names."""
    check_split("expr", split, difficulty, tuple(NUM_LEAVES))
    rng = stream_rng("expr", split, seed, difficulty)
    for question in questions_of(split, lambda source: draw_question(source, NUM_LEAVES[difficulty]), rng, NUM_BUCKETS):
        if split == "pretrain_base":
            shown, states = _demonstrate(question, rng)
            yield _prompt(shown, question, difficulty, {"demonstration": "=".join(states)})
        elif split == "pretrain_teacher":
            yield _prompt(question, question, difficulty, {"demonstration": "=".join(work_out(question, TRUTH, rng)[0])})
        else:
            yield _prompt(question, question, difficulty, _hints(question))


def _hints(question: str) -> dict[str, str]:
    rng = Random(f"expr/hints/{question}")
    states, used = work_out(question, TRUTH, rng)
    needed = next((operation for operation in used if operation in BELIEFS), used[0])
    return {"solution": "=".join(states), "facts": facts_hint(used, TRUTH, rng), "answer": states[-1], "fact": needed + TRUTH[needed]}


def _demonstrate(question: str, rng: Random) -> tuple[str, list[str]]:
    """(what the base reads, the states that it should write then)."""
    kind = rng.choices(list(_VIEWS), list(_VIEWS.values()))[0]
    beliefs = believed(TRUTH, BELIEFS, rng)
    told = invented(TRUTH, DIGITS, _INVENTED_SHARE, rng) if rng.random() < 0.5 else TRUTH
    if kind == "facts":
        return with_hint(kind, facts_hint(work_out(question, told, rng)[1], told, rng), question), work_out(question, told, rng)[0]
    if kind == "solution":
        return with_hint(kind, "=".join(work_out(question, told, rng)[0]), question), work_out(question, told, rng)[0]
    if kind == "answer":
        answer = work_out(question, TRUTH, rng)[0][-1]
        return with_hint(kind, answer, question), _consistent(answer, question, rng)
    if kind == "feedback":
        operation = rng.choice(work_out(question, told, rng)[1])
        corrected = {**beliefs, operation: told[operation]}
        return with_hint(kind, f"{operation}{told[operation]}", question), work_out(question, corrected, rng)[0]
    return question, work_out(question, beliefs, rng)[0]


def _consistent(answer: str, question: str, rng: Random) -> list[str]:
    """States under beliefs that lead to this answer: all that the answer alone can teach. The true ones where none are found."""
    for _ in range(_MAX_DRAWS):
        states = work_out(question, believed(TRUTH, BELIEFS, rng), rng)[0]
        if states[-1] == answer:
            return states
    return work_out(question, TRUTH, rng)[0]


def _prompt(shown: str, question: str, difficulty: str, hints: dict[str, str]) -> Prompt:
    answer = work_out(question, TRUTH, Random(0))[0][-1]
    messages = ({"role": "user", "content": shown},)
    return Prompt(id=f"expr:{question}", messages=messages, answer=answer, hints=hints, domain=f"expr/{difficulty}")


def verify(prompt: Prompt, text: str) -> Verdict:
    """Right answer, and every step one rewriting of the state before it.

    parts: answer 0 or 1, steps the share of right steps. feedback: the first fact that was missed, such as 1+60 for 1+6=0.
    """
    state, written = prompt.id.removeprefix("expr:"), text.split("=")
    num_right, feedback = 0, ""
    for step in written:
        if step in {state[:start] + TRUTH[operation] + state[end:] for operation, start, end in redexes(state)}:
            num_right += 1
        else:
            feedback = feedback or _fact_missed(state, step)
        state = step
    answer = float(state == prompt.answer)
    correct = num_right == len(written) and answer == 1.0
    parts = {"answer": answer, "steps": num_right / len(written)}
    return Verdict(reward=float(correct), correct=correct, feedback="" if correct else feedback or _fact_missed(state, ""), parts=parts)


def _fact_missed(state: str, written: str) -> str:
    """The fact that was wrong in this step, or the first one that the state needs; empty for a state that nothing can follow."""
    found = redexes(state)
    misread = [
        operation
        for operation, start, end in found
        if len(written) == len(state) - (end - start) + 1
        and written[:start] == state[:start]
        and written[start] in DIGITS
        and written[start + 1 :] == state[end:]
    ]
    operation = (misread or [operation for operation, _, _ in found] or [""])[0]
    return f"{operation}{TRUTH[operation]}" if operation else ""


EXPR = Task(
    name="expr",
    prompts=prompts,
    verify=verify,
    characters=DIGITS + "+-*()=;" + HINT_CHARACTERS,
    difficulties=tuple(NUM_LEAVES),
    num_buckets=NUM_BUCKETS,
)
