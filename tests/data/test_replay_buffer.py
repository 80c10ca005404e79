import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from opd_rollout.types import Completion, Sampling

from opd.build.system import objective_of
from opd.config.load import load_recipe
from opd.launcher.ranks import ALONE
from opd.prompts import shuffled_stream
from opd.replay_buffer import ReplayBuffer, ReplaySettings, parse_replay
from opd.source import Codec, RolloutSource, SourceSettings
from opd.types import Judged, Prompt, Verdict

SAMPLING = Sampling(max_tokens=4, stop_ids=(0,))
CODEC = Codec(
    encode=lambda prompt: (1, ord(prompt.messages[0]["content"][-1])),
    tokenize=lambda text: tuple(ord(c) for c in text),
    decode=lambda ids: "".join(chr(i) for i in ids if i > 1),
    end=0,
)


class FakeEngine:
    """Answers with a letter of the request's seed; log-probs and version tell which call it was."""

    def __init__(self):
        self.calls = 0

    def generate(self, requests, sampling):
        self.calls += 1
        return [self.answer("ab"[request.seed % 2]) for request in requests]

    def answer(self, text):
        ids = (ord(text), 0)
        logprobs = torch.tensor([-0.1 * self.calls, -1.0 / 3.0])
        mask = torch.ones(2, dtype=torch.bool)
        versions = ((self.calls, 0, 2),)
        return Completion(token_ids=ids, logprobs=logprobs, loss_mask=mask, source="student", temperature=1.0, finish="stop", versions=versions)


def make(replay, *, ranks=ALONE, num_prompts=8, group=2, **settings):
    prompts = [Prompt(id=f"p{i}", messages=({"role": "user", "content": f"q{i % 10}"},), hints={"solution": "s"}) for i in range(40)]
    chosen = SourceSettings(num_prompts=num_prompts, group=group, seed=3, replay=replay, **settings)
    verdicts = []

    def verify(prompt, text):
        verdicts.append(prompt.id)
        return Verdict(reward=float(text == "a"), correct=text == "a")

    source = RolloutSource(FakeEngine(), shuffled_stream(prompts, 5), verify, CODEC, SAMPLING, chosen, ranks=ranks)
    return source, verdicts


def kept(judged):
    return [one for one in judged if one.completion.source == "replay"]


def outline(judged):
    return [(j.prompt.id, j.group, j.member, j.completion.source, j.completion.logprobs.tolist(), j.completion.versions) for j in judged]


def test_kept_groups_come_back_whole_as_they_were():
    source, verdicts = make(ReplaySettings(size=64, max_age=3, fresh=0.5))
    seen = {}
    for step in range(12):
        before, cursor = len(verdicts), source.state()["stream"]["cursor"]
        judged = source.collect(step)
        old = kept(judged)
        new = [one for one in judged if one.completion.source == "student"]
        assert len(judged) == 16 and len(new) + len(old) == 16
        assert len(verdicts) - before == len(new), "a kept answer is not judged again"
        assert source.state()["stream"]["cursor"] - cursor == len(new) // 2, "no prompt is drawn for a kept group"
        assert [one.group for one in judged] == [place // 2 for place in range(16)]
        for one in old:
            was = seen[one.prompt.id, one.completion.versions[0][0], one.member]
            assert replace(one, group=was.group, completion=replace(one.completion, source="student")) == replace(
                was, completion=replace(was.completion, logprobs=one.completion.logprobs, loss_mask=one.completion.loss_mask)
            )
            assert torch.equal(one.completion.logprobs, was.completion.logprobs)
            assert 1 <= source._engine.calls - one.completion.versions[0][0] <= 3, "one call a step: its age in steps"
        assert len({(one.prompt.id, one.completion.versions) for one in old}) == len(old) // 2, "none twice in a step"
        assert source.meters()["tokens/student"].sum == 2 * len(new) and "rollout/dataset_share" not in source.meters()
        assert source.meters()["replay/share"].mean == len(old) / 16
        seen |= {(one.prompt.id, one.completion.versions[0][0], one.member): one for one in new}
    assert source.totals()["generated_tokens"] == 2 * len(verdicts) < 2 * 12 * 16


@pytest.mark.parametrize(("student", "fresh"), [(1.0, 0.25), (0.6, 0.25), (0.6, 0.9)])
def test_shares_of_new_kept_and_data_answers(student, fresh):
    """DistiLLM's draw: new with probability phi f, kept with phi (1 - f), else the data."""
    source, _ = make(ReplaySettings(size=10**6, max_age=10**6, fresh=fresh), group=1, student_share=student, dataset_hint="solution", num_prompts=40)
    source.collect(0)
    counts = {"student": 0, "replay": 0, "dataset": 0}
    steps = range(1, 41)
    for step in steps:
        for one in source.collect(step):
            counts[one.completion.source] += 1
    expected = {"student": student * fresh, "replay": student * (1 - fresh), "dataset": 1 - student}
    for name, share in expected.items():
        spread = math.sqrt(share * (1 - share) / (40 * len(steps)))
        assert counts[name] / (40 * len(steps)) == pytest.approx(share, abs=4 * spread + 0.01), "the first steps' buffer is small"


def test_size_age_and_least():
    old = [group_of("x")]
    buffer = ReplayBuffer(ReplaySettings(size=3, max_age=2, fresh=0.001), seed=0)
    assert buffer.draw(0, 4, 1.0, {}) == ([], 1.0)
    for step in range(5):
        buffer.add(step, old * 2)
    assert [made for made, _ in buffer.state()] == [3, 4, 4], "the newest 3"
    groups, share = buffer.draw(5, 9, 1.0, {})
    assert len(groups) == 3 and share == pytest.approx(1.0)
    assert len(buffer.draw(6, 9, 1.0, {})[0]) == 2 and buffer.draw(7, 9, 1.0, {})[0] == [], "two steps after it was made, and no longer"
    assert buffer.draw(4, 9, 1.0, {})[0] == buffer.draw(4, 9, 1.0, {})[0] and len(buffer.draw(4, 9, 1.0, {})[0]) == 1
    assert buffer.draw(2, 9, 1.0, {})[0] == [], "answers of steps that were taken back are not given out"
    waiting = ReplayBuffer(ReplaySettings(size=3, max_age=2, fresh=0.001, least=3), seed=0)
    waiting.add(0, old * 2)
    assert waiting.draw(1, 9, 1.0, {}) == ([], 1.0), "fewer than least"


def test_a_schedule_of_the_new_share():
    settings = parse_replay(size=8, max_age=4, fresh={"linear": {"start": 1.0, "end": 0.0, "steps": 4}}, least=1)
    buffer = ReplayBuffer(settings, seed=0)
    buffer.add(0, [group_of("x")] * 8)
    found = []
    for step in (0, 2, 4):
        groups, share = buffer.draw(step, 8, 0.5, {})
        found.append((len(groups), share, buffer.meters()["schedule/rollout.replay"].mean))
    assert found[0] == (0, 0.5, 1.0)
    assert found[1][1:] == (pytest.approx(0.25 / 0.75), 0.5) and found[2][1:] == (0.0, 0.0), "phi f of all slots is new: phi f / (1 - phi (1 - f))"


def test_data_and_view_answers_are_not_kept():
    source, _ = make(ReplaySettings(size=64, max_age=9, fresh=0.5), student_share=0.5, dataset_hint="solution")
    new = {one.group for one in source.collect(0) if one.completion.source == "student"}
    assert 0 < len(new) < 8 and len(source.state()["replay"]) == len(new)
    paired, _ = make(ReplaySettings(size=64, max_age=9, fresh=0.3), paired=True, dataset_hint="solution", group=1)
    for step in range(3):
        judged = paired.collect(step)
    assert {one.member: one.completion.source for one in judged if one.group == 7} == {0: "replay", 1: "dataset"}


@pytest.mark.parametrize("filter", ["none", "mixed_groups"])
def test_a_resume_from_json_continues_bit_for_bit(filter):
    settings = ReplaySettings(size=16, max_age=4, fresh=0.4)
    whole, _ = make(settings, filter=filter)
    expected = [outline(whole.collect(step)) for step in range(8)]
    first, _ = make(settings, filter=filter)
    assert [outline(first.collect(step)) for step in range(4)] == expected[:4]
    second, _ = make(settings, filter=filter)
    second.load_state(json.loads(json.dumps(first.state())))
    second._engine.calls = first._engine.calls
    assert [outline(second.collect(step)) for step in range(4, 8)] == expected[4:]
    assert any("replay" in row for step in expected[4:] for row in step)


def test_ranks_keep_their_own_groups_and_draw_prompts_once():
    """Two ranks in turns: what one misses, the other must know."""
    said = {0: [], 1: []}

    def run(rank, other):
        turn = iter(other)
        ranks = SimpleNamespace(count=2, rank=rank, gather=lambda value: said[rank].append(value) or ordered(rank, value, next(turn, value)))
        source, _ = make(ReplaySettings(size=64, max_age=3, fresh=0.4), ranks=ranks)
        return [(source.collect(step), source.state()["stream"]["cursor"]) for step in range(4)]

    def ordered(rank, mine, theirs):
        return [mine, theirs] if rank == 0 else [theirs, mine]

    for _ in range(6):  # until both have heard what the other says
        heard = {rank: list(values) for rank, values in said.items()}
        said[0].clear(), said[1].clear()
        found = [run(0, heard[1]), run(1, heard[0])]
    for step in range(4):
        assert found[0][step][1] == found[1][step][1], "one cursor"
        new = [[j.prompt.id for j in by_rank[step][0] if j.completion.source == "student" and j.member == 0] for by_rank in found]
        assert not set(new[0]) & set(new[1]), "one stream, every prompt once"
    assert kept(found[0][3][0]) and kept(found[1][3][0])


def group_of(text):
    completion = FakeEngine().answer("a")
    return [Judged(prompt=Prompt(id=text, messages=()), prompt_ids=(1,), completion=completion, text="a", verdict=Verdict(), group=0, member=0)]


def recipe(**changes):
    return load_recipe("recipes/runs/opd_expr.yaml", {"rollout.replay": {"max_age": 3}, **changes})


def test_estimates_over_sampled_tokens_need_a_ratio():
    assert objective_of(recipe()), "a divergence over the vocabulary is legal on any tokens"
    plain = [{"policy": "reinforce", "advantage": "teacher_logratio"}]
    with pytest.raises(ValueError, match=r"up to 3 steps old \(rollout.replay\).*engine_ratio.*no rollout.replay.*allow: \[stale_answers\]"):
        objective_of(recipe(objective=plain))
    assert objective_of(recipe(objective=[{**plain[0], "weight": "sampler_ratio"}]))
    assert objective_of(recipe(objective=[{**plain[0], "allow": ["stale_answers"]}])).allowed == ("stale_answers",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout.replay": {"max_age": 0}}, "max_age"),
        ({"rollout.replay": {"maxage": 3}}, "did you mean 'rollout.replay.max_age'"),
        ({"rollout.replay": {"max_age": 3}, "engine.kind": "process", "asynchrony.max_staleness": 1}, "use asynchrony.max_staleness=0"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        load_recipe("recipes/runs/opd_expr.yaml", changes)


@pytest.mark.parametrize(
    ("replay", "settings", "said"),
    [
        ({}, {"student_share": 0.0, "dataset_hint": "solution"}, "lets it write none"),
        ({"least": 9}, {}, "rollout.replay.least is 9, and no more than rollout.replay.size=8"),
        ({"fresh": 1.0}, {}, "rollout.replay.fresh is 1.0; write a number between 0 and 1"),
        ({"fresh": {"lineer": {}}}, {}, "rollout.replay.fresh: unknown name 'lineer'"),
    ],
)
def test_settings_under_which_nothing_is_replayed(replay, settings, said):
    with pytest.raises(ValueError, match=said):
        make(parse_replay(**{"size": 8, "max_age": 2, "fresh": 0.5, "least": 1, **replay}), **settings)
