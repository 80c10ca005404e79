"""Prompts and verifier of a recipe: an embedded task, or a file with held-out lines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from opd.prompts import PromptStream, read_prompts, shuffled_stream, split_prompts, task_prompts, task_stream
from opd.recipe import Recipe
from opd.tasks import HINT_TEMPLATES, TASKS
from opd.types import Prompt, Verifier
from opd.verify import as_verifier, make_verifier
from opd.views import TEMPLATES

CHECKED_PROMPTS = 32  # of an endless stream, before the run starts; a file is checked whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """What the student trains on and is examined on, and who judges. train: all of a file, the first ones of an endless stream."""

    stream: PromptStream
    train: Sequence[Prompt]
    dev: Sequence[Prompt]
    test: Sequence[Prompt]
    verify: Verifier
    templates: Mapping[str, str]
    corpus: Callable[[], Sequence[str]]
    suite: str


def load_problems(recipe: Recipe, verifier: Callable[..., Any] | None) -> Problems:
    """Prompts and verifier: an embedded task, or a JSONL file with held-out lines."""
    data, ev = recipe.data, recipe.eval
    if bool(data.task) == bool(data.path):
        raise ValueError("data: give either task (embedded: " + ", ".join(sorted(TASKS)) + ") or path (a JSONL file)")
    choice = data.verifier if data.verifier != "auto" else ("task" if data.task else "math")
    verify = as_verifier(verifier) if verifier else make_verifier(choice)
    if data.task:
        task = TASKS.get(data.task)
        level = data.difficulty
        stream = task_stream(data.task, data.split, recipe.seed, level)
        assert task is not None
        return Problems(
            stream=stream,
            train=list(islice(task.prompts(data.split, recipe.seed, level or task.difficulties[0]), CHECKED_PROMPTS)),
            dev=task_prompts(data.task, "dev", ev.num_problems, difficulty=level),
            test=task_prompts(data.task, "test", ev.final_problems, difficulty=level),
            verify=verify,
            templates=HINT_TEMPLATES,
            corpus=lambda: [task.characters],
            suite=data.task,
        )
    gold = None if verifier or not isinstance(choice, str) else verify
    prompts = read_prompts(data.path, columns=data.columns, system=data.system, verify=gold)
    held_out = ev.num_problems + ev.final_problems
    if data.eval_path:
        exam = read_prompts(data.eval_path, columns=data.columns, system=data.system, verify=gold)[:held_out]
    elif held_out:
        prompts, exam = split_prompts(prompts, min(held_out, max(2, len(prompts) // 5)))
    else:
        exam = []
    num_dev = min(ev.num_problems, len(exam) // 2 if ev.final_problems else len(exam))
    return Problems(
        stream=shuffled_stream(prompts, recipe.seed),
        train=prompts,
        dev=exam[:num_dev],
        test=exam[num_dev : num_dev + ev.final_problems],
        verify=verify,
        templates=TEMPLATES,
        corpus=lambda: [m["content"] for p in prompts for m in p.messages] + [h for p in prompts for h in p.hints.values()],
        suite=Path(data.path).stem,
    )
