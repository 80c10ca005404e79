"""Texts written about answers: what is asked, of whom, how often, what is marked, and that a resume asks nothing twice."""

import pytest
import torch
from opd_rollout.types import Completion

from opd.build.system import objective_of
from opd.build.views import check_writers
from opd.config.load import load_recipe
from opd.tasks import TASKS
from opd.tasks.tokenizer import character_tokenizer
from opd.text.bpe import train_byte_bpe
from opd.text.token_bytes import byte_spans, token_bytes
from opd.types import Judged, Meter, Prompt, Verdict
from opd.views import resolve_view
from opd.writing import AnnotatedSource, Desk, Writer, annotated, check_writer, marked_tokens, request

RIGHT, WRONG = Verdict(reward=1.0, correct=True), Verdict(feedback="line 2")


def answered(text="a=1;b=2;c=3", verdict=RIGHT, id="p", member=0, length=None):
    ids = tuple(map(ord, text)) if length is None else tuple(range(length))
    completion = Completion(
        token_ids=ids, logprobs=torch.zeros(len(ids)), loss_mask=torch.ones(len(ids), dtype=torch.bool), source="student", temperature=1.0,
        finish="stop", versions=(),
    )  # fmt: skip
    prompt = Prompt(id=id, messages=({"role": "user", "content": f"ask {id}"},), answer="3", hints={"solution": "do so"})
    return Judged(prompt=prompt, prompt_ids=(1,), completion=completion, text=text, verdict=verdict, group=0, member=member)


def pieces(ids):
    return [chr(i).encode() for i in ids]


class FakeEngine:
    def __init__(self, say):
        self.say, self.asked, self.samplings = say, [], []

    def generate(self, requests, sampling):
        self.asked.append([bytes(r.prompt_ids).decode() for r in requests])
        self.samplings.append(sampling)
        texts = [self.say(bytes(r.prompt_ids).decode()) for r in requests]
        return [
            Completion(
                token_ids=tuple(text.encode()), logprobs=torch.zeros(len(text)), loss_mask=torch.ones(len(text), dtype=torch.bool),
                source="student", temperature=0.0, finish="stop", versions=(),
            )
            for text in texts
        ]  # fmt: skip


class FakeSource:
    def __init__(self, judged):
        self.judged, self.loaded = judged, None

    def collect(self, step, metrics):
        return list(self.judged)

    def meters(self):
        return {"tokens/student": Meter(sum=100.0, count=1.0)}

    def totals(self):
        return {}

    def state(self):
        return {"cursor": 3}

    def load_state(self, state):
        self.loaded = state


def desk(say=lambda asked: "note", room=1000):
    engine = FakeEngine(say)
    render = lambda messages: tuple("|".join(m["content"] for m in messages).encode())  # noqa: E731
    return Desk(engine=engine, render=render, decode=lambda ids: bytes(ids).decode(), pieces=pieces, room=room, stop_ids=(0,)), engine


def test_the_request_fills_every_slot_once():
    asked = "{question}/{solution}/{answer}/{attempt}/{feedback}/{segments}"
    system, user = request(Writer(ask=asked, role="You judge."), answered("x {question};y", WRONG))
    assert system == {"role": "system", "content": "You judge."}
    assert user["content"] == "ask p/do so/3/x {question};y/line 2/[1] x {question};\n[2] y"


def test_notes_marks_and_tokens_by_hand():
    table, engine = desk(lambda asked: "1, 3\nsplits the case")
    writer = Writer(ask="{segments}", about="correct", points=True, coverage=1.0, max_tokens=9)
    source = AnnotatedSource(FakeSource([answered(), answered("no", WRONG, member=1)]), {"spans": writer}, table)
    right, wrong = source.collect(0)
    assert right.notes == {"spans": "splits the case"} and wrong.notes == {} and wrong.marks == {}
    assert right.marks["spans"].tolist() == [True] * 4 + [False] * 4 + [True] * 3, "segments 1 and 3 of a=1;b=2;c=3"
    [sampling] = engine.samplings
    assert (sampling.temperature, sampling.max_tokens, sampling.stop_ids) == (0.0, 9, (0,))
    meters = source.meters()
    assert meters["tokens/written"].sum == len("1, 3\nsplits the case") and meters["tokens/student"].sum == 100 + meters["tokens/written"].sum
    assert meters["writers/spans_noted"] == meters["writers/spans_marked"] == Meter(sum=1.0, count=2.0)


def test_coverage_keeps_the_first_quarter():
    hundred = answered("x" * 39 + ";" + "y" * 60)
    assert marked_tokens(hundred, [1], pieces(hundred.completion.token_ids), 1.0).sum() == 40
    kept = marked_tokens(hundred, [1], pieces(hundred.completion.token_ids), 0.25)
    assert kept.sum() == 25 and kept[:25].all()
    assert not marked_tokens(hundred, [7], pieces(hundred.completion.token_ids), 1.0).any(), "there is no segment 7"


def test_a_pointer_without_a_second_line_notes_its_only_one():
    assert annotated(answered(), "spans", Writer(ask="{segments}", points=True), "2", pieces).notes == {"spans": "2"}


def test_equal_requests_are_written_once_and_a_budget_leaves_out_the_rest():
    judged = [answered(text, member=n) for n, text in enumerate(("one", "one", "two", "three"))]
    table, engine = desk()
    source = AnnotatedSource(FakeSource(judged), {"critique": Writer(ask="{attempt}", max_tokens=10, budget=25)}, table)
    out = source.collect(0)
    assert engine.asked == [["one", "two"]], "25 tokens are two texts of 10"
    assert [a.notes.get("critique") for a in out] == ["note", "note", "note", None]
    assert source.meters()["writers/critique_left_out"] == Meter(sum=1.0, count=4.0)


def test_a_text_about_the_question_alone_is_written_once_a_run_also_across_a_resume():
    judged = [answered("x", id="p"), answered("y", id="p", member=1), answered("z", id="q")]
    table, engine = desk(lambda asked: f"about {asked}")
    writer = {"summary": Writer(ask="{solution} {question}")}
    source = AnnotatedSource(FakeSource(judged), writer, table)
    first = source.collect(0)
    assert engine.asked == [["do so ask p", "do so ask q"]] and {a.notes["summary"] for a in first[:2]} == {"about do so ask p"}
    assert [a.notes for a in source.collect(1)] == [a.notes for a in first] and len(engine.asked) == 1
    table, later = desk(lambda asked: "other words")
    texts = {name: {prompt: turns[0] for prompt, turns in kept.items()} for name, kept in source.state()["written"].items()}
    for state in (source.state(), source.state() | {"written": texts}):  # the second as it was written before there were debates
        again = AnnotatedSource(FakeSource(judged), writer, table)
        again.load_state(state)
        assert [a.notes for a in again.collect(2)] == [a.notes for a in first] and later.asked == []
    assert source.state()["cursor"] == 3


def test_nothing_is_written_from_its_last_step_on_and_long_requests_are_left_out():
    table, engine = desk(room=5)
    source = AnnotatedSource(FakeSource([answered("short"), answered("too long", member=1)]), {"w": Writer(ask="{attempt}", until=2)}, table)
    assert [bool(a.notes) for a in source.collect(1)] == [True, False] and source.meters()["writers/w_left_out"].sum == 1
    assert not any(a.notes for a in source.collect(2)) and len(engine.asked) == 1
    assert source.meters()["tokens/written"].sum == 0


@pytest.mark.parametrize(("ask", "message"), [("{atempt}", "unknown slot {atempt}"), ("say something", "says nothing of the answer")])
def test_requests_that_ask_nothing_are_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        check_writer("w", Writer(ask=ask))


@pytest.mark.parametrize("text", ["héllo  wörld ∑\n x", "1+1=2;2+1=3", " leading", "ok"])
def test_bytes_of_byte_level_tokens_join_to_the_text(text):
    tokenizer = train_byte_bpe(["hello world, 1+1=2;2+1=3 ∑∑ wörld"], 300)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = token_bytes(tokenizer, ids)
    assert b"".join(found).decode() == text and found[-1] == b"" and len(found) == len(ids)
    assert byte_spans(found)[-1] == (len(text.encode()),) * 2


def test_bytes_of_character_tokens():
    tokenizer = character_tokenizer(TASKS["expr"].characters)
    assert token_bytes(tokenizer, tokenizer("1+2\n=3", add_special_tokens=False)["input_ids"]) == [b"1", b"+", b"2", b"\n", b"=", b"3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"view": {"note": {"name": "span"}}}, "signals.main.view reads what 'span' writes .did you mean 'spans'.*declared: spans"),
        ({"writers": {}}, "reads what 'spans' writes; declared: none. Add writers.spans"),
        ({"writers.spans.points": False}, "needs tokens that 'spans' points at; set writers.spans.points=true"),
        ({"writers.spans.ask": "{atempt}"}, "writers.spans.ask has the unknown slot {atempt}"),
    ],
)
def test_recipes_that_read_what_nobody_writes_are_refused(changes, message):
    recipe = load_recipe("trace", changes)
    specs = {name: resolve_view(signal.view) for name, signal in recipe.signals.items()}
    with pytest.raises(ValueError, match=message):
        check_writers(recipe, specs, objective_of(recipe))
