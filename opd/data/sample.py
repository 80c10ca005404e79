"""Made-up records under our names, in the place of a data set of the hub where a run only tries out shapes (`model.init=random`)."""

import random
from collections.abc import Callable, Mapping
from typing import Any

from opd.data.records import Records

SIZE, PROGRAMS = 64, 24  # every program is run once before training


def sample_records(verifier: str, seed: int = 0) -> Records:
    """(place, record) pairs that the verifier named can judge: word problems, lettered questions or small programs, each with a solution."""
    make, dice = KINDS.get(verifier, _sum), random.Random(seed)
    for number in range(SIZE if verifier != "code" else PROGRAMS):
        yield f"sample:{number + 1}", {"id": f"sample-{number}", **make(number, dice)}


def _sum(number: int, dice: random.Random) -> dict[str, Any]:
    boxes, inside, given, name = dice.randint(3, 19), dice.randint(4, 29), dice.randint(1, 11), dice.choice(NAMES)
    total, left = boxes * inside, boxes * inside - given
    return {
        "question": f"Problem {number + 1}. {name} has {boxes} boxes with {inside} pencils in each, and gives {given} away. How many are left?",
        "solution": f"There are {boxes} * {inside} = {total} pencils.\nWithout {given}, {total} - {given} = {left} are left.\n\n\\boxed{{{left}}}",
        "answer": str(left),
        "domain": dice.choice(("arithmetic", "counting")),
    }


def _lettered(number: int, dice: random.Random) -> dict[str, Any]:
    record = _sum(number, dice)
    right = int(record["answer"])
    options = sorted({right, right + 1, right + 10, max(0, right - 7)}, key=lambda value: (value * 37 + number) % 11)
    letter = chr(65 + options.index(right))
    lines = [f"{chr(65 + n)}. {value}" for n, value in enumerate(options)]
    solution = record["solution"].partition("\\boxed")[0] + f"\\boxed{{{letter}}}"
    return {**record, "question": "\n".join([record["question"], *lines]), "answer": letter, "solution": solution}


def _program(number: int, dice: random.Random) -> dict[str, Any]:
    factor, added = dice.randint(2, 9), number
    tests = "\n".join(f"assert shifted({x}) == {factor * x + added}" for x in (0, 1, 5))
    return {
        "question": f"Write a Python function shifted(x) that returns {factor} times x, plus {added}.\nYour program must pass:\n{tests}",
        "solution": f"```python\ndef shifted(x):\n    return {factor} * x + {added}\n```",
        "answer": tests,
        "domain": "code",
    }


NAMES = ("Ada", "Bo", "Chen", "Dara", "Edith", "Femi", "Goran", "Hana")
KINDS: Mapping[str, Callable[[int, random.Random], dict[str, Any]]] = {"math": _sum, "choice": _lettered, "code": _program}
