"""The views and writers of a recipe: resolved, judged against its data and objective, put around the source."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from opd_rollout.types import Sampling
from transformers import PreTrainedTokenizerBase

from opd.build import pretrained
from opd.build.problems import Problems
from opd.build.speaking import Choices, check_debates, check_speakers, checked_room, longest_text, teacher_desks
from opd.build.student import tokenizer_at
from opd.config.choices import name_of, nearest, parameters_of
from opd.config.recipe import Recipe
from opd.contexts import check_asking_view, check_domains, check_hints
from opd.objective import Objective
from opd.revising import REVISION, Pen, Phrases, RevisedSource
from opd.sampler import parse_sampler
from opd.source import RolloutSource, parse_source
from opd.teacher.aligned import AlignedTeacher
from opd.teacher.score import Weights
from opd.text import chat
from opd.types import Verifier
from opd.views import ViewSpec, resolve_view
from opd.writing import AnnotatedSource, Desk, Writer, check_writer

FOREIGN = "foreign"
Source = RolloutSource | RevisedSource | AnnotatedSource
OTHERS = ("external", "served", FOREIGN)
"""Kinds of weights that are another model: with the student's tokenizer, or with one of its own."""


def checked_views(recipe: Recipe, problems: Problems, objective: Objective, choices: Mapping[str, tuple[str, Any]]) -> dict[str, ViewSpec]:
    """Every signal's view. Raises ValueError where it could never show anything, or something else reads what is not there."""
    specs = {name: resolve_view(signal.view, problems.templates) for name, signal in recipe.signals.items()}
    for name, spec in specs.items():
        check_hints(name, spec, problems.train)
    check_controllers(recipe, specs)
    check_domains({name: signal.domain for name, signal in recipe.signals.items()}, problems.train)
    check_asking_view(parse_source(recipe.rollout.source).view, specs)
    check_hidden_signals(objective, choices)
    check_foreign(recipe, objective, {name for name, (kind, _) in choices.items() if kind == FOREIGN})
    check_writers(recipe, specs, objective)
    check_speakers(recipe, choices)
    check_debates(recipe, objective)
    own = {name: tokenizer_at(recipe, pretrained.find_model(path)) for name, (kind, path) in choices.items() if kind == FOREIGN}
    modes = {name: recipe.data.thinking if s.thinking == "student" else s.thinking for name, s in recipe.signals.items()}
    return {
        name: replace(spec, tokenizer=own.get(name), thinking=modes[name], apart=modes[name] != recipe.data.thinking) for name, spec in specs.items()
    }


def template_notes(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, choices: Mapping[str, tuple[str, Any]]) -> list[str]:
    """A sentence for every teacher that reads another chat template or thinking mode than it was made for, or than the student does."""
    notes, ours = [], _opening(tokenizer, recipe.data.thinking)
    for name, signal in recipe.signals.items():
        mode = recipe.data.thinking if signal.thinking == "student" else signal.thinking
        opening = _opening(tokenizer, mode)
        if opening != ours:
            notes.append(f"signals.{name}: on purpose, its turn opens with {opening!r}, the student's with {ours!r}")
        kind, path = choices[name]
        if kind not in ("external", "served"):
            continue
        theirs = tokenizer_at(recipe, pretrained.find_model(path))
        if theirs.chat_template != tokenizer.chat_template:
            own = _opening(theirs, mode)
            turns = f"a turn opens with {opening!r}" + (f", where the teacher's own opens with {own!r}" if own != opening else " in both")
            notes.append(f"signals.{name}: the chat template of {path} is not the student's, whose template is used for both: {turns}")
    return notes


def _opening(tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> str:
    return tokenizer.decode(list(chat.assistant_prefix(tokenizer, thinking=thinking)), skip_special_tokens=False)


def aligned(weights: Weights, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Weights:
    """A scorer of another tokenizer's ids as one of the student's."""
    return Weights(scores=AlignedTeacher(weights.scores, student=student, teacher=teacher).scores)


def check_foreign(recipe: Recipe, objective: Objective, foreign: Collection[str]) -> None:
    """Raises ValueError where something needs ids in common with a teacher of another tokenizer."""
    drawn = parse_sampler(recipe.rollout.sampler)
    if drawn is not None and drawn.signal in foreign:
        raise ValueError(f"rollout.sampler draws with {drawn.signal!r}, whose tokenizer is its own; sample with the student: rollout.sampler=student")
    for term in objective.terms:
        if term.support is not None and term.support.kind == "unpaired" and term.signal not in foreign:
            raise ValueError(
                f"term {term.name!r}: support unpaired reads tokens that only one of two tokenizers has, and signal {term.signal!r} has the "
                "student's; give it one of its own, {external: {path: FOLDER, tokenizer: own}}, or use support: teacher_topk"
            )
        if not term.signals & set(foreign) or term.support is None:
            continue
        kind, loss = term.support.kind, name_of(term.loss) if term.loss else ""
        if kind in ("spans", "teacher_topk", "sampled", "unpaired") and term.target is None or (kind == "student_topk" and loss == "rank_distance"):
            continue
        raise ValueError(
            f"term {term.name!r} compares student and teacher id by id, and the tokenizer of {', '.join(sorted(term.signals & set(foreign)))} is its "
            "own. Legal: {span_likelihood: {}} on support: spans (alm); a divergence on {teacher_topk: {k: 64, tail: bucket}}, where tokens with the "
            "same bytes are paired (gold); rank_distance on {student_topk: {k: 64, tail: bucket}} (uld) or on {unpaired: {k: 64}} (gold_hybrid)"
        )


def with_writers(
    source: RolloutSource,
    recipe: Recipe,
    desk: Desk,
    tokenizer: PreTrainedTokenizerBase,
    verify: Verifier,
    choices: Choices,
    teachers: Mapping[str, torch.nn.Module],
) -> Source:
    """The source, its answers revised by the student where the recipe says so, and whoever writes about them. desk: the student's, its room
    without a text. Raises ValueError for a writer without room for a request."""
    if recipe.rollout.revise:
        tokenize, s = partial(chat.tokenize, tokenizer), recipe.sampling
        sampling = Sampling(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_tokens=s.max_tokens, stop_ids=desk.stop_ids)
        pen = Pen(engine=desk.engine, verify=verify, tokenize=tokenize, decode=desk.decode, sampling=sampling, seed=recipe.seed)
        return RevisedSource(source, Phrases(**recipe.rollout.revise.model_dump()), pen)
    if not recipe.writers:
        return source
    longest = longest_text(recipe)
    desk = replace(desk, room=checked_room(desk.room - longest, "the student", longest))
    writers = {name: Writer(**writer.model_dump()) for name, writer in recipe.writers.items()}
    return AnnotatedSource(source, writers, desk, teacher_desks(recipe, choices, teachers, tokenizer, desk))


def check_controllers(recipe: Recipe, specs: Mapping[str, ViewSpec]) -> None:
    """Raises ValueError for a view that reads a controller which the recipe does not declare, and for one that nobody reads."""
    read = {name: share for name, spec in specs.items() if isinstance(share := parameters_of(spec.view).get("share"), str)}
    declared = ", ".join(sorted(recipe.controllers)) or "none"
    for name, share in read.items():
        if share not in recipe.controllers:
            raise ValueError(
                f"signals.{name}.view: share is {share!r}{nearest(share, recipe.controllers)}, a number between 0 and 1 or the name of a controller; "
                f"declared: {declared}. Add e.g. controllers: {{{share}: {{learned_exposure: {{steps: {recipe.steps}}}}}}}"
            )
    for name in set(recipe.controllers) - set(read.values()):
        raise ValueError(f"controllers.{name} is read by no view; name it in one, e.g. view: {{partial_solution: {{share: {name}}}}}")


def check_hidden_signals(objective: Objective, choices: Mapping[str, tuple[str, Any]]) -> None:
    """Raises ValueError where hidden states of two different models would be compared."""
    for term in objective.terms:
        if term.support and term.support.kind == "hidden" and term.signal and choices[term.signal][0] in OTHERS:
            raise ValueError(
                f"term {term.name!r}: match: hidden_states compares the student with itself under another view, and signals.{term.signal} is "
                "another model, whose hidden states mean something else; use teacher: live | frozen | {ema: {}}, or distill: forward_kl"
            )


def check_writers(recipe: Recipe, specs: Mapping[str, ViewSpec], objective: Objective) -> None:
    """Raises ValueError for a request that cannot be made, and for views and weights that read what nobody writes."""
    for name, writer in recipe.writers.items():
        check_writer(name, Writer(**writer.model_dump()))
    read = {f"signals.{name}.view": parameters_of(spec.view).get("name") for name, spec in specs.items() if name_of(spec.view) == "note"}
    marks = {f"weight of term {t.name!r}": parameters_of(f).get("name") for t in objective.terms for f in t.fields if name_of(f) == "marked"}
    if recipe.rollout.revise and recipe.writers:
        raise ValueError("rollout.revise and writers: who writes about an answer reads one attempt, not attempt and revision: leave one of them out")
    if recipe.rollout.revise:
        marks = {where: name for where, name in marks.items() if name != REVISION}
    for where, name in {**read, **marks}.items():
        declared = ", ".join(sorted(recipe.writers)) or "none"
        if name not in recipe.writers:
            raise ValueError(f"{where} reads what {name!r} writes{nearest(str(name), recipe.writers)}; declared: {declared}. Add writers.{name}")
        if where in marks and not recipe.writers[name].points:
            raise ValueError(f"{where} needs tokens that {name!r} points at; set writers.{name}.points=true")
