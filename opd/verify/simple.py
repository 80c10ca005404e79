"""Verifiers that compare text: exact answers and multiple choice."""

import re

from opd.types import Prompt, Verdict
from opd.verify.answers import marked_answer

_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-Z])\)?(?![A-Za-z])")


def exact_verdict(prompt: Prompt, text: str, *, ignore_case: bool = False, last_line: bool = False) -> Verdict:
    """Right when the answer (a marked one, the last line, or else the whole text) equals the gold answer up to white space."""
    if prompt.answer is None:
        return Verdict(status="abstain", feedback="no gold answer")
    lines = text.strip().splitlines() or [""]
    answer = marked_answer(text) or (lines[-1] if last_line else text)
    return _compare(_plain(answer, ignore_case), _plain(marked_answer(prompt.answer) or prompt.answer, ignore_case))


def choice_verdict(prompt: Prompt, text: str, *, letters: str = "ABCDE") -> Verdict:
    """Right when the chosen letter is the gold one.

    The choice is a marked answer's letter, else the last letter of `letters` that stands alone in the text.
    """
    if prompt.answer is None:
        return Verdict(status="abstain", feedback="no gold answer")
    found = [letter for letter in _LETTER.findall(marked_answer(text) or text) if letter in letters]
    return _compare(found[-1] if found else "", prompt.answer.strip().strip("()."))


def _compare(answer: str, gold: str) -> Verdict:
    correct = bool(gold) and answer == gold
    feedback = "" if correct else f"The answer {answer[:100]} is wrong." if answer else "No answer was found."
    return Verdict(reward=float(correct), correct=correct, feedback=feedback, parts={"answer": float(correct)})


def _plain(text: str, ignore_case: bool) -> str:
    plain = " ".join(text.split())
    return plain.casefold() if ignore_case else plain
