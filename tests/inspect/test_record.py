import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_samples import WORDS, WordTokenizer, fake_contexts, fake_sample

from opd.api import readers
from opd.config.load import parse_recipe
from opd.launcher.ranks import ALONE
from opd.viewer.record import Readers, sample_record, write_samples


def decode(ids):
    return WordTokenizer().decode(ids, skip_special_tokens=False)


def test_columns_line_up_with_the_tokens():
    sample = fake_sample(1)
    record = sample_record(sample, step=5, decode=decode, views={"main": "F3+5=1"})
    length = len(sample.judged.completion.token_ids)
    assert record["tokens"] == [WORDS[token] for token in sample.judged.completion.token_ids]
    columns = [record["student_logp"], record["behaviour_logp"], record["entropy"], record["student_topk"]]
    columns += [record["signals"]["main"][name] for name in ("logp", "entropy", "topk")]
    columns += [record["advantage"]["grpo"], record["weight"]["grpo"], record["weight"]["distill"]]
    assert {len(column) for column in columns} == {length}
    assert record["signals"]["main"]["logp"] == pytest.approx(sample.scores["main"].sampled.tolist(), abs=1e-4)
    assert record["views"] == {"main": "F3+5=1"} and record["step"] == 5


def test_topk_is_sorted_and_holds_the_sampled_token_once():
    record = sample_record(fake_sample(2), step=0, decode=decode)
    for token, row in zip(record["tokens"], record["signals"]["main"]["topk"], strict=True):
        texts, logps = [text for text, _ in row], [logp for _, logp in row]
        assert logps == sorted(logps, reverse=True)
        assert texts.count(token) == 1 and len(set(texts)) == len(texts)
        assert sum(map(math.exp, logps)) <= 1 + 1e-3


def test_what_is_not_known_is_null():
    sample = fake_sample(4)  # no view
    record = sample_record(sample, step=0, decode=decode)
    assert record["signals"] == {} and record["weight"]["distill"] == [0.0] * 18
    completion = sample.judged.completion
    object.__setattr__(completion, "logprobs", torch.full((18,), math.nan))
    object.__setattr__(sample, "prepared", None)
    record = sample_record(sample, step=0, decode=decode)
    assert (record["entropy"], record["student_topk"], record["student_logp"]) == (None, None, [None] * 18)


def test_files_hold_an_even_spread_and_the_views_of_those_answers(tmp_path):
    samples = [fake_sample(n) for n in range(64)]
    path = tmp_path / "samples" / "step-000025.jsonl"
    rows = write_samples(path, 25, samples, tokenizer=WordTokenizer(), num_samples=8, contexts=fake_contexts)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["group"], record["member"]) for record in records] == [(2 * n, 0) for n in range(8)]
    assert records[1]["views"] == {"main": "(3+5)2"[:5] + WORDS[8]}  # answer 8
    assert records[3]["views"] == {"main": None}  # answer 24 has no view
    assert rows[0] == [records[0]["question"], records[0]["text"], 0.0, False, "stop"]


def test_texts_stay_out_of_the_table_when_told(tmp_path):
    samples = [fake_sample(n) for n in range(3)]
    assert write_samples(tmp_path / "step-000001.jsonl", 1, samples, tokenizer=WordTokenizer(), num_samples=8, texts_in_table=False) == []
    assert len((tmp_path / "step-000001.jsonl").read_text().splitlines()) == 3


def test_readers_fill_in_what_the_step_did_not_need(tmp_path):
    sample = fake_sample(1)
    bare = replace(sample.scores["main"], ids=sample.scores["main"].ids[:, :1], logp=sample.scores["main"].logp[:, :1])
    sample = replace(sample, scores={"main": bare}, prepared=None)
    asked = []

    def scorer(logp):
        def scores(requests):
            asked.extend(requests)
            length = len(requests[0].completion_ids)
            ids = torch.arange(3).expand(length, 3)
            return [replace(bare, ids=ids, logp=torch.full((length, 3), logp), entropy=torch.full((length,), 0.5))]

        return scores

    readers = Readers(student=scorer(-1.0), teachers={"main": scorer(-2.0)})
    write_samples(
        tmp_path / "s.jsonl", 1, [sample], tokenizer=WordTokenizer(), num_samples=1, contexts=lambda judged: {"main": [(7, 8)]}, readers=readers
    )
    record = json.loads((tmp_path / "s.jsonl").read_text())
    assert record["student_topk"][0] == [["(", -1.0], ["3", -1.0], ["+", -1.0]] and record["entropy"] == [0.5] * 18
    assert record["signals"]["main"]["topk"][0] == [["(", -2.0], ["3", -2.0], ["+", -2.0]]
    assert [request.context_ids for request in asked] == [sample.judged.prompt_ids, (7, 8)]
    kept = fake_sample(1)
    write_samples(
        tmp_path / "k.jsonl", 1, [kept], tokenizer=WordTokenizer(), num_samples=1, contexts=lambda judged: {"main": [(7, 8)]}, readers=readers
    )
    assert len(asked) == 2  # the step had both lists already


def test_a_rank_reads_alone_only_what_it_has_alone():
    """Under ZeRO 3 a pass of the student is of all ranks together, and so is one of its own adapter-free weights: rank 0 would wait for ever."""
    parts = SimpleNamespace(learner=SimpleNamespace(teacher_pass=print), scorer=SimpleNamespace(weights={"main": SimpleNamespace(scores=abs)}))
    keys = {"method": "opsd", "data": {"task": "expr"}, "learner": {"kind": "deepspeed", "zero_stage": 3, "ranks": 2}, "model": {"shape": {}}}
    two = SimpleNamespace(count=2)
    copied, adapted = parse_recipe(keys), parse_recipe({**keys, "model": {"shape": {}, "lora": {"rank": 4}}})
    assert readers(copied, parts, two) == Readers(student=None, teachers={"main": abs})
    assert readers(adapted, parts, two) == Readers(student=None, teachers={})
    assert readers(adapted, parts, ALONE).teachers == {"main": abs}
