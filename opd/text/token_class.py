"""What kind of token each one is, by its text alone: reasoning, filler, style or answer. Rules, not a model; the same for every run.

answer     the final answer: inside the last \\boxed{...}; else what follows the last "#### ", "answer is", "answer:" or "=" ; else the last place
           where the expected answer stands as a whole word
style      markup rather than content: special tokens, white space alone, Markdown at the start of a line (#, -, *, >, |, ```), **, __, LaTeX
           delimiters ($, \\( \\) \\[ \\])
filler     words that carry no step: wait, hmm, okay, so, well, let me, actually, alternatively ... (FILLER), with the punctuation inside them
reasoning  everything else

The first rule that fits decides, in the order answer, style, filler, reasoning.
"""

import re
from collections.abc import Sequence

CLASSES = ("reasoning", "filler", "style", "answer")
FILLER = frozenset(
    "wait hmm hm okay ok alright so well now then let me us i i'm i'll we we'll see think actually alternatively again just really maybe perhaps "
    "anyway indeed basically simply note that sure yes no oh ah um right good great finally first next also".split()
)
_BOXED = re.compile(r"\\boxed\s*\{")
_MARKERS = re.compile(r"####\s*|answer\s*(?:is|:)\s*|=\s*", re.IGNORECASE)
_SPECIAL = re.compile(r"<\|[^|]*\|>|</?s>|<(?:bos|eos|pad|unk)>|<end_of_turn>|<start_of_turn>|</?think>")
_LINE_START = re.compile(r"(?m)^[ \t]*(#{1,6}|[-*+>|]|```\w*|\d+[.)])(?=[ \t]|$|`)")
_INLINE = re.compile(r"\*\*|__|```|\$\$?|\\[()\[\]]")
_WORD = re.compile(r"[A-Za-z']+")


def token_classes(tokens: Sequence[str], expected: str | None = None) -> list[str]:
    """The class of each token of an answer; `tokens` joined are its text, special tokens included. expected: the right answer, where known."""
    text = "".join(tokens)
    is_answer = _flags(len(text), [answer_span(text, expected)])
    is_style = _flags(len(text), [match.span() for rule in (_SPECIAL, _INLINE) for match in rule.finditer(text)])
    for match in _LINE_START.finditer(text):
        is_style[match.start(1) : match.end(1)] = [True] * (match.end(1) - match.start(1))
    is_filler = _flags(len(text), [match.span() for match in _WORD.finditer(text) if match[0].lower() in FILLER])
    classes, start = [], 0
    for token in tokens:
        end = start + len(token)
        classes.append(_class_of(token, is_answer[start:end], is_style[start:end], is_filler[start:end]))
        start = end
    return classes


def _class_of(token: str, answer: list[bool], style: list[bool], filler: list[bool]) -> str:
    said = [n for n, letter in enumerate(token) if not letter.isspace()]
    if not said:
        return "style"
    for name, flags in (("answer", answer), ("style", style)):
        if all(flags[n] for n in said):
            return name
    letters = [n for n in said if token[n].isalnum()]
    return "filler" if letters and all(filler[n] for n in letters) else "reasoning"


def answer_span(text: str, expected: str | None = None) -> tuple[int, int]:
    """(start, end) of the final answer in a text, (0, 0) where no rule finds one."""
    plain = _SPECIAL.sub(lambda match: " " * len(match[0]), text)
    if boxes := list(_BOXED.finditer(plain)):
        return boxes[-1].end(), _closing(plain, boxes[-1].end())
    if marks := list(_MARKERS.finditer(plain)):
        start = marks[-1].end()
        line = plain[start:].split("\n", 1)[0].rstrip()
        if line.strip():
            return start, start + len(line.rstrip(" ."))
    if expected:
        found = list(re.finditer(rf"(?<!\w){re.escape(expected)}(?!\w)", plain))
        if found:
            return found[-1].span()
    return 0, 0


def _closing(text: str, start: int) -> int:
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return len(text)


def _flags(length: int, spans: Sequence[tuple[int, int]]) -> list[bool]:
    flags = [False] * length
    for start, end in spans:
        flags[start:end] = [True] * (end - start)
    return flags


def class_shares(text: str) -> dict[str, float]:
    """Shares of a text's characters, spaces apart, that are style and filler: the same rules, without tokens."""
    style = _flags(len(text), [match.span() for rule in (_SPECIAL, _INLINE) for match in rule.finditer(text)])
    for match in _LINE_START.finditer(text):
        style[match.start(1) : match.end(1)] = [True] * (match.end(1) - match.start(1))
    filler = _flags(len(text), [match.span() for match in _WORD.finditer(text) if match[0].lower() in FILLER])
    said = [n for n, letter in enumerate(text) if not letter.isspace()]
    total = max(1, len(said))
    return {"style": sum(style[n] for n in said) / total, "filler": sum(filler[n] and not style[n] for n in said) / total}
