"""Answers ahead of the learner, over a fake source: order, age, state and how it ends."""

import json
import threading

import pytest
import torch
from opd_rollout.types import Completion

from opd.ahead import Ahead, agreed, fresh_groups, from_plain, of_rank, staleness_meters, to_plain
from opd.types import Judged, Meter, Prompt, Verdict


def answer(step, member, versions, group=0):
    length = max((end for *_, end in versions), default=2)
    completion = Completion(
        token_ids=tuple(range(length)), logprobs=torch.rand(length), loss_mask=torch.ones(length, dtype=torch.bool), source="student",
        temperature=1.0, finish="stop", versions=versions,
    )  # fmt: skip
    prompt = Prompt(id=f"p{step}-{group}", messages=({"role": "user", "content": "?"},), hints={"answer": "x"})
    verdict = Verdict(reward=0.25, correct=True, parts={"steps": float("nan")})
    return Judged(prompt=prompt, prompt_ids=(1, 2), completion=completion, text="t", verdict=verdict, group=group, member=member)


class FakeSource:
    """Two groups a step, drawn with `version`; its cursor is the number of steps drawn. `gate` holds an answer back until it is set."""

    def __init__(self):
        self.cursor, self.version, self.gate, self.drawn, self.broken = 0, 0, threading.Event(), [], None
        self.gate.set()

    def collect(self, step, last):
        assert self.gate.wait(20)
        if self.broken:
            raise self.broken
        self.cursor += 1
        self.drawn.append((step, self.version))
        return [answer(step, member, ((self.version, 0, 3),), group) for group in range(2) for member in range(2)]

    def meters(self):
        return {"reward/mean": Meter(sum=float(self.cursor), count=1.0)}

    def state(self):
        return {"cursor": self.cursor}

    def load_state(self, state):
        self.cursor = state["cursor"]


@pytest.fixture
def ahead():
    source = FakeSource()
    ahead = Ahead(source)
    ahead.source = source
    yield ahead
    source.gate.set()
    ahead.close()


def test_steps_come_in_order_each_once_with_their_own_meters(ahead):
    for step in (0, 1, 2):
        ahead.begin(step, {})
        ahead.begin(step, {})
    ahead.settle()
    for step in (0, 1, 2, 3):
        judged = ahead.collect(step, {})
        assert {item.prompt.id for item in judged} == {f"p{step}-0", f"p{step}-1"}
        assert ahead.meters()["reward/mean"].mean == step + 1
    assert ahead.source.drawn == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_ranks_keep_what_all_of_them_have_finished_and_other_numbers_of_ranks_write_anew():
    def state(*finished):
        return {"taken": 1, "source": finished[-1] if finished else 1, "unused": [[step, {"after": step}] for step in finished]}

    assert agreed([state(2, 3), state(2)]) == [state(2), state(2)]
    assert agreed([state(2, 3), state()]) == [state(), state()]
    assert agreed([{"cursor": 1}, {"cursor": 1}]) == [{"cursor": 1}, {"cursor": 1}]  # of a source that is not ahead
    assert of_rank([state(2), state(2, 3)], 1, 2) == state(2, 3)
    assert of_rank([state(2), state(2)], 0, 1) == state()
    assert of_rank([{"cursor": 1}], 1, 2) == {"cursor": 1}


def test_the_state_holds_what_is_finished_and_leaves_out_what_is_in_flight(ahead):
    assert ahead.state() == {"taken": {"cursor": 0}, "source": {"cursor": 0}, "unused": []}
    for step in (0, 1):
        ahead.begin(step, {})
    ahead.settle()
    used = ahead.collect(0, {})
    assert used[0].prompt.id == "p0-0"
    ahead.source.gate.clear()
    ahead.begin(2, {})  # in flight when the state is taken
    state = json.loads(json.dumps(ahead.state()))
    assert state["taken"] == {"cursor": 1} and state["source"] == {"cursor": 2} and [step for step, _ in state["unused"]] == [1]
    waiting = ahead._begun[1].result().judged
    ahead.source.gate.set()

    other_source = FakeSource()
    other = Ahead(other_source)
    other.load_state(state)
    other.begin(1, {})
    found = other.collect(1, {})
    assert other_source.drawn == []  # not written twice
    assert [item.prompt for item in found] == [item.prompt for item in waiting]
    assert all(torch.equal(a.completion.logprobs, b.completion.logprobs) for a, b in zip(found, waiting, strict=True))
    assert other.meters()["reward/mean"].mean == 2.0
    other.collect(2, {})
    assert other_source.drawn == [(2, 0)] and other_source.cursor == 3  # in flight then, written once now
    with pytest.raises(ValueError, match="in flight"):
        other.begin(3, {})
        other.load_state(state)
    other.close()


def test_plain_values_come_back_bit_for_bit():
    source = FakeSource()
    ahead = Ahead(source)
    ahead.begin(0, {})
    ahead.settle()
    batch = ahead._begun[0].result()
    back = from_plain(json.loads(json.dumps(to_plain(batch))))
    for a, b in zip(back.judged, batch.judged, strict=True):
        assert torch.equal(a.completion.logprobs, b.completion.logprobs) and a.completion.logprobs.dtype == torch.float32
        assert torch.equal(a.completion.loss_mask, b.completion.loss_mask) and a.completion.loss_mask.dtype == torch.bool
        assert a.completion.versions == b.completion.versions and a.prompt == b.prompt
        assert a.verdict.reward == 0.25 and a.verdict.parts["steps"] != a.verdict.parts["steps"]
    assert back.meters == batch.meters and back.after == batch.after and back.seconds == batch.seconds
    ahead.close()


def test_groups_too_old_or_from_weights_that_were_taken_back_are_dropped_whole():
    judged = [
        answer(0, 0, ((4, 0, 3),), group=0),
        answer(0, 1, ((2, 0, 1), (4, 1, 3)), group=0),  # its first token is three versions old
        answer(0, 0, ((3, 0, 3),), group=1),
        answer(0, 0, ((6, 0, 3),), group=2),  # newer than the learner: a roll back lies between
        answer(0, 0, (), group=3),  # from the data
    ]
    kept = fresh_groups(judged, 5, 2)
    assert [(item.group, item.completion.versions) for item in kept] == [(0, ((3, 0, 3),)), (1, ())]
    assert [item.group for item in fresh_groups(judged, 6, 4)] == [0, 0, 1, 2, 3]
    meters = staleness_meters(judged[:3], 5)
    assert meters["staleness/mean"] == Meter(sum=1 * 3 + (3 * 1 + 1 * 2) + 2 * 3, count=9.0)
    assert meters["staleness/mixed"] == Meter(sum=1.0, count=3.0)
    assert staleness_meters(judged[4:], 5) == {}


def test_dropped_groups_are_counted_and_others_drawn_where_none_is_left(ahead):
    ahead.begin(0, {})
    ahead.settle()  # drawn with version 0
    ahead.source.version = 7
    judged = ahead.collect_fresh(0, {}, 7, 1)
    assert ahead.source.drawn == [(0, 0), (0, 7)] and {item.completion.versions for item in judged} == {((7, 0, 3),)}
    assert ahead.meters()["staleness/dropped_groups"].sum == 2 and ahead.meters()["staleness/mean"].mean == 0
    assert ahead.collect_fresh(1, {}, 8, 1) and ahead.meters()["staleness/dropped_groups"].sum == 0


def test_what_collecting_raised_is_raised_where_it_is_waited_for_and_leaves_the_state_usable(ahead):
    ahead.begin(0, {})
    ahead.settle()
    ahead.source.broken = ValueError("the verifier failed")
    ahead.begin(1, {})
    ahead.settle()
    assert [step for step, _ in ahead.state()["unused"]] == [0]
    ahead.collect(0, {})
    with pytest.raises(ValueError, match="the verifier failed"):
        ahead.collect(1, {})
    assert ahead.state() == {"taken": {"cursor": 1}, "source": {"cursor": 1}, "unused": []}


def test_a_wait_ends_when_the_run_is_asked_to_stop():
    source, asked = FakeSource(), threading.Event()

    def check():
        if asked.is_set():
            raise KeyboardInterrupt("stop")

    ahead = Ahead(source, check)
    source.gate.clear()
    ahead.begin(0, {})
    asked.set()
    with pytest.raises(KeyboardInterrupt, match="stop"):
        ahead.collect(0, {})
    source.gate.set()
    ahead.close()
