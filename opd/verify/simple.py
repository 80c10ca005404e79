"""Verifiers that compare text: exact answers, multiple choice, JSON, patterns."""

import json
import re
from collections.abc import Sequence
from typing import Any

from opd.types import Prompt, Verdict
from opd.verify.answers import marked_answer

_OPENING = re.compile(r"[{\[]")
_ANSWER_IS = re.compile(r"[Aa]nswer(?: is|:)\s*\**\s*(\(?[A-Z]\)?)(?![A-Za-z])")
_PRONOUN = re.compile(r"(?<![A-Za-z(])I(?=['’]|\s+[a-z])")
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

    Read by `chosen_letter`.
    """
    if prompt.answer is None:
        return Verdict(status="abstain", feedback="no gold answer")
    return _compare(chosen_letter(text, letters), prompt.answer.strip().strip("()."))


def chosen_letter(text: str, letters: str = "ABCDE") -> str:
    """The letter of a marked answer, else of the last "answer is X", else the last that stands alone ("I" only where no word follows)."""
    marked = marked_answer(text)
    for part in [marked] if marked else [" ".join(_ANSWER_IS.findall(text)), _PRONOUN.sub("", text)]:
        found = [letter for letter in _LETTER.findall(part) if letter in letters]
        if found:
            return found[-1]
    return ""


def json_verdict(prompt: Prompt, text: str, *, keys: Sequence[str] = ()) -> Verdict:
    """Right when the last JSON object or array of the text equals the gold one, key order aside; with `keys`, in those keys.

    parts: json (1 where any was found), keys (share of the gold object's keys that agree).
    """
    if prompt.answer is None:
        return Verdict(status="abstain", feedback="no gold answer")
    try:
        gold = json.loads(prompt.answer)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompt {prompt.id!r}: the gold answer is no JSON ({error.msg})") from None
    found = _last_json(text)
    if found is None:
        return Verdict(feedback="No JSON was found.", parts={"json": 0.0, "keys": 0.0})
    wanted = [*keys] or list(gold) if isinstance(gold, dict) else []
    agree = [isinstance(found, dict) and key in found and found[key] == gold.get(key) for key in wanted]
    correct = all(agree) and (bool(keys) or found == gold)
    wrong = [key for key, same in zip(wanted, agree, strict=True) if not same]
    feedback = "" if correct else f"Wrong or missing: {', '.join(wrong)}." if wrong else "The JSON differs from the right one."
    return Verdict(
        reward=float(correct), correct=correct, feedback=feedback, parts={"json": 1.0, "keys": sum(agree) / len(agree) if agree else float(correct)}
    )


def regex_verdict(prompt: Prompt, text: str, *, pattern: str, ignore_case: bool = False) -> Verdict:
    """Right when the pattern's last match in the text (its first group, if it has one) equals the gold answer up to white space."""
    if prompt.answer is None:
        return Verdict(status="abstain", feedback="no gold answer")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"data.verifier.regex.pattern {pattern!r} is no regular expression: {error}") from None
    matches = list(compiled.finditer(text))
    found = (matches[-1].group(1 if compiled.groups else 0) or "") if matches else ""
    return _compare(_plain(found, ignore_case), _plain(prompt.answer, ignore_case))


def _last_json(text: str) -> Any:
    """The last complete object or array that is not part of another one; None without any."""
    decoder, found, at = json.JSONDecoder(), None, 0
    while (match := _OPENING.search(text, at)) is not None:
        try:
            found, at = decoder.raw_decode(text, match.start())
        except (json.JSONDecodeError, RecursionError):
            at = match.end()
    return found


def _compare(answer: str, gold: str) -> Verdict:
    correct = bool(gold) and answer == gold
    feedback = "" if correct else f"The answer {answer[:100]} is wrong." if answer else "No answer was found."
    return Verdict(reward=float(correct), correct=correct, feedback=feedback, parts={"answer": float(correct)})


def _plain(text: str, ignore_case: bool) -> str:
    plain = " ".join(text.split())
    return plain.casefold() if ignore_case else plain
