"""Views as token ids: rendered by the chat template, shortened to fit, counted."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from opd_rollout.types import Completion

from opd.config.choices import nearest
from opd.text import chat
from opd.types import Judged, Meter, Prompt, Verdict, View
from opd.views import (
    ViewInput,
    ViewSpec,
    answer,
    demonstration,
    facts,
    feedback,
    hint,
    note,
    partial_solution,
    peer_success,
    revision,
    solution,
    wrong_answer,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewCounts:
    """How many answers had a view, had nothing to show, had their hint shortened, or lost their view because it could not fit."""

    shown: int
    absent: int
    shortened: int
    dropped: int


def render_views(
    tokenizer: chat.Tokenizer,
    judged: Sequence[Judged],
    spec: ViewSpec,
    max_context_tokens: int,
    controls: Mapping[str, float] | None = None,
) -> tuple[list[tuple[int, ...] | None], ViewCounts]:
    """The context ids of every answer's view (None where there is none), and counts.

    Only the hint is shortened, from its end, to fit `max_context_tokens`; a view that does not fit without it is dropped.
    Raises ValueError when the assistant's turn opens differently in different views.
    """
    tokenizer = tokenizer if spec.tokenizer is None else spec.tokenizer
    prefix = chat.assistant_prefix(tokenizer, thinking=spec.thinking)
    groups: dict[int, list[Judged]] = defaultdict(list)
    for item in judged:
        groups[item.group].append(item)
    contexts: list[tuple[int, ...] | None] = []
    absent = shortened = 0
    for item in judged:
        seen = ViewInput(judged=item, group=groups[item.group], templates=spec.templates, controls=controls or {})
        view = spec.view(seen)
        absent += view is None
        opened = None if view is None else _render(tokenizer, spec, view)
        if view is not None and opened is not None and sum(map(len, opened)) > max_context_tokens:
            opened = _shorten(tokenizer, spec, seen, len(view.hint), max_context_tokens)
            shortened += opened is not None
        if opened is not None and spec.tokenizer is None and not spec.apart:
            _check_prefix(opened[0], prefix, item.prompt_ids)
        contexts.append(None if opened is None else opened[0] + opened[1])
    shown = sum(ids is not None for ids in contexts)
    return contexts, ViewCounts(shown=shown, absent=absent, shortened=shortened, dropped=len(judged) - shown - absent)


class SignalViews:
    """Every signal's contexts of a step's answers (opd.loop.Viewer), and the counts of that step."""

    def __init__(
        self, tokenizer: chat.Tokenizer, specs: Mapping[str, ViewSpec], max_context_tokens: int, domains: Mapping[str, str] | None = None
    ) -> None:
        """domains: signal -> the domain whose prompts alone it sees; a signal that is not named, or has "", sees all."""
        self._domains = dict(domains or {})
        self._tokenizer, self._specs, self._max_context_tokens = tokenizer, dict(specs), max_context_tokens
        self._meters: dict[str, Meter] = {}
        self._last: tuple[Sequence[Judged], Mapping[str, float], dict[str, list[tuple[int, ...] | None]]] = ((), {}, {})

    def __call__(self, judged: Sequence[Judged], controls: Mapping[str, float] | None = None) -> dict[str, list[tuple[int, ...] | None]]:
        """controls: what the recipe's controllers give at this step, for the views that name one; None: as at the last call.

        Whole groups of the last call's answers get their contexts without being rendered again.
        """
        given = self._last[1] if controls is None else controls
        return self._again(judged, given) or self._render(judged, given)

    def _again(self, judged: Sequence[Judged], controls: Mapping[str, float]) -> dict[str, list[tuple[int, ...] | None]] | None:
        before, given, contexts = self._last
        groups = {answer.group for answer in judged}
        places = [place for place, answer in enumerate(before) if answer.group in groups]
        if given != controls or [id(answer) for answer in judged] != [id(before[place]) for place in places]:
            return None
        return {name: [found[place] for place in places] for name, found in contexts.items()}

    def _render(self, judged: Sequence[Judged], controls: Mapping[str, float]) -> dict[str, list[tuple[int, ...] | None]]:
        contexts: dict[str, list[tuple[int, ...] | None]] = {}
        for name, spec in self._specs.items():
            found, counts = render_views(self._tokenizer, judged, spec, self._max_context_tokens, controls)
            domain = self._domains.get(name, "")
            contexts[name] = [ids if in_domain(answer.prompt, domain) else None for answer, ids in zip(judged, found, strict=True)]
            for what in ("shortened", "dropped"):
                self._meters[f"views/{name}_{what}"] = Meter(sum=float(getattr(counts, what)), count=float(len(judged)))
        self._last = (tuple(judged), dict(controls), {name: list(found) for name, found in contexts.items()})
        return contexts

    def meters(self) -> Mapping[str, Meter]:
        """Shares of answers whose hint was shortened, or whose view was dropped because it did not fit."""
        return self._meters


def in_domain(prompt: Prompt, domain: str) -> bool:
    """Whether a prompt belongs to a domain: "" holds all, math holds math and math/algebra."""
    return not domain or prompt.domain == domain or prompt.domain.startswith(f"{domain}/")


def check_domains(domains: Mapping[str, str], prompts: Sequence[Prompt]) -> None:
    """Raises ValueError for a signal that would see no prompt, and for prompts that no signal sees although every signal has a domain."""
    there = ", ".join(sorted({repr(prompt.domain) for prompt in prompts}))
    for name, domain in domains.items():
        if domain and prompts and not any(in_domain(prompt, domain) for prompt in prompts):
            near = nearest(domain, {prompt.domain for prompt in prompts})
            raise ValueError(f"signals.{name}.domain: no training prompt has the domain {domain!r}{near}; found: {there}")
    lost = sorted({prompt.domain for prompt in prompts if domains and not any(in_domain(prompt, domain) for domain in domains.values())})
    if lost:
        raise ValueError(f"signals: no teacher sees the prompts of the domain {lost[0]!r}; declare a signal with that domain, or one without")


def prompt_context(
    tokenizer: chat.Tokenizer, spec: ViewSpec, max_context_tokens: int, encode: Callable[[Prompt], tuple[int, ...]], prompt: Prompt
) -> tuple[int, ...] | None:
    """A prompt's ids under a view that needs no answer, None where it has nothing to show or does not fit."""
    [ids], _ = render_views(tokenizer, [unanswered(prompt, encode(prompt))], spec, max_context_tokens)
    return ids


def unanswered(prompt: Prompt, prompt_ids: tuple[int, ...] = ()) -> Judged:
    """The prompt with an empty answer, for views that look at the prompt alone."""
    blank = Completion(
        token_ids=(), logprobs=torch.zeros(0), loss_mask=torch.zeros(0, dtype=torch.bool), source="", temperature=1.0, finish="stop", versions=()
    )
    return Judged(prompt=prompt, prompt_ids=prompt_ids, completion=blank, text="", verdict=Verdict(), group=0, member=0)


def check_asking_view(name: str, specs: Mapping[str, ViewSpec]) -> None:
    """Raises ValueError when answers should be sampled under a view that is not declared, or that is made of the answers themselves."""
    if not name:
        return
    if name not in specs:
        declared = ", ".join(sorted(specs)) or "none"
        raise ValueError(f"rollout.source: no signal {name!r}{nearest(name, specs)}; declared: {declared}. Answers are sampled under a signal's view")
    function = getattr(specs[name].view, "func", specs[name].view)
    if function in (peer_success, feedback, wrong_answer, revision, note):
        raise ValueError(
            f"rollout.source: the view {function.__name__!r} of signal {name!r} shows answers, and none are there yet when they are sampled; "
            "use solution, partial_solution, facts, answer, demonstration, hint or instruction"
        )


WITHOUT_SOLUTIONS = (
    "Without it: view=answer (the teacher sees the final answer alone), or a method that needs no texts of the data's: "
    "grpo or rloo (rewards), sdpo (the group's own right answers), opd (a stronger teacher)"
)


def check_hints(name: str, spec: ViewSpec, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError when a view that reads hints finds none in any of these prompts: its teacher would never see anything."""
    function = getattr(spec.view, "func", spec.view)
    if function not in (hint, solution, partial_solution, facts, answer, demonstration) or not prompts:
        return
    for prompt in prompts:
        judged = unanswered(prompt)
        if spec.view(ViewInput(judged=judged, group=[judged], templates=spec.templates, controls=defaultdict(float))) is not None:
            return
    known = sorted({known for prompt in prompts for known in prompt.hints}) or ["none"]
    raise ValueError(
        f"signals.{name}.view: no prompt of the data has what the view {function.__name__!r} shows; hints in the data: {', '.join(known)}. "
        + (f"Choose a view of one of them (view={known[0]}), or name" if known != ["none"] else "Name")
        + " the column with data.columns, e.g. {solution: COLUMN}; GSM8K's form is question, and answer with a solution before ####. "
        + WITHOUT_SOLUTIONS
    )


Opened = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids up to the assistant's turn, and of what already stands in it."""


def _render(tokenizer: chat.Tokenizer, spec: ViewSpec, view: View) -> Opened:
    return chat.render(tokenizer, view.messages, thinking=spec.thinking), chat.tokenize(tokenizer, view.opening) if view.opening else ()


def _shorten(tokenizer: chat.Tokenizer, spec: ViewSpec, seen: ViewInput, hint_characters: int, max_context_tokens: int) -> Opened | None:
    fits, best = 0, None
    while hint_characters - fits > 1:
        middle = (fits + hint_characters) // 2
        view = spec.view(replace(seen, hint_characters=middle))
        opened = None if view is None else _render(tokenizer, spec, view)
        if opened is None or sum(map(len, opened)) <= max_context_tokens:
            fits, best = middle, opened if opened is not None else best
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
