"""What a teacher reads before the student's tokens and the student does not: small pure functions from an answer and its group to a View.

A view is the student's own conversation with the last user message rewritten by a template: a plain text with {hint} and {question}.
Templates come from the embedded task (its base was trained on them) or, for real text, from TEMPLATES below; a recipe may write its own.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from opd_rollout.types import Completion

from opd import chat
from opd.choices import nearest, parameters_of, resolve, split_choice
from opd.types import Judged, Meter, Prompt, Verdict, View

_SLOT = re.compile(r"\{(hint|question)\}")
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
}
_FALLBACK = {"peer_success": "solution", "demonstration": "solution"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewInput:
    """What a view may look at. group: all answers to the same prompt, this one included. hint_characters: longest hint that still fits."""

    judged: Judged
    group: Sequence[Judged]
    templates: Mapping[str, str]
    hint_characters: int | None = None


ViewFunction = Callable[[ViewInput], View | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """A view ready to be called: the function with its parameters bound, and the templates it may use."""

    view: ViewFunction
    templates: Mapping[str, str]
    thinking: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewCounts:
    """How many answers had a view, had nothing to show, had their hint shortened, or lost their view because it could not fit."""

    shown: int
    absent: int
    shortened: int
    dropped: int


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
    for peer in seen.group:
        if peer.verdict.status == "score" and peer.verdict.correct and (own or peer.member != seen.judged.member):
            return place(seen, "peer_success", _THOUGHT.sub("", peer.text).strip(), template)
    return None


def feedback(seen: ViewInput, *, solution: Literal["none", "peer_success"] = "none", own: bool = False, template: str = "") -> View | None:
    """The verifier's feedback on this answer; solution "peer_success": a correct sibling's answer instead, where the group has one."""
    shown = peer_success(seen, own=own) if solution == "peer_success" else None
    verdict = seen.judged.verdict
    return shown or place(seen, "feedback", verdict.feedback if verdict.status == "score" else "", template)


def place(seen: ViewInput, kind: str, text: str, template: str = "") -> View | None:
    """The view that shows `text`, at most `hint_characters` of it; None when nothing is left to show.

    Views of one's own end with this call.
    """
    shown = text if seen.hint_characters is None else text[: seen.hint_characters]
    if not shown.strip():
        return None
    index = _question_index(seen)
    messages = list(seen.judged.prompt.messages)
    slots = {"hint": shown, "question": messages[index]["content"]}
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
    if name not in ("fn", "plain"):
        template_for(templates, str(given.get("name", name)), str(given.get("template", "")))
    if name == "feedback" and given["solution"] != "none":
        template_for(templates, str(given["solution"]))
    return ViewSpec(view=function, templates=templates, thinking=thinking)


def render_views(
    tokenizer: chat.Tokenizer, judged: Sequence[Judged], spec: ViewSpec, max_context_tokens: int
) -> tuple[list[tuple[int, ...] | None], ViewCounts]:
    """The context ids of every answer's view (None where there is none), and counts.

    Only the hint is shortened, from its end, to fit `max_context_tokens`; a view that does not fit without it is dropped.
    Raises ValueError when the assistant's turn opens differently in different views.
    """
    prefix = chat.assistant_prefix(tokenizer, thinking=spec.thinking)
    groups: dict[int, list[Judged]] = defaultdict(list)
    for item in judged:
        groups[item.group].append(item)
    contexts: list[tuple[int, ...] | None] = []
    absent = shortened = 0
    for item in judged:
        seen = ViewInput(judged=item, group=groups[item.group], templates=spec.templates)
        view = spec.view(seen)
        ids = None if view is None else chat.render(tokenizer, view.messages, thinking=spec.thinking)
        absent += view is None
        if view is not None and ids is not None and len(ids) > max_context_tokens:
            ids = _shorten(tokenizer, spec, seen, len(view.hint), max_context_tokens)
            shortened += ids is not None
        if ids is not None:
            _check_prefix(ids, prefix, item.prompt_ids)
        contexts.append(ids)
    shown = sum(ids is not None for ids in contexts)
    return contexts, ViewCounts(shown=shown, absent=absent, shortened=shortened, dropped=len(judged) - shown - absent)


class SignalViews:
    """Every signal's contexts of a step's answers (opd.loop.Viewer), and the counts of the last call."""

    def __init__(self, tokenizer: chat.Tokenizer, specs: Mapping[str, ViewSpec], max_context_tokens: int) -> None:
        self._tokenizer, self._specs, self._max_context_tokens = tokenizer, dict(specs), max_context_tokens
        self._meters: dict[str, Meter] = {}

    def __call__(self, judged: Sequence[Judged]) -> dict[str, list[tuple[int, ...] | None]]:
        contexts = {}
        for name, spec in self._specs.items():
            contexts[name], counts = render_views(self._tokenizer, judged, spec, self._max_context_tokens)
            for what in ("shortened", "dropped"):
                self._meters[f"views/{name}_{what}"] = Meter(sum=float(getattr(counts, what)), count=float(len(judged)))
        return contexts

    def meters(self) -> Mapping[str, Meter]:
        """Shares of answers whose hint was shortened, or whose view was dropped because it did not fit."""
        return self._meters


def check_hints(name: str, spec: ViewSpec, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError when a view that reads hints finds none in any of these prompts: its teacher would never see anything."""
    function = getattr(spec.view, "func", spec.view)
    if function not in (hint, solution, facts, answer, demonstration) or not prompts:
        return
    blank = Completion(
        token_ids=(), logprobs=torch.zeros(0), loss_mask=torch.zeros(0, dtype=torch.bool), source="", temperature=1.0, finish="stop", versions=()
    )
    for prompt in prompts:
        judged = Judged(prompt=prompt, prompt_ids=(), completion=blank, text="", verdict=Verdict(), group=0, member=0)
        if spec.view(ViewInput(judged=judged, group=[judged], templates=spec.templates)) is not None:
            return
    known = sorted({known for prompt in prompts for known in prompt.hints}) or ["none"]
    raise ValueError(
        f"signals.{name}.view: no prompt of the data has what the view {function.__name__!r} shows; hints in the data: {', '.join(known)}. "
        "Choose a view of one of them, or name the column with data.columns, e.g. {solution: COLUMN}"
    )


def _shorten(
    tokenizer: chat.Tokenizer, spec: ViewSpec, seen: ViewInput, hint_characters: int, max_context_tokens: int
) -> tuple[int, ...] | None:
    fits, best = 0, None
    while hint_characters - fits > 1:
        middle = (fits + hint_characters) // 2
        view = spec.view(replace(seen, hint_characters=middle))
        ids = None if view is None else chat.render(tokenizer, view.messages, thinking=spec.thinking)
        if ids is None or len(ids) <= max_context_tokens:
            fits, best = middle, ids if ids is not None else best
        else:
            hint_characters = middle
    return best


def _check_prefix(ids: tuple[int, ...], prefix: tuple[int, ...], prompt_ids: tuple[int, ...]) -> None:
    for name, context in (("view", ids), ("student's prompt", prompt_ids)):
        if context[len(context) - len(prefix) :] != prefix:
            raise ValueError(
                f"the {name} does not end with the assistant's opening {list(prefix)}: "
                "student and views need one chat template and one thinking mode"
            )


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
    "hint": hint,
    "plain": plain,
}
