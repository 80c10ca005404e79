"""Verifiers that compare text: exact answers, multiple choice, JSON, patterns."""

import json
import re
from collections.abc import Sequence
from typing import Any

from opd.types import Prompt, Verdict
from opd.verify.answers import marked_answer
from opd.verify.patterns import compiled, last_match

_OPENING = re.compile(r"[{\[]")
_ANSWER_IS = re.compile(r"[Aa]nswer(?: is|:)\s*\**\s*(\(?[A-Z]\)?)(?![A-Za-z])")
_PRONOUN = re.compile(r"(?<![A-Za-z(])I(?=['’]|\s+[a-z])")
_LABEL = re.compile(r"\(?([A-Za-z])(?:\)|[.:])?\s*$|\(?([A-Z])[).:]")
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
    """The letter of a marked answer (that it begins with, as in "B. 12 and A", else its last), else of the last "answer is X", else the last
    that stands alone ("I" only where no word follows)."""
    marked = marked_answer(text)
    if marked and (label := _LABEL.match(marked)) and (letter := (label[1] or label[2]).upper()) in letters:
        return letter
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
        gold = _DECODER.decode(prompt.answer)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompt {prompt.id!r}: the gold answer is no JSON ({error.msg})") from None
    found = _last_json(text)
    if found is None:
        return Verdict(feedback="No JSON was found.", parts={"json": 0.0, "keys": 0.0})
    wanted = [*keys] or list(gold) if isinstance(gold, dict) else []
    agree = [isinstance(found, dict) and key in found and _same(found[key], gold.get(key)) for key in wanted]
    correct = all(agree) and (bool(keys) or _same(found, gold))
    wrong = [key for key, same in zip(wanted, agree, strict=True) if not same]
    feedback = "" if correct else f"Wrong or missing: {', '.join(wrong)}." if wrong else "The JSON differs from the right one."
    return Verdict(
        reward=float(correct), correct=correct, feedback=feedback, parts={"json": 1.0, "keys": sum(agree) / len(agree) if agree else float(correct)}
    )


def regex_verdict(prompt: Prompt, text: str, *, pattern: str, ignore_case: bool = False) -> Verdict:
    """Right when the pattern's last match in the text (its first group, if it has one) equals the gold answer up to white space.

    Raises TimeoutError, an error for this answer, where the match takes longer than opd.verify.patterns allows.
    """
    if prompt.answer is None:
        return Verdict(status="abstain", feedback="no gold answer")
    found = last_match(compiled(pattern, "data.verifier.regex.pattern"), text) or ""
    return _compare(_plain(found, ignore_case), _plain(prompt.answer, ignore_case))


def _last_json(text: str) -> Any:
    """The last complete object or array that is not part of another one; None without any.

    None, too, for a text nested deeper than Python's parser reads, and for one on which failed attempts cost more than _PATIENCE characters:
    they add up to hours on ten thousand opened brackets.
    """
    found, at, patience = None, 0, _PATIENCE
    while patience > 0 and (match := _OPENING.search(text, at)) is not None:
        try:
            found, at = _DECODER.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            at, patience = match.end(), patience - 100 - (error.pos - match.start()) - error.pos // 16  # it counts the lines before error.pos
        except RecursionError:
            return None
    return found if patience > 0 else None


def _integer(digits: str) -> int | float:
    """Python refuses integers above 4,300 digits with another error than that of bad JSON."""
    return int(digits) if len(digits) <= 100 else float(digits)


def _same(ours: Any, theirs: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are the same number, true is no number."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return isinstance(ours, bool) == isinstance(theirs, bool) and ours == theirs


_DECODER = json.JSONDecoder(parse_int=_integer)
_PATIENCE = 4_000_000


def _compare(answer: str, gold: str) -> Verdict:
    correct = bool(gold) and answer == gold
    feedback = "" if correct else f"The answer {answer[:100]} is wrong." if answer else "No answer was found."
    return Verdict(reward=float(correct), correct=correct, feedback=feedback, parts={"answer": float(correct)})


def _plain(text: str, ignore_case: bool) -> str:
    plain = " ".join(text.split())
    return plain.casefold() if ignore_case else plain
