"""Teachers that write: who hears what in a debate, what is kept, counted and left out, whose weights speak, and what is refused."""

import json
from pathlib import Path

import pytest
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import GenerateRequest, Sampling

from opd.build import pretrained
from opd.build.speaking import check_debates, check_speakers
from opd.build.system import build_parts, objective_of, parse_weights
from opd.config.load import load_recipe
from opd.text import chat
from opd.types import Meter
from opd.views import ViewInput, resolve_view
from opd.writing import AnnotatedSource, Writer, check_writer
from tests.data.test_writing import FakeSource, answered, desk

MODELS = Path(__file__).parents[2] / "models"
TEACHERS = {"signals.first.weights.external.path": f"{MODELS}/expr-teacher", "signals.second.weights.external.path": f"{MODELS}/expr-base"}
DEBATE = Writer(by=("a", "b"), rounds=2, role="I am {speaker}", ask="{question}", reply="{question} after {transcript}", max_tokens=50)


def debating(writer=DEBATE, judged=None, say=("yes", "no"), rooms=(1000, 1000)):
    """A source whose answers two teachers debate, and their engines; each says its word and how much it has read."""
    desks, engines = {}, {}
    for name, word, room in zip("ab", say, rooms, strict=True):
        desks[name], engines[name] = desk(lambda asked, word=word: f"{word} {len(asked)}", room)
    table, student = desk(lambda asked: "never")
    source = AnnotatedSource(FakeSource(judged or [answered()]), {"debate": writer}, table, desks)
    return source, engines["a"], engines["b"], student


def test_the_first_round_is_blind_and_later_ones_hear_everybody():
    source, a, b, student = debating()
    [answer] = source.collect(0)
    opened = "[a, round 1]\nyes 12\n\n[b, round 1]\nno 12"
    assert a.asked == [["I am a|ask p"], [f"I am a|ask p after {opened}"]], "each round one call, and round two has heard both"
    assert b.asked == [["I am b|ask p"], [f"I am b|ask p after {opened}"]]
    length = len(a.asked[1][0])
    assert answer.notes["debate"] == f"{opened}\n\n[a, round 2]\nyes {length}\n\n[b, round 2]\nno {length}"
    assert (answer.notes["debate/a"], answer.notes["debate/b"]) == (f"yes {length}", f"no {length}") and student.asked == []
    assert {sampling.temperature for engine in (a, b) for sampling in engine.samplings} == {0.0}


def test_three_rounds_hear_all_that_was_said_before():
    source, a, _, _ = debating(Writer(by=("a", "b"), rounds=3, ask="{question}", reply="{transcript}"))
    source.collect(0)
    first, second = a.asked[1][0], a.asked[2][0]
    assert second.startswith(first) and second[len(first) :].startswith("\n\n[a, round 2]\n") and "[b, round 2]" in second


def test_the_teacher_reads_the_transcript_and_the_student_does_not():
    [answer] = debating()[0].collect(0)
    spec = resolve_view({"note": {"name": "debate", "template": "debate"}})
    view = spec.view(ViewInput(judged=answer, group=[answer], templates=spec.templates))
    content = view.messages[view.question]["content"]
    assert content.startswith("ask p\n\n") and answer.notes["debate"] in content and view.hint == answer.notes["debate"]
    assert answer.prompt_ids == (1,) and answer.prompt.messages == ({"role": "user", "content": "ask p"},)
    assert spec.view(ViewInput(judged=answered(), group=[], templates=spec.templates)) is None, "without a debate it does not score"


def test_a_debate_about_the_question_is_held_once_for_all_answers_steps_and_resumes():
    judged = [answered("x", id="p"), answered("y", id="p", member=1), answered("z", id="other")]
    source, a, b, _ = debating(judged=judged)
    first = source.collect(0)
    assert [len(asked) for asked in a.asked] == [2, 2] == [len(asked) for asked in b.asked]
    written = sum(len(turn) for turns in source.state()["written"]["debate"].values() for turn in turns)
    assert source.meters()["tokens/written"].sum == written and source.meters()["tokens/student"].sum == 100 + written
    assert first[0].notes == first[1].notes != first[2].notes
    assert [answer.notes for answer in source.collect(1)] == [answer.notes for answer in first] and len(a.asked) == 2
    assert source.meters()["tokens/written"].sum == 0
    again, later, _, _ = debating(judged=judged, say=("other", "words"))
    again.load_state(json.loads(json.dumps(source.state())))
    assert [answer.notes for answer in again.collect(2)] == [answer.notes for answer in first] and later.asked == []


def test_a_debate_about_the_attempt_is_held_for_each():
    judged = [answered("x"), answered("y", member=1)]
    source, a, _, _ = debating(Writer(by=("a", "b"), rounds=2, ask="{question}", reply="{attempt} {transcript}"), judged)
    source.collect(0)
    source.collect(1)
    assert [len(asked) for asked in a.asked] == [1, 2, 1, 2], "what is asked about the question alone is one request"


def test_a_debate_that_one_speaker_cannot_read_is_left_out_whole():
    source, a, _, _ = debating(rooms=(1000, 40))
    [answer] = source.collect(0)
    assert answer.notes == {} and [len(asked) for asked in a.asked] == [1, 1]
    assert source.meters()["writers/debate_left_out"] == Meter(sum=1.0, count=1.0)
    assert source.state()["written"] == {"debate": {}}


def test_a_budget_counts_whole_debates():
    judged = [answered("x", id=name) for name in "pqr"]
    source, a, _, _ = debating(Writer(by=("a", "b"), rounds=2, ask="{question}", reply="{question} {transcript}", max_tokens=10, budget=85), judged)
    out = source.collect(0)
    assert [len(asked) for asked in a.asked] == [2, 2], "85 tokens are two debates of 2 x 2 x 10"
    assert ["debate" in answer.notes for answer in out] == [True, True, False]
    assert source.meters()["writers/debate_left_out"] == Meter(sum=1.0, count=3.0)
    assert ["debate" in answer.notes for answer in source.collect(1)] == [True, True, True], "the third is next"


def test_how_many_debates_end_with_two_stated_confidences():
    judged = [answered("x", id="p"), answered("y", id="quite long")]
    source, *_ = debating(Writer(by=("a", "b"), ask="{question}"), judged)
    source._desks["a"].engine.say = lambda asked: "<<CONFIDENCE=90>>"
    source._desks["b"].engine.say = lambda asked: "<<CONFIDENCE=80>>" if "long" in asked else "sure"
    source.collect(0)
    assert source.meters()["writers/debate_confident"] == Meter(sum=1.0, count=2.0)


def test_one_teacher_may_write_alone():
    source, a, _, student = debating(Writer(by=("a",), ask="{attempt}"))
    [answer] = source.collect(0)
    assert answer.notes == {"debate": "yes 11", "debate/a": "yes 11"} and student.asked == []
    assert "writers/debate_confident" not in source.meters()


@pytest.fixture(scope="module")
def parts():
    """Two embedded models in debate over expr; they know questions and hints, not requests."""
    changes = {"model.path": f"{MODELS}/expr-base", "data.task": "expr", "sampling.max_tokens": 24, "rollout.prompts": 8, "learner.kind": "torch"}
    words = {"writers.debate.role": "", "writers.debate.ask": "{question}", "writers.debate.reply": "S{transcript}\n{question}"}
    built = build_parts(load_recipe("mad_opd", {**changes, **words, **TEACHERS, "writers.debate.max_tokens": 24}))
    yield built
    built.learner.close()
    built.engine.close()


def test_each_speaker_has_its_own_weights(parts):
    judged = parts.source.collect(0)
    turns = parts.source.state()["written"]["debate"]
    sampling = Sampling(temperature=0.0, max_tokens=24, stop_ids=parts.stop_ids)
    options = {"pad_id": 0, "token_budget": 8192, "vocab_size": len(parts.tokenizer)}
    for place, name in enumerate(("expr-teacher", "expr-base")):
        engine = TorchEngine(pretrained.load_model(str(MODELS / name), dtype="float32"), **options)
        found = engine.generate([GenerateRequest(prompt_ids=answer.prompt_ids, seed=0) for answer in judged], sampling)
        for answer, completion in zip(judged, found, strict=True):
            assert turns[answer.prompt.id][place] == chat.decode(parts.tokenizer, completion.token_ids)
    assert any(one[0] != one[1] for one in turns.values()), "the two do not always agree"


def test_the_transcript_is_in_both_teachers_contexts(parts):
    judged = parts.source.collect(1)
    for answer, first, second in zip(judged, *(parts.views(judged)[name] for name in ("first", "second")), strict=True):
        shown = chat.render(parts.tokenizer, [{"role": "user", "content": answer.notes["debate"]}])
        assert first == second and len(first) > len(shown) > len(answer.prompt_ids)


WORDS = {"role": "I am {speaker}.", "ask": "{question}", "reply": "{question} {transcript}"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": ("a",)}, r"writers.w.rounds is 2, and a debate needs two speakers: by: \[first, second\]"),
        ({"by": ()}, "writers.w.rounds is 2, and a debate needs two speakers"),
        ({"by": ("a", "a")}, "writers.w.by names 'a' twice"),
        ({"ask": ""}, "writers.w.ask is empty"),
        ({"ask": "You are {speaker}."}, "writers.w.ask says nothing of the answer or its question"),
        ({"ask": "{question} {transcript}"}, "writers.w.ask reads {transcript}, and nothing has been said"),
        ({"reply": ""}, "in the 2 rounds nobody would hear the others; give the request of the later ones"),
        ({"reply": "{question} again"}, "in the 2 rounds nobody would hear the others"),
        ({"reply": "{transcrpt}"}, "writers.w.reply has the unknown slot {transcrpt}"),
        ({"rounds": 1}, "writers.w.reply is asked from the second round on, and there is one: set writers.w.rounds=2"),
        ({"points": True}, "writers.w.points marks what the student points at; leave out by"),
        ({"budget": 255}, "budget is 255 tokens a step, and one note may take 256 .*Use writers.w.budget=256 or more"),
    ],
)
def test_debates_that_cannot_be_held_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_writer("w", Writer(**{"by": ("a", "b"), "rounds": 2, **WORDS, **changes}))


EXTERNAL = {"signals.first.weights.external.path": "one", "signals.second.weights.external.path": "other"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"writers.debate.by": ["first", "secnd"]}, "writers.debate.by names 'secnd' .did you mean 'second'.*signals are: first, second"),
        ({"signals.second.weights": {"ema": {"rate": 0.1}}}, "by names 'second', which cannot write: the average has no engine. Weights that can"),
        ({"signals.second.weights.external.engine": "vllm"}, "which cannot write: vLLM only scores for teachers here"),
        ({"signals.second.weights.external.tokenizer": "own"}, "which cannot write: its tokenizer is its own"),
        ({"signals.second.weights": "frozen", "model.lora": {"rank": 2}}, "under LoRA the frozen student is no model of its own"),
        ({"engine.kind": "process", "asynchrony.max_staleness": 1}, "use asynchrony.max_staleness=0"),
        (
            {"signals.second.weights.external.path": "one", "writers.debate.role": "An expert."},
            "first, second have the same weights and are asked the same words, so they say the same",
        ),
    ],
)
def test_speakers_that_cannot_write_are_refused(changes, message):
    recipe = load_recipe("mad_opd", {**EXTERNAL, **changes})
    with pytest.raises(ValueError, match=message):
        check_speakers(recipe, {name: parse_weights(name, signal.weights) for name, signal in recipe.signals.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.0.route.confidence_share.writer": "debat"}, "the speakers of 'debat' are .did you mean 'debate'.*declared writers: debate"),
        ({"writers": {}}, "declared writers: none"),
        ({"writers.debate.by": ["first"]}, "one teacher alone has the whole share; writers.debate.by must name two or more signals"),
        ({"writers.debate.by": ["first", "third"]}, "its teacher 'second' does not speak in 'debate', which is by first, third; add it"),
    ],
)
def test_shares_without_a_debate_are_refused(changes, message):
    recipe = load_recipe("mad_opd", changes)
    with pytest.raises(ValueError, match=message):
        check_debates(recipe, objective_of(recipe))


def test_the_student_itself_may_be_one_of_the_speakers():
    recipe = load_recipe("mad_opd", {**EXTERNAL, "signals.second.weights": "live"})
    check_speakers(recipe, {name: parse_weights(name, signal.weights) for name, signal in recipe.signals.items()})
