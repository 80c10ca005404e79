"""Evaluation suites by name: where each lies on the hub, which columns mean what, how the question is put, who judges, how many answers.

Names and columns are those that the data sets' own pages state. The hub cannot be reached from a test: each mapping is tested on records
written by hand after those pages, not on the data.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.config.choices import nearest
from opd.data.presets import Preset, Record, find_preset, lettered, programming_task
from opd.data.programs import tests_of_record
from opd.data.records import Records, read_records
from opd.errors import Unreachable

BOXED = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
LETTER = "{question}\n\nPlease reason step by step, and put the letter of your choice within \\boxed{{}}."
PROGRAM = "{question}\n\nWrite a Python program, and end with it in one ```python code block."
TEN_LETTERS = {"choice": {"letters": "ABCDEFGHIJ"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """data: source, columns and verifier. ask: the message, with {question}. problems: how many there are. samples: answers a problem that
    make such a number of problems worth reading. note: what a user must know before the first run. page: the data set's own page."""

    data: Preset
    ask: str
    problems: int
    samples: int
    note: str = ""

    @property
    def page(self) -> str:
        return f"https://huggingface.co/datasets/{self.data.path}"


def find_suite(name: str) -> Suite:
    """Raises ValueError with the nearest name."""
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}{nearest(name, SUITES)}; known: {', '.join(sorted(SUITES))}; your own file: data.path=FILE.jsonl")
    return SUITES[name]


def _maths(path: str, problems: int, samples: int, split: str, **columns: str) -> Suite:
    return Suite(data=Preset(path=path, split=split, columns=columns), ask=BOXED, problems=problems, samples=samples)


def _arena(name: str) -> Suite:
    return _maths(f"MathArena/{name}", 30, 32, "train", id="problem_idx", question="problem", answer="answer")


_RIGHT, _WRONG = "Correct Answer", ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _shuffled(record: Record) -> tuple[list[str], str]:
    """The four choices in an order that the question's text decides, and the right one's letter."""
    choices = [str(record[name]).strip() for name in (_RIGHT, *_WRONG)]
    order = list(range(4))
    random.Random(record["Question"]).shuffle(order)
    return [choices[n] for n in order], "ABCD"[order.index(0)]


def _programming_task(record: Record) -> str:
    return programming_task(record["question_content"], record.get("starter_code") or "")


SUITES: Mapping[str, Suite] = {
    "aime24": _maths("HuggingFaceH4/aime_2024", 30, 32, "train", id="id", question="problem", answer="answer"),
    "aime25": _arena("aime_2025"),
    "aime26": _arena("aime_2026"),
    "hmmt25": _arena("hmmt_feb_2025"),
    "math500": _maths("HuggingFaceH4/MATH-500", 500, 4, "test", id="unique_id", question="problem", answer="answer", domain="subject"),
    "amc23": _maths("math-ai/amc23", 40, 32, "test", id="id", question="question", answer="answer"),
    "gsm8k": _maths("openai/gsm8k", 1319, 4, "test", question="question", answer="answer"),
    "gpqa_diamond": Suite(
        data=Preset(
            path="Idavidrein/gpqa",
            subset="gpqa_diamond",
            columns={"id": "Record ID"},
            fields={"question": lambda r: lettered(r["Question"].strip(), _shuffled(r)[0]), "answer": lambda r: _shuffled(r)[1]},
            verifier={"choice": {"letters": "ABCD"}},
        ),
        ask=LETTER,
        problems=198,
        samples=8,
        note="gated: accept its terms on the hub and log in once (hf auth login)",
    ),
    "mmlu_pro": Suite(data=find_preset("mmlu_pro"), ask=LETTER, problems=12032, samples=1),
    "livecodebench": Suite(
        data=Preset(
            path="livecodebench/code_generation_lite",
            split="test",
            columns={"id": "question_id", "domain": "difficulty"},
            fields={"question": _programming_task, "answer": tests_of_record},
            verifier="code",
        ),
        ask=PROGRAM,
        problems=1055,
        samples=4,
        note="its loading script is not run: hf download livecodebench/code_generation_lite test6.jsonl --repo-type dataset --local-dir DIR, then "
        "suite.path=DIR/test6.jsonl (test.jsonl to test6.jsonl hold releases 1 to 6)",
    ),
}


def suite_record(suite: Suite, theirs: Record) -> dict[str, Any]:
    """A problem under our names, of the suite's own shape or already {question | prompt, answer}, with the question put as the suite asks.

    Raises KeyError for a missing column, ValueError for tests that cannot be read.
    """
    own = {*suite.data.columns.values()} <= set(theirs) and not ({"question", "answer"} <= set(theirs) and suite.data.fields)
    record = suite.data.record(theirs) if own else {name: theirs[name] for name in ("id", "domain", "answer") if name in theirs or name == "answer"}
    question = record.pop("question", None) if own else theirs.get("question", theirs.get("prompt"))
    if not isinstance(question, str):
        raise KeyError("question")
    return {"question": suite.ask.format(question=question)} | {k: _plain(v) for k, v in record.items() if v is not None}


def suite_records(suite: Suite, *, path: str = "", subset: str = "", split: str = "", limit: int = 0) -> Records:
    """(place, record under our names) of the suite's problems, from the hub or from a local file of its shape.

    Raises ValueError with the place and the fix; for what is not on this machine, how to get it.
    """
    where = {"subset": subset or ("" if path else suite.data.subset), "split": split or suite.data.split, "limit": limit}
    try:
        for place, theirs in read_records(path or suite.data.path, **where):
            yield place, _named(suite, place, theirs)
    except Unreachable as error:
        note = f" Note: {suite.note}." if suite.note else ""
        raise ValueError(f"{error}.{note} A file of the same columns ({suite.page}) works too: suite.path=FILE.jsonl") from None


def _named(suite: Suite, place: str, theirs: Record) -> dict[str, Any]:
    try:
        return suite_record(suite, theirs)
    except (KeyError, TypeError) as error:
        wanted = ", ".join(suite.data.columns.values())
        raise ValueError(
            f"{place}: not a problem of this suite (no {error}; it has {', '.join(theirs)}); expected the columns of {suite.page} ({wanted} ...) "
            "or question and answer"
        ) from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _plain(value: Any) -> str:
    """AMC's answers are floating-point numbers on the hub: 27.0 is 27."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
