"""What a teacher reads before the student's tokens and the student does not: small pure functions from an answer and its group to a View.

A view is the student's own conversation with the last user message rewritten by a template: a plain text with {hint} and {question}.
Rendering to token ids is in opd/contexts.py.
Templates come from the embedded task (its base was trained on them) or, for real text, from TEMPLATES below; a recipe may write its own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opd.config.choices import Share, nearest, parameters_of, resolve, split_choice
from opd.types import Judged, View
from opd.verify.answers import final_answer

_SLOT = re.compile(r"\{(hint|question|feedback)\}")
_SEGMENT_END = re.compile(r"(?<=[\n;])|(?<=[.!?])(?=[ \t])")
_WORD_END = re.compile(r"(?<=\s)(?=\S)")
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)

TEMPLATES: dict[str, str] = {
    "solution": "{question}\n\nA correct solution, for your eyes only:\n{hint}\n\nNow solve the problem yourself, step by step.",
    "opsd": (  # arXiv:2601.18734: the reference solution, then the request to derive it oneself
        "{question}\n\nA reference solution to this problem follows.\n=== solution begins ===\n{hint}\n=== solution ends ===\n\n"
        "Understand why it is right. Then work the problem out in your own words, step by step, without copying or mentioning it."
    ),
    "peer_success": "{question}\n\nA correct attempt at this question:\n{hint}\n\nSolve the original question correctly.",
    "feedback": "{question}\n\nFeedback on an earlier, failed attempt:\n{hint}\n\nSolve the original question correctly.",
    "demonstration": (  # arXiv:2601.19897: one expert answer, then the request for one's own
        "{question}\n\nHere is how an expert answered this:\n{hint}\n\nGive an answer of your own, with your reasoning."
    ),
    "facts": "{question}\n\nUseful facts:\n{hint}",
    "answer": "{question}\n\nThe final answer is known to be {hint}. Show the steps that lead to it.",
    "solution_and_feedback": (  # arXiv:2601.20802: both blocks, then the request
        "{question}\n\nA correct attempt at this question:\n{hint}\n\nFeedback on an earlier, failed attempt:\n{feedback}\n\n"
        "Solve the original question correctly."
    ),
    "partial_solution": (
        "{question}\n\nThe beginning of a reference solution, and its final answer:\n{hint}\n\n"
        "Now solve the problem yourself, step by step, without mentioning this."
    ),
    "instruction": "{question}\n\n{hint}",
    "debate": (  # arXiv:2605.01347: the transcript, then the request for an answer of one's own
        "{question}\n\nSeveral experts have debated this question:\n{hint}\n\n"
        "With their debate in mind, solve the question again in your own way, step by step."
    ),
    "note": "{question}\n\nA remark on an earlier attempt:\n{hint}\n\nSolve the original question correctly.",
}
_FALLBACK = {"peer_success": "solution", "demonstration": "solution", "partial_solution": "solution", "wrong_answer": "answer", "note": "feedback"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewInput:
    """What a view may look at. group: all answers to the same prompt, this one included. hint_characters: longest hint that still fits.

    controls: the values that the recipe's controllers give at this step, by name.
    """

    judged: Judged
    group: Sequence[Judged]
    templates: Mapping[str, str]
    hint_characters: int | None = None
    controls: Mapping[str, float] = field(default_factory=dict)


ViewFunction = Callable[[ViewInput], View | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """A view ready to be called: the function with its parameters bound, and the templates it may use.

    thinking: what the chat template is told of it, None for the template's default. apart: on purpose not as the student's.
    tokenizer: the reader's own, None where it is the student's.
    """

    view: ViewFunction
    templates: Mapping[str, str]
    thinking: bool | None = None
    apart: bool = False
    tokenizer: Any = None


def plain(seen: ViewInput) -> View:
    """The student's own context."""
    messages = seen.judged.prompt.messages
    return View(messages=messages, kind="plain", question=_question_index(seen))


def hint(seen: ViewInput, *, name: str, template: str = "") -> View | None:
    """The prompt's hint of that name, where it has one."""
    return place(seen, name, seen.judged.prompt.hints.get(name, ""), template)


def solution(seen: ViewInput, *, template: str = "") -> View | None:
    """The reference solution."""
    return hint(seen, name="solution", template=template)


def partial_solution(seen: ViewInput, *, share: Share | str, answer: bool = True, template: str = "") -> View | None:
    """The first floor(share x segments) segments of the reference solution, then the final answer unless all are shown or `answer` is false.

    share: a number, or the name of a controller (ATESD, arXiv 2605.11458; AVSD's partial view without the answer, 2605.20643); all is shown
    outside of training steps, where controllers give nothing.
    """
    prompt = seen.judged.prompt
    parts = segments(prompt.hints.get("solution", ""))
    shown = int((seen.controls.get(share, 1.0) if isinstance(share, str) else share) * len(parts) + 1e-9)
    lines = ["".join(parts[:shown]).rstrip(), (prompt.hints.get("answer") or prompt.answer or "") if answer and shown < len(parts) else ""]
    return place(seen, "partial_solution", "\n".join(line for line in lines if line) if parts else "", template)


def segments(text: str) -> list[str]:
    """The text cut after every line, semicolon and sentence; where that gives one piece, after every word, or character. Joined they are the text."""
    for cut in (_SEGMENT_END, _WORD_END):
        parts = [part for part in cut.split(text) if part]
        if len(parts) > 1:
            return parts
    return list(text)


def facts(seen: ViewInput, *, template: str = "") -> View | None:
    """Facts that the answer needs, without the way to it."""
    return hint(seen, name="facts", template=template)


def answer(seen: ViewInput, *, template: str = "") -> View | None:
    """The final answer alone."""
    prompt = seen.judged.prompt
    return place(seen, "answer", prompt.hints.get("answer") or prompt.answer or "", template)


def demonstration(seen: ViewInput, *, template: str = "") -> View | None:
    """An expert's answer; the reference solution where the data names no demonstration."""
    hints = seen.judged.prompt.hints
    return place(seen, "demonstration", hints.get("demonstration") or hints.get("solution", ""), template)


def peer_success(seen: ViewInput, *, own: bool = False, template: str = "") -> View | None:
    """The group's first correct answer, thoughts removed; own: this answer may be the one shown."""
    return place(seen, "peer_success", _peer_text(seen, own), template)


def _peer_text(seen: ViewInput, own: bool) -> str:
    for peer in seen.group:
        if peer.verdict.status == "score" and peer.verdict.correct and (own or peer.member != seen.judged.member):
            return _THOUGHT.sub("", peer.text).strip()
    return ""


def feedback(
    seen: ViewInput,
    *,
    solution: Literal["none", "peer_success"] = "none",
    own: bool = False,
    together: bool = False,
    template: str = "",
) -> View | None:
    """The verifier's feedback on this answer; solution "peer_success": a correct sibling's answer instead, where the group has one.

    together: the sibling's answer and the feedback, where there are both (SDPO, arXiv 2601.20802).
    """
    verdict = seen.judged.verdict
    said = verdict.feedback if verdict.status == "score" else ""
    peer = _peer_text(seen, own) if solution == "peer_success" else ""
    if not peer or (together and not said.strip()):
        return place(seen, "peer_success", peer) or place(seen, "feedback", said, template)
    if not together:
        return place(seen, "peer_success", peer)
    if "solution_and_feedback" in seen.templates:
        return place(seen, "solution_and_feedback", peer, feedback=said)
    inner = place(seen, "peer_success", peer)  # a task whose base reads one hint at a time: the feedback is put before the other
    if inner is None:
        return None
    outer = _SLOT.sub(
        lambda slot: {"hint": said, "question": inner.messages[inner.question]["content"]}[slot.group(1)],
        template_for(seen.templates, "feedback", template),
    )
    messages = list(inner.messages)
    messages[inner.question] = {**messages[inner.question], "content": outer}
    return View(messages=tuple(messages), kind="solution_and_feedback", hint=inner.hint, question=inner.question)


def wrong_answer(seen: ViewInput, *, template: str = "") -> View | None:
    """The final answer of the group's wrong answer with the lowest reward, shown in the form of the view `answer` (CEPO, arXiv 2605.19436)."""
    wrong = [peer for peer in seen.group if peer.verdict.status == "score" and not peer.verdict.correct]
    if not wrong:
        return None
    worst = min(wrong, key=lambda peer: peer.verdict.reward)
    return place(seen, "wrong_answer", final_answer(worst.prompt, worst.text), template)


def revision(
    seen: ViewInput,
    *,
    right: str = "Let me rephrase the above solution.",
    wrong: str = "Wait, this response is wrong. Let me correct it.",
    between: str = "\n\n",
) -> View | None:
    """The student's conversation with this very answer and a phrase of the verdict already in the assistant's turn (SD-Zero, arXiv 2604.12002)."""
    verdict, index = seen.judged.verdict, _question_index(seen)
    text = seen.judged.text if seen.hint_characters is None else seen.judged.text[: seen.hint_characters]
    if verdict.status != "score" or not text.strip():
        return None
    opening = between.join((text, right if verdict.correct else wrong, ""))
    return View(messages=seen.judged.prompt.messages, kind="revision", hint=text, question=index, opening=opening)


def instruction(seen: ViewInput, *, text: str, template: str = "") -> View | None:
    """A fixed request after the question, e.g. to be brief (OPSDC, arXiv 2603.05433)."""
    return place(seen, "instruction", text, template)


def note(seen: ViewInput, *, name: str, template: str = "") -> View | None:
    """What a writer of the recipe wrote about this answer (`writers:`)."""
    return place(seen, "note", seen.judged.notes.get(name, ""), template)


def place(seen: ViewInput, kind: str, text: str, template: str = "", feedback: str = "") -> View | None:
    """The view that shows `text`, at most `hint_characters` of it; None when nothing is left to show.

    Views of one's own end with this call.
    """
    shown = text if seen.hint_characters is None else text[: seen.hint_characters]
    if not shown.strip():
        return None
    index = _question_index(seen)
    messages = list(seen.judged.prompt.messages)
    slots = {"hint": shown, "question": messages[index]["content"], "feedback": feedback}
    content = _SLOT.sub(lambda slot: slots[slot.group(1)], template_for(seen.templates, kind, template))
    messages[index] = {**messages[index], "content": content}
    return View(messages=tuple(messages), kind=kind, hint=shown, question=index)


def template_for(templates: Mapping[str, str], kind: str, template: str = "") -> str:
    """A template written out in the recipe, else the named one, else the kind's.

    A task that has templates for its kinds only thereby overrules a name of TEMPLATES: its base reads no others.
    Raises ValueError when there is none or a slot is missing.

    """
    if "{" in template:
        text = template
    else:
        found = [name for name in (template, kind, _FALLBACK.get(kind, "")) if name in templates]
        if not found or (template and template not in {*templates, *TEMPLATES}):
            wanted, known = template or kind, sorted({*templates, *TEMPLATES} if template else templates)
            raise ValueError(
                f"no template {wanted!r}{nearest(wanted, known)}; known: {', '.join(known)}; or write one with {{hint}} and {{question}}"
            )
        text = templates[found[0]]
    missing = {"hint", "question"} - set(_SLOT.findall(text))
    if missing:
        raise ValueError(f"template {text[:60]!r} lacks {{{'}, {'.join(sorted(missing))}}}")
    return text


def resolve_view(choice: Any, templates: Mapping[str, str] = TEMPLATES, *, thinking: bool | None = None) -> ViewSpec:
    """The view that a recipe names: a name, {name: {parameter: value}} or {fn: module:function}.

    Raises ValueError for unknown names, parameters and templates, before any work starts.
    """
    function = resolve(choice, VIEWS, "view")
    given = parameters_of(function)
    name, _ = split_choice(choice, "view")
    if name not in ("fn", "plain", "revision"):
        template_for(templates, name if name == "note" else str(given.get("name", name)), str(given.get("template", "")))
    if name == "feedback" and given["solution"] != "none":
        template_for(templates, str(given["solution"]))
    return ViewSpec(view=function, templates=templates, thinking=thinking)


def _question_index(seen: ViewInput) -> int:
    messages = seen.judged.prompt.messages
    index = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), None)
    if index is None:
        raise ValueError(f"prompt {seen.judged.prompt.id!r} has no user message to put a hint into")
    return index


VIEWS: dict[str, Callable[..., View | None]] = {
    "solution": solution,
    "facts": facts,
    "answer": answer,
    "feedback": feedback,
    "demonstration": demonstration,
    "peer_success": peer_success,
    "partial_solution": partial_solution,
    "wrong_answer": wrong_answer,
    "revision": revision,
    "instruction": instruction,
    "note": note,
    "hint": hint,
    "plain": plain,
}
