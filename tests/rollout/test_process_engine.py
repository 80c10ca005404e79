"""An engine in another process gives the bits of the one in this process, survives SIGKILL and a stall, and leaves nothing behind."""

import os
import signal
import threading
import time

import pytest
import torch
from opd_rollout.process_engine import ChildSettings, GeneratorLost, ProcessEngine
from opd_rollout.replicas import Replicas, shares_by_key
from opd_rollout.sampling import request_seed
from opd_rollout.torch_engine import TorchEngine, spans
from opd_rollout.types import GenerateRequest, ModuleWeights, Sampling, ScoreRequest

from tests.rollout.models import prompts, qwen3

SETTINGS = ChildSettings(pad_id=0, token_budget=10_000)
SAMPLING = Sampling(max_tokens=12)


def requests(samples=2):
    return [
        GenerateRequest(prompt_ids=text, seed=request_seed(0, str(index), sample, 0))
        for index, text in enumerate(prompts(7))
        for sample in range(samples)
    ]


def weights(model, version):
    return ModuleWeights(version=version, named=tuple((name, parameter.detach()) for name, parameter in model.named_parameters()))


def moved(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def same(found, expected):
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(found, expected, strict=True))
    assert [c.versions for c in found] == [c.versions for c in expected]


def gone(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


@pytest.fixture
def model():
    torch.set_num_threads(1)
    return qwen3()


@pytest.fixture
def engine(model):
    engine = ProcessEngine(model, SETTINGS, stall_seconds=120.0)
    yield engine
    engine.close()


def test_answers_scores_and_new_weights_equal_those_of_the_engine_in_this_process(engine, model):
    here = TorchEngine(model, pad_id=0, token_budget=10_000)
    same(engine.generate(requests(), SAMPLING), here.generate(requests(), SAMPLING))
    for version in (3, 7):
        source = weights(moved(model, version), version)
        engine.load_weights(source)
        here.load_weights(source)
        found = engine.generate(requests(), SAMPLING)
        same(found, here.generate(requests(), SAMPLING))
        assert {c.versions for c in found} == {((version, 0, 12),)}
    asked = [ScoreRequest(context_ids=r.prompt_ids, completion_ids=(3, 4, 5), k=4) for r in requests(1)]
    for a, b in zip(engine.score(asked, 0.7), here.score(asked, 0.7), strict=True):
        assert torch.equal(a.logp, b.logp) and torch.equal(a.ids, b.ids) and a.version == b.version == 7


def test_mistakes_are_told_in_this_process_and_the_engine_goes_on(engine, model):
    with pytest.raises(ValueError, match="empty prompt"):
        engine.generate([GenerateRequest(prompt_ids=(), seed=1)], SAMPLING)
    with pytest.raises(ValueError, match="do not fit"):
        engine.load_weights(ModuleWeights(version=1, named=(("lm_head.weights", torch.zeros(1)),)))
    assert len(engine.generate(requests(), SAMPLING)) == len(requests())


def test_a_child_that_is_killed_is_replaced_and_writes_the_same_answers(engine, model):
    engine.load_weights(weights(moved(model, 1), 4))
    expected = engine.generate(requests(), SAMPLING)
    long = Sampling(max_tokens=40)
    whole = engine.generate(requests(), long)
    first, found = engine.pid, []
    caller = threading.Thread(target=lambda: found.extend(engine.generate(requests(150), long)))
    beats = int(engine._shared.counters[2])
    caller.start()
    wait_until(lambda: int(engine._shared.counters[2]) > beats)  # it is writing
    os.kill(first, signal.SIGKILL)
    caller.join(60)
    assert gone(first) and engine.pid != first
    assert len(found) == len(requests(150))
    same(engine.generate(requests(), SAMPLING), expected)
    same(engine.generate(requests(), long), whole)


def test_a_child_that_stops_is_replaced_and_too_many_losses_are_an_error(model):
    engine = ProcessEngine(model, SETTINGS, stall_seconds=1.0, restarts=1)
    try:
        expected = engine.generate(requests(), SAMPLING)
        stopped = engine.pid
        os.kill(stopped, signal.SIGSTOP)
        same(engine.generate(requests(), SAMPLING), expected)
        assert gone(stopped) and engine.pid != stopped
        engine._restarts = 0
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(GeneratorLost, match="1 times in a row"):
            engine.generate(requests(), SAMPLING)
    finally:
        engine.close()
    assert gone(engine.pid)


def test_a_closed_engine_says_so_to_who_waits(model):
    engine, raised = ProcessEngine(model, SETTINGS), []

    def call():
        try:
            engine.generate(requests(40), Sampling(max_tokens=40))
        except GeneratorLost as error:
            raised.append(str(error))

    engine.generate(requests(), SAMPLING)
    os.kill(engine.pid, signal.SIGSTOP)  # it must not answer before it is closed
    caller = threading.Thread(target=call)
    caller.start()
    wait_until(lambda: engine._turn.locked())
    engine.close()
    caller.join(30)
    assert raised == ["the engine is closed"] and gone(engine.pid)


def test_in_flight_weights_change_between_two_tokens_and_every_token_names_its_version(model):
    engine = ProcessEngine(model, ChildSettings(pad_id=0, token_budget=10_000, in_flight=True))
    try:
        engine.load_weights(weights(model, 1))
        asked, long, found = requests(120), Sampling(max_tokens=48), []
        engine.generate(requests(1), SAMPLING)
        caller = threading.Thread(target=lambda: found.extend(engine.generate(asked, long)))
        beats = int(engine._shared.counters[2])
        caller.start()
        wait_until(lambda: int(engine._shared.counters[2]) > beats + 2)
        after = moved(model, 5)
        engine.load_weights(weights(after, 2))
        caller.join(60)
    finally:
        engine.close()
    mixed = [c for c in found if len(c.versions) == 2]
    assert mixed and all(c.versions[0][0] == 1 and c.versions[1][0] == 2 and c.versions[0][2] == c.versions[1][1] for c in mixed)
    # what a span of version 1 holds is what version 1 alone writes: the same seeds, up to the change
    alone = TorchEngine(qwen3(), pad_id=0, token_budget=10_000, version=1).generate(asked, long)
    for change, plain in zip(found, alone, strict=True):
        end = change.versions[0][2] if change.versions[0][0] == 1 else 0
        assert change.token_ids[:end] == plain.token_ids[:end] and torch.equal(change.logprobs[:end], plain.logprobs[:end])
    assert any(c.token_ids != p.token_ids for c, p in zip(found, alone, strict=True))


def test_replicas_share_prompts_out_and_keep_the_order(model):
    assert shares_by_key(["a", "b", "a", "c"], 2) == [[0, 2, 3], [1]]
    assert shares_by_key(["a"], 3) == [[0], [], []]
    with pytest.raises(ValueError, match="at least one"):
        Replicas([])
    engine, here = Replicas([ProcessEngine(model, SETTINGS) for _ in range(2)]), TorchEngine(model, pad_id=0, token_budget=10_000)
    pids = [one.pid for one in engine.engines]
    try:
        source = weights(moved(model, 2), 9)
        engine.load_weights(source)
        here.load_weights(source)
        found, expected = engine.generate(requests(), SAMPLING), here.generate(requests(), SAMPLING)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert all(torch.allclose(a.logprobs, b.logprobs, atol=1e-4) for a, b in zip(found, expected, strict=True))
        assert {c.versions for c in found} == {((9, 0, 12),)}
    finally:
        engine.close()
    assert all(gone(pid) for pid in pids)


def test_spans_of_versions():
    assert spans([3, 3, 4]) == ((3, 0, 2), (4, 2, 3))
    assert spans([5]) == ((5, 0, 1),)
    assert spans([]) == ()
