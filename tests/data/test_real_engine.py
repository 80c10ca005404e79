"""The source with a real engine, real text, chat template, math verifier and views: what a JSONL run does before any learning."""

from pathlib import Path

import pytest
import torch
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import Sampling, ScoreRequest
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.contexts import render_views
from opd.data.records import read_records
from opd.prompts import read_prompts, shuffled_stream, task_stream
from opd.source import Codec, RolloutSource, SourceSettings
from opd.tasks import TASKS
from opd.tasks.tokenizer import character_tokenizer
from opd.tasks.types import task_corpus
from opd.text import chat
from opd.text.bpe import train_byte_bpe
from opd.types import Judged
from opd.verify import make_verifier
from opd.views import TEMPLATES, resolve_view

SAMPLE = Path(__file__).parent / "gsm8k_like.jsonl"


def tiny_engine(tokenizer) -> TorchEngine:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return TorchEngine(Qwen3ForCausalLM(config).eval(), pad_id=tokenizer.pad_token_id, token_budget=8192)


def source_over(tokenizer, stream, verify, max_tokens, **settings) -> RolloutSource:
    [end] = chat.stop_ids(tokenizer)
    codec = Codec(
        encode=lambda prompt: chat.render(tokenizer, prompt.messages),
        tokenize=lambda text: chat.tokenize(tokenizer, text),
        decode=lambda ids: chat.decode(tokenizer, ids),
        end=end,
    )
    sampling = Sampling(max_tokens=max_tokens, stop_ids=(end,))
    return RolloutSource(
        tiny_engine(tokenizer), stream, make_verifier(verify), codec, sampling, SourceSettings(num_prompts=3, group=2, seed=1, **settings)
    )


def outline(judged: list[Judged]):
    return [(j.prompt.id, j.completion.token_ids, j.completion.logprobs.tolist(), j.verdict) for j in judged]


@pytest.fixture(scope="module")
def real_text():
    prompts, _ = read_prompts(read_records(str(SAMPLE)), verify=make_verifier("math"))
    tokenizer = train_byte_bpe([text for p in prompts for text in (p.messages[0]["content"], p.hints["solution"])], 400)
    return prompts, tokenizer


def test_jsonl_rollouts_repeat_bitwise_and_keep_their_tokens(real_text):
    prompts, tokenizer = real_text
    [end] = chat.stop_ids(tokenizer)
    runs = []
    for _ in range(2):
        source = source_over(tokenizer, shuffled_stream(prompts, 0), "math", 24)
        runs.append([outline(source.collect(step)) for step in range(2)])
    assert runs[0] == runs[1]
    judged = source.collect(2)
    for item in judged:
        ids = item.completion.token_ids
        assert item.prompt_ids == chat.render(tokenizer, item.prompt.messages)
        assert (ids[-1] == end) == (item.completion.finish == "stop")
        assert end not in ids[:-1]
        assert item.verdict.status == "score"


def test_jsonl_views_score_the_students_own_tokens(real_text):
    prompts, tokenizer = real_text
    source = source_over(tokenizer, shuffled_stream(prompts, 0), "math", 24)
    judged = source.collect(0)
    contexts, counts = render_views(tokenizer, judged, resolve_view({"solution": {"template": "opsd"}}, TEMPLATES), 900)
    assert (counts.shown, counts.absent, counts.dropped, counts.shortened) == (6, 0, 0, 0)
    plain, _ = render_views(tokenizer, judged, resolve_view("plain", TEMPLATES), 900)
    assert plain == [item.prompt_ids for item in judged]
    for item, context in zip(judged, contexts, strict=True):
        assert item.prompt.hints["solution"] in tokenizer.decode(context)
    engine = source._engine
    scored = engine.score(
        [ScoreRequest(context_ids=c, completion_ids=j.completion.token_ids) for c, j in zip(plain, judged, strict=True)], 1.0
    )
    for item, score in zip(judged, scored, strict=True):
        assert torch.allclose(score.sampled, item.completion.logprobs, atol=1e-4)
    privileged = engine.score(
        [ScoreRequest(context_ids=c, completion_ids=j.completion.token_ids) for c, j in zip(contexts, judged, strict=True)], 1.0
    )
    assert all(
        p.sampled.shape == s.sampled.shape and not torch.equal(p.sampled, s.sampled) for p, s in zip(privileged, scored, strict=True)
    )


def test_dataset_answers_of_real_text_are_right_by_the_verifier(real_text):
    prompts, tokenizer = real_text
    source = source_over(tokenizer, shuffled_stream(prompts, 0), "math", 400, student_share=0.0, dataset_hint="solution")
    judged = [item for step in range(5) for item in source.collect(step)]
    assert all(item.verdict.correct and item.completion.finish == "stop" for item in judged)
    assert all(chat.decode(tokenizer, item.completion.token_ids) == item.prompt.hints["solution"] for item in judged)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_embedded_task_demonstrations_and_views(name):
    task = TASKS[name]
    tokenizer = character_tokenizer(task.characters) if task.characters else train_byte_bpe(task_corpus(task, ""), 2048)
    source = source_over(tokenizer, task_stream(name, "train", 3), "task", 64, student_share=0.0, dataset_hint="solution")
    judged = [item for step in range(4) for item in source.collect(step)]
    assert all(item.verdict.correct and item.completion.finish == "stop" for item in judged)
    for kind in ("facts", "solution", "answer", "demonstration"):
        contexts, counts = render_views(tokenizer, judged, resolve_view(kind, task.templates), 200)
        assert counts.shown == len(judged)
        assert all(tokenizer.unk_token_id not in context for context in contexts), "a hint in letters that the base never saw"
    student = source_over(tokenizer, task_stream(name, "train", 3), "task", 16)
    wrong = [item for item in student.collect(0) if not item.verdict.correct]
    contexts, counts = render_views(tokenizer, wrong, resolve_view("feedback", task.templates), 200)
    assert counts.shown > 0
    assert all(tokenizer.unk_token_id not in context for context in contexts if context)
