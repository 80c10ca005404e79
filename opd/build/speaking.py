"""Teachers that write tokens: beside the student in an answer, or texts of their own."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from opd_rollout.engine import Engine
from opd_rollout.mixing import Partner
from opd_rollout.torch_engine import TorchEngine
from transformers import PreTrainedTokenizerBase

from opd.build.student import pad_id, room_for_prompts
from opd.config.choices import name_of, nearest, parameters_of
from opd.config.recipe import Recipe
from opd.objective import Objective
from opd.sampler import Sampler
from opd.text import chat
from opd.text.token_bytes import token_bytes
from opd.writing import Desk

Choices = Mapping[str, tuple[str, Any]]


def drawn_with(
    sampler: Sampler, student: torch.nn.Module, teachers: Mapping[str, torch.nn.Module], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> TorchEngine:
    """An engine in which a teacher draws tokens with the student. Raises ValueError unless the sampler's signal has a model of its own."""
    check_drawing(sampler, teachers)
    partner = Partner(model=teachers[sampler.signal], mix=sampler.mix)
    options = {"pad_id": pad_id(tokenizer), "token_budget": recipe.engine.token_budget, "vocab_size": len(tokenizer)}
    return TorchEngine(student, partner=partner, **options)


def check_drawing(sampler: Sampler, own: Collection[str]) -> None:
    """Raises ValueError unless the sampler's signal is among those that have a model of their own in this process."""
    if sampler.signal not in own:
        raise ValueError(
            f"rollout.sampler draws with the signal {sampler.signal!r}, which has no model of its own here (signals that have: "
            f"{', '.join(sorted(own)) or 'none'}); give it weights {{external: {{path: FOLDER}}}}, or frozen without LoRA"
        )


def desk_of(engine: Engine, tokenizer: PreTrainedTokenizerBase, room: int, stop_ids: tuple[int, ...]) -> Desk:
    """A desk around an engine that speaks this tokenizer's ids. room: longest request, tokens."""
    render, decode, pieces = partial(chat.render, tokenizer), partial(chat.decode, tokenizer), partial(token_bytes, tokenizer)
    return Desk(engine=engine, render=render, decode=decode, pieces=pieces, room=room, stop_ids=stop_ids)


def teacher_desks(
    recipe: Recipe, choices: Choices, teachers: Mapping[str, torch.nn.Module], tokenizer: PreTrainedTokenizerBase, student: Desk
) -> dict[str, Desk]:
    """Signal -> the desk of each that the recipe's writers name: the student's for live weights, else one around the teacher's model."""
    desks, longest = {}, longest_text(recipe)
    for name in sorted({speaker for writer in recipe.writers.values() for speaker in writer.by}):
        if choices[name][0] == "live":
            desks[name] = student
            continue
        model, whose = teachers[name], f"signals.{name}"
        options = {"pad_id": pad_id(tokenizer), "token_budget": recipe.engine.token_budget, "vocab_size": len(tokenizer)}
        room = room_for_prompts(recipe, model.config, whose, False) + recipe.sampling.max_tokens - longest
        stop_ids = chat.stop_ids(tokenizer, model.generation_config)
        desks[name] = desk_of(TorchEngine(model, **options), tokenizer, checked_room(room, whose, longest), stop_ids)
    return desks


def longest_text(recipe: Recipe) -> int:
    """Tokens of the longest text that a writer may write at once."""
    return max(writer.max_tokens for writer in recipe.writers.values())


def checked_room(room: int, whose: str, longest: int) -> int:
    """The room for a request, tokens. Raises ValueError where there is none."""
    if room < 1:
        raise ValueError(f"writers: a text of {longest} tokens leaves {whose} no position for the request: lower max_tokens of the writers")
    return room


def check_speakers(recipe: Recipe, choices: Choices) -> None:
    """Raises ValueError for a writer whose signals are not there, cannot write, or would all say the same."""
    reasons = {
        "ema": "the average has no engine", "served": "vLLM only scores for teachers here", "foreign": "its tokenizer is its own",
        "frozen": "under LoRA the frozen student is no model of its own" if recipe.model.lora else "",
    }  # fmt: skip
    for name, writer in recipe.writers.items():
        for speaker in writer.by:
            if speaker not in choices:
                declared = ", ".join(sorted(choices)) or "none"
                raise ValueError(f"writers.{name}.by names {speaker!r}{nearest(speaker, choices)}, and the recipe's signals are: {declared}")
            if reason := reasons.get(choices[speaker][0]):
                raise ValueError(
                    f"writers.{name}.by names {speaker!r}, which cannot write: {reason}. Weights that can: {{external: {{path: FOLDER}}}} in this "
                    "process, live, frozen without LoRA"
                )
        if writer.by and recipe.asynchrony.max_staleness and any(choices[speaker][0] != "live" for speaker in writer.by):
            raise ValueError(
                f"writers.{name}.by: teachers write in the learner's process, between its steps, and asynchrony.max_staleness="
                f"{recipe.asynchrony.max_staleness} collects answers while it works: use asynchrony.max_staleness=0"
            )
        words = writer.ask + writer.reply + writer.role
        if len(writer.by) > 1 and len({repr(choices[speaker]) for speaker in writer.by}) == 1 and "{speaker}" not in words:
            raise ValueError(
                f"writers.{name}.by: {', '.join(writer.by)} have the same weights and are asked the same words, so they say the same: give them "
                'other weights, or tell them apart, e.g. role: "You are {speaker}."'
            )


def check_debates(recipe: Recipe, objective: Objective) -> None:
    """Raises ValueError for a share by confidence without a debate in which its teacher speaks."""
    for term in objective.terms:
        if name_of(term.route) != "confidence_share":
            continue
        name, where = str(parameters_of(term.route)["writer"]), f"route of term {term.name!r}"
        if name not in recipe.writers:
            declared = ", ".join(sorted(recipe.writers)) or "none"
            raise ValueError(f"{where} reads how sure the speakers of {name!r} are{nearest(name, recipe.writers)}; declared writers: {declared}")
        by = recipe.writers[name].by
        if len(by) < 2:
            raise ValueError(
                f"{where}: one teacher alone has the whole share; writers.{name}.by must name two or more signals. A method with one teacher is "
                "opd_full or gkd"
            )
        if term.view_signal not in by:
            raise ValueError(
                f"{where}: its teacher {term.view_signal!r} does not speak in {name!r}, which is by {', '.join(by)}; add it to writers.{name}.by"
            )
