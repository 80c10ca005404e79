"""Chat templates and thinking modes of student and views: alike unless the recipe says otherwise, and said at the start."""

import pytest

from opd.build import shapes
from opd.build.system import build_parts, parse_weights
from opd.build.views import template_notes
from opd.config.load import parse_recipe
from opd.contexts import unanswered

DRY = {
    "method": "opsd", "model": {"path": "Qwen/Qwen3-0.6B", "init": "random", "scale": 0.02}, "data": {"preset": "gsm8k"},
    "rollout": {"prompts": 2}, "sampling": {"max_tokens": 4}, "learner": {"kind": "torch"}, "eval": {"num_problems": 2, "final_problems": 0},
}  # fmt: skip
NO_THOUGHT = "<think>\n\n</think>\n\n"


def endings(changes):
    """(last text of the student's prompt, of the teacher's view, notes)."""
    recipe = parse_recipe(DRY, changes)
    parts = build_parts(recipe)
    prompt = parts.problems.train[0]
    ids = parts.encode(prompt)
    [view] = parts.views([unanswered(prompt, ids)])["main"]
    choices = {name: parse_weights(name, signal.weights) for name, signal in recipe.signals.items()}
    notes = template_notes(recipe, parts.tokenizer, choices)
    parts.learner.close()
    parts.engine.close()
    return parts.tokenizer.decode(ids)[-60:], parts.tokenizer.decode(view)[-60:], notes


@pytest.mark.parametrize("mode", [None, True, False])
def test_a_view_thinks_as_the_student_does(mode):
    student, teacher, notes = endings({"data.thinking": mode})
    assert student.endswith(NO_THOUGHT) == teacher.endswith(NO_THOUGHT) == (mode is False) and notes == []


def test_a_teacher_that_thinks_beside_a_student_that_does_not_is_said():
    student, teacher, [note] = endings({"data.thinking": False, "signals.main.thinking": True})
    assert student.endswith(NO_THOUGHT) and not teacher.endswith(NO_THOUGHT)
    assert note.startswith("signals.main: on purpose") and "</think>" in note


def test_another_chat_template_of_the_teacher_is_said(monkeypatch):
    recipe = parse_recipe({**DRY, "method": "opd_topk"}, {"teacher.external.path": "Qwen/Qwen3-8B"})
    student = shapes.shape_tokenizer("Qwen/Qwen3-0.6B", 0.02)
    choices = {"main": ("external", "Qwen/Qwen3-8B")}
    assert template_notes(recipe, student, choices) == []
    theirs = shapes.standin_tokenizer("qwen3", len(student))
    theirs.chat_template = theirs.chat_template.replace("assistant\n", "assistant: ", 1)
    monkeypatch.setattr("opd.build.views.tokenizer_at", lambda recipe, path: theirs)
    [note] = template_notes(recipe, student, choices)
    assert "is not the student's" in note and "'<|im_start|>assistant: '" in note
