"""Qwen3, Llama and Gemma students as a run builds them, made small with random weights: ends of answers, padded heads, templates that differ."""

import pytest
import torch
from opd_rollout.parity import audit
from opd_rollout.types import GenerateRequest, Sampling, ScoreRequest

from opd.build import shapes
from opd.build.system import build_parts, parse_weights
from opd.build.views import template_notes
from opd.config.load import parse_recipe

MODELS = {"qwen3": "Qwen/Qwen3-0.6B", "llama3": "meta-llama/Llama-3.2-1B-Instruct", "gemma3": "google/gemma-3-1b-it"}
SCALE = 0.003


@pytest.fixture(scope="module", params=MODELS)
def built(request):
    recipe = parse_recipe(
        {
            "method": "opsd", "model": {"path": MODELS[request.param], "init": "random", "scale": SCALE}, "data": {"preset": "gsm8k"},
            "rollout": {"prompts": 2}, "sampling": {"max_tokens": 48}, "learner": {"kind": "torch", "packed": True},
            "eval": {"num_problems": 2, "final_problems": 0},
        }
    )  # fmt: skip
    parts = build_parts(recipe)
    yield request.param, recipe, parts
    parts.learner.close()
    parts.engine.close()


def answers(parts, number, max_tokens=48):
    requests = [GenerateRequest(prompt_ids=parts.encode(parts.problems.train[0]), seed=n) for n in range(number)]
    return parts.engine.generate(requests, Sampling(temperature=1.0, max_tokens=max_tokens, stop_ids=parts.stop_ids))


def test_every_end_of_the_generation_config_ends_an_answer(built):
    """The tokenizer's own end first, then what the family lists besides; random weights draw each of them now and then."""
    family, recipe, parts = built
    listed = shapes.shape_generation(MODELS[family], SCALE).eos_token_id
    assert list(parts.stop_ids) == listed and len(listed) == {"qwen3": 2, "llama3": 3, "gemma3": 2}[family]
    found = answers(parts, 160, max_tokens=32)
    ended = {one.token_ids[-1] for one in found if one.finish == "stop"}
    assert ended == set(listed), "each of them was drawn"
    for one in found:
        assert (one.finish == "stop") == (one.token_ids[-1] in listed) and not set(one.token_ids[:-1]) & set(listed)


def test_rows_beyond_the_tokenizer_are_never_drawn_and_have_no_mass(built):
    _, _, parts = built
    size, rows = len(parts.tokenizer), parts.learner.policy.model.get_output_embeddings().weight.shape[0]
    assert rows > size
    assert max(token for one in answers(parts, 64) for token in one.token_ids) < size
    request = ScoreRequest(context_ids=parts.encode(parts.problems.train[0]), completion_ids=(5, 6, 7), k=size)
    [scores] = parts.learner.teacher_pass([request], "live")
    assert torch.allclose(scores.logp.logsumexp(-1), torch.zeros(3), atol=1e-5) and scores.ids.max() < size


def test_engine_and_packed_learner_mean_the_same(built):
    _, _, parts = built
    requests = [GenerateRequest(prompt_ids=parts.encode(prompt), seed=n) for n, prompt in enumerate(parts.problems.train[:4])]
    sampling = Sampling(temperature=1.0, max_tokens=48, stop_ids=parts.stop_ids)
    gap = audit(parts.engine, lambda asked, _: parts.learner.teacher_pass(asked, "live"), requests, sampling)
    assert gap.max < 1e-4 and gap.num_tokens > 50


def test_a_teacher_with_another_template_is_said_at_the_start(built, monkeypatch):
    family, recipe, parts = built
    choices = {name: parse_weights(name, signal.weights) for name, signal in recipe.signals.items()}
    assert template_notes(recipe, parts.tokenizer, choices) == []
    apart = parse_recipe(recipe.model_dump(), {"data.thinking": False, "signals.main.thinking": True, "teacher": "", "view": ""}, resolved=True)
    assert len(template_notes(apart, parts.tokenizer, choices)) == (family == "qwen3"), "only its template knows of thinking"
    elsewhere = {"external": {"path": MODELS[family]}}
    other = parse_recipe(recipe.model_dump(), {"signals.main.weights": elsewhere, "teacher": "", "view": ""}, resolved=True)
    theirs = shapes.standin_tokenizer(shapes.find_shape(MODELS[family])["family"], len(parts.tokenizer))
    theirs.chat_template += "{% if add_generation_prompt %}Answer: {% endif %}"
    monkeypatch.setattr("opd.build.views.tokenizer_at", lambda recipe, path: theirs)
    [note] = template_notes(other, parts.tokenizer, {"main": ("external", MODELS[family])})
    assert "is not the student's" in note and "Answer: " in note
