"""Finding the final answer in a text, and reading plain numbers: regular expressions of linear cost, no evaluation."""

import re
from fractions import Fraction

from opd.types import Prompt

MAX_ANSWER_CHARACTERS = 1000
_SCALES = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "percent"}
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<minus>-)?\s?(?:\\?[$€£])?\s?(?P<minus_inside>-)?(?P<digits>{_DIGITS})(?:/(?P<under>\d+))?\s?(?:\\?%)?\.?(?P<unit>(?:\s[A-Za-z]+){{0,4}})\.?"
)
_NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w.)])-)?(?<![\w.])(?:\\?[$€£])?\s?-?(?:{_DIGITS})(?:/\d+)?")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")


def marked_answer(text: str) -> str | None:
    r"""The last answer that the text marks as final, `\boxed{...}` or `#### ...`; None where it marks none or leaves the mark open."""
    found = [(match.start(), match.group(1).strip()) for match in _HASHES.finditer(text)]
    start = text.rfind("\\boxed{")
    if start >= 0:
        found.append((start, _braced(text, start + len("\\boxed{")) or ""))
    position, answer = max(found, default=(-1, ""))
    return _unwrap(answer) if position >= 0 and answer else None


def last_number(text: str) -> str | None:
    """The last number written in a text, as it stands there; None without one."""
    found = _NUMBER_IN_TEXT.findall(text)
    return found[-1].strip() if found else None


def read_number(text: str) -> Fraction | None:
    """The value of a plain number: sign, currency, thousands commas, percent sign (ignored), a/b, up to four words of unit; else None."""
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= 100 else None
    if match is None or _SCALES & set(match["unit"].lower().split()):
        return None
    value = Fraction(match["digits"].replace(",", ""))
    if match["under"]:
        if int(match["under"]) == 0:
            return None
        value /= int(match["under"])
    return -value if bool(match["minus"]) != bool(match["minus_inside"]) else value


def final_answer(prompt: Prompt, text: str) -> str:
    """One spelling per answer, for votes: a marked answer, else the last number, else the last line; "" where there is none."""
    lines = text.strip().splitlines()
    answer = marked_answer(text) or last_number(text) or (lines[-1] if lines else "")
    value = read_number(answer)
    return str(value) if value is not None else " ".join(answer.split())


def _braced(text: str, start: int) -> str | None:
    depth = 1
    for index in range(start, min(len(text), start + MAX_ANSWER_CHARACTERS + 1)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index].strip()
    return None


def _unwrap(answer: str) -> str:
    inner = answer.strip().rstrip(".").strip()
    if len(inner) > 2 and inner[0] == inner[-1] == "$":
        inner = inner[1:-1].strip()
    return inner
