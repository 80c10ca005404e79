"""Attempt, phrase and revision as one answer: ids, log-probs, versions, mark and verdict by hand."""

from dataclasses import replace

import pytest
import torch
from opd_rollout.types import Completion, Sampling

from opd.build.system import objective_of
from opd.config.load import load_recipe
from opd.objective import join
from opd.revising import Pen, Phrases, RevisedSource
from opd.types import Judged, Meter, Prompt, Verdict
from tests.objective.dense import Batch, load

SAMPLING = Sampling(max_tokens=3, stop_ids=(0,))


def completion(text, *, end=True, version=4, logp=-0.5):
    ids = (*map(ord, text), *([0] if end else []))
    mask = torch.ones(len(ids), dtype=torch.bool)
    logprobs = torch.full((len(ids),), logp)
    finish, versions = "stop" if end else "length", ((version, 0, len(ids)),)
    return Completion(token_ids=ids, logprobs=logprobs, loss_mask=mask, source="student", temperature=1.0, finish=finish, versions=versions)


class FakeSource:
    def __init__(self, answers):
        self.answers = answers

    def collect(self, step, metrics):
        return self.answers

    def meters(self):
        return {"tokens/student": Meter(sum=7.0, count=1.0)}


class FakeEngine:
    def __init__(self, texts):
        self.texts, self.requests = list(texts), []

    def generate(self, requests, sampling):
        self.requests += requests
        return [completion(self.texts[n], version=5, logp=-0.25) for n in range(len(requests))]


def verify(prompt, text):
    return Verdict(reward=float(text == "r"), correct=text == "r")


def judged(text, member, *, end=True, status="score"):
    prompt = Prompt(id="p", messages=({"role": "user", "content": "q"},))
    verdict = verify(prompt, text) if status == "score" else Verdict(status=status)
    return Judged(prompt=prompt, prompt_ids=(1, 2), completion=completion(text, end=end), text=text, verdict=verdict, group=0, member=member)


def make(answers, texts, phrases=("OK", "NO", "|")):
    engine = FakeEngine(texts)
    pen = Pen(
        engine=engine,
        verify=verify,
        tokenize=lambda text: tuple(map(ord, text)),
        decode=lambda ids: "".join(chr(i) for i in ids if i),
        sampling=SAMPLING,
        seed=3,
    )
    return RevisedSource(FakeSource(answers), Phrases(right=phrases[0], wrong=phrases[1], between=phrases[2]), pen), engine


def test_attempt_phrase_and_revision_are_one_answer():
    source, engine = make([judged("w", 0), judged("r", 1), judged("abc", 2, end=False), judged("x", 3, status="error")], ["r", "w", "r"])
    found = source.collect(6)
    assert [one.text for one in found] == ["w|NO|r", "r|OK|w", "abc|NO|r", "x"]
    assert [one.verdict.correct for one in found[:3]] == [True, False, True], "the revision's verdict"
    first = found[0].completion
    assert first.token_ids == (*map(ord, "w|NO|r"), 0) and first.source == "student"
    assert torch.equal(first.logprobs.isnan(), torch.tensor([False] + [True] * 4 + [False] * 2)), "nobody sampled the phrase"
    assert first.logprobs[[0, 5]].tolist() == [-0.5, -0.25]
    assert first.versions == ((4, 0, 1), (5, 5, 7)) and first.loss_mask.all()
    assert found[0].marks["revision"].tolist() == [False] * 5 + [True] * 2
    assert found[2].completion.token_ids[:3] == tuple(map(ord, "abc")), "a cut attempt has no end to take off"
    assert not found[3].completion.loss_mask.any(), "without a verdict there is no phrase"
    assert [r.prompt_ids for r in engine.requests] == [(1, 2, *map(ord, text)) for text in ("w|NO|", "r|OK|", "abc|NO|")]
    assert len({r.seed for r in engine.requests}) == 3
    assert source.meters()["tokens/student"].sum == 7 + 2 + 2 + 2 and source.meters()["accuracy/revision"] == Meter(sum=2.0, count=3.0)


def test_the_loss_counts_the_revision_twice_and_only_what_ends_right():
    """(mean over all tokens of the right answers of -log p) + (the same sum over their revisions alone, over the same tokens)."""
    _, objective = load("sd_zero_srt")
    source, _ = make([judged("w", 0), judged("r", 1)], ["r", "w"])
    answers = source.collect(0)
    samples = join(answers, [None] * 2, [{}] * 2, objective)
    assert [sample.route["nll"] for sample in samples] == [1.0, 0.0] == [sample.route["nll_2"] for sample in samples]
    assert "weight/nll" not in samples[0].fields
    assert samples[0].fields["weight/nll_2"].tolist() == [0.0] * 5 + [1.0] * 2
    _, without = load("sd_zero_srt", without=("1.weight",))
    assert "weight/nll_2" not in join(answers, [None] * 2, [{}] * 2, without)[0].fields


@pytest.mark.parametrize("without", [(), ("1.weight",)])
def test_from_recipe_to_gradient(without):
    batch = Batch.make()
    for a in batch.answers:
        a.marks = {"revision": torch.arange(len(a.tokens)) >= 2}

    def formula(answers):
        right = [a for a in answers if a.reward > 0.5 and a.status == "score"]
        total = sum(len(a.tokens) for a in right)
        return sum((-(1.0 + a.marks["revision"].double()) * a.at(a.now)).sum() for a in right) / total

    if without:
        with pytest.raises(AssertionError):
            batch.expect(load("sd_zero_srt", without=without)[1], formula)
    else:
        batch.expect(load("sd_zero_srt")[1], formula)


def test_what_cannot_be_revised_is_refused():
    base = {"model.path": "models/expr-base", "data.task": "expr"}
    for changes, said in (
        ({"rollout.source": {"dataset": "solution"}}, "use rollout.source=student"),
        ({"rollout.sampler": "teacher"}, "use rollout.sampler=student"),
        ({"rollout.replay": {"max_age": 2}}, "rollout.replay gives it other answers: leave it out"),
    ):
        with pytest.raises(ValueError, match=said):
            load_recipe("recipes/methods/sd_zero_srt.yaml", {**base, **changes})
    grpo = load_recipe("recipes/methods/grpo.yaml", {**base, "rollout.revise": {}})
    with pytest.raises(ValueError, match="source 'revised' carry no log-probs"):
        objective_of(grpo)
    with pytest.raises(ValueError, match="a phrase has 65 tokens; shorten it to 64"):
        make([], [], phrases=("x" * 63, "", "|"))
    with pytest.raises(ValueError, match="did you mean 'rollout.revise.wrong'"):
        load_recipe("recipes/methods/sd_zero_srt.yaml", {**base, "rollout.revise": {"wrongs": "no"}})


def test_an_empty_batch_asks_for_nothing():
    source, engine = make([replace(judged("x", 0), verdict=Verdict(status="abstain"))], [])
    assert len(source.collect(0)) == 1 and engine.requests == [] and "accuracy/revision" not in source.meters()
