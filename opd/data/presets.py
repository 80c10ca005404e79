"""Public data sets by name: where they lie, which columns mean what, how answers are judged.

Names and columns are those that the data sets' own pages state; the hub cannot be reached from a test, so each mapping is tested on a
record written by hand after that page, not on the data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.config.choices import nearest
from opd.config.recipe import Choice
from opd.verify.answers import marked_answer

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """path, subset, split: on the hub. columns: our name -> theirs, where plain. fields: our name -> what a record gives.

    verifier: who judges, as data.verifier names it. licence: as the page states it. note: what a user must know where it cannot be read.
    """

    path: str
    subset: str = ""
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Callable[[Record], Any]] = field(default_factory=dict)
    verifier: Choice = "math"
    licence: str = ""
    note: str = ""

    def record(self, theirs: Record) -> dict[str, Any]:
        """A record under our names. Raises KeyError for a missing column."""
        named = {ours: theirs[column] for ours, column in self.columns.items()}
        return named | {ours: read(theirs) for ours, read in self.fields.items()}


def find_preset(name: str) -> Preset:
    """Raises ValueError with the nearest name."""
    if name not in PRESETS:
        raise ValueError(f"data.preset: no data set {name!r}{nearest(name, PRESETS)}; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def _boxed(column: str) -> Callable[[Record], str | None]:
    return lambda record: marked_answer(record[column])


def _lettered(record: Record) -> str:
    """The question and its choices; open questions, which have none (and no letter as their answer), as they are."""
    choices = record["choices"] or {}
    lines = [f"{label}. {text}" for label, text in zip(choices.get("label") or (), choices.get("text") or (), strict=True)]
    return "\n".join([record["question"], *lines])


def programming_task(question: str, starter: str) -> str:
    """The task and the form that the program must have."""
    form = f"Begin with this code:\n```python\n{starter}\n```" if starter else "Read standard input and write standard output."
    return f"{question}\n\n{form}"


def lettered(question: str, options: Sequence[str]) -> str:
    """The question, then its options as A, B, C ..., one a line."""
    return "\n".join([question, *(f"{chr(65 + n)}. {text}" for n, text in enumerate(options))])


PRESETS = {
    "gsm8k": Preset(path="openai/gsm8k", subset="main", columns={"question": "question", "answer": "answer"}, licence="MIT"),
    "math": Preset(
        path="DigitalLearningGmbH/MATH-lighteval",
        columns={"question": "problem", "solution": "solution", "domain": "type"},
        fields={"answer": _boxed("solution")},
        licence="MIT",
    ),
    "dapo_math": Preset(
        path="open-r1/DAPO-Math-17k-Processed", subset="en", columns={"question": "prompt", "answer": "solution"}, licence="Apache-2.0"
    ),
    "deepmath": Preset(
        path="zwhe99/DeepMath-103K",
        columns={"question": "question", "answer": "final_answer", "solution": "r1_solution_1", "domain": "topic"},
        licence="MIT",
    ),
    "openthoughts_math": Preset(
        path="open-r1/OpenThoughts-114k-math", columns={"question": "problem", "solution": "solution"}, fields={"answer": _boxed("solution")}
    ),
    "sciknoweval": Preset(
        path="hicai-zju/SciKnowEval",
        split="test",
        columns={"answer": "answerKey", "domain": "domain"},
        fields={"question": _lettered},
        verifier="choice",
        licence="MIT",
    ),
    "mmlu_pro": Preset(
        path="TIGER-Lab/MMLU-Pro",
        split="test",
        columns={"answer": "answer", "domain": "category"},
        fields={"question": lambda r: lettered(r["question"], r["options"])},
        verifier={"choice": {"letters": "ABCDEFGHIJ"}},
        licence="MIT",
    ),
    "mbpp": Preset(
        path="google-research-datasets/mbpp",
        subset="full",
        columns={"id": "task_id"},
        fields={
            "question": lambda r: r["text"] + "\nYour program must pass:\n" + "\n".join(r["test_list"]),
            "answer": lambda r: "\n".join([r.get("test_setup_code") or "", *r["test_list"]]).strip(),
            "solution": lambda r: f"```python\n{r['code']}\n```",
        },
        verifier="code",
        licence="CC-BY-4.0",
    ),
    "taco": Preset(
        path="BAAI/TACO",
        columns={"answer": "input_output", "domain": "difficulty"},
        fields={"question": lambda r: programming_task(r["question"], r.get("starter_code") or "")},
        verifier="code",
        licence="Apache-2.0",
        note="its loading script is not run: hf download BAAI/TACO --repo-type dataset --include 'train/*.arrow' --local-dir DIR, then "
        "data.path=DIR/train/data-00000-of-00009.arrow, one of nine files",
    ),
}
