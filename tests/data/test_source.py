import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from opd_rollout.sampling import request_seed
from opd_rollout.types import Completion, GenerateRequest, Sampling

from opd.prompts import shuffled_stream
from opd.source import Codec, Mixture, RolloutSource, SourceSettings, parse_source, student_answers
from opd.types import Meter, Prompt, Verdict

SAMPLING = Sampling(max_tokens=4, stop_ids=(0,))
CODEC = Codec(
    encode=lambda prompt: (1, *(ord(c) for c in prompt.messages[0]["content"])),
    tokenize=lambda text: tuple(ord(c) for c in text),
    decode=lambda ids: "".join(chr(i) for i in ids if i > 1),
    end=0,
)


class ScriptedEngine:
    """Answers each request with letters that its seed decides: "r" right, "w" wrong, "cccc" cut at the length limit."""

    def __init__(self, script) -> None:
        self.script, self.requests = script, []

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        self.requests.append(list(requests))
        return [self.answer(self.script(request), sampling) for request in requests]

    @staticmethod
    def answer(text: str, sampling: Sampling) -> Completion:
        ids = (*(ord(c) for c in text), 0)[: sampling.max_tokens]
        return Completion(
            token_ids=ids,
            logprobs=torch.full((len(ids),), -0.5),
            loss_mask=torch.ones(len(ids), dtype=torch.bool),
            source="student",
            temperature=sampling.temperature,
            finish="stop" if ids and ids[-1] == 0 else "length",
            versions=((7, 0, len(ids)),),
        )


def prompts(n, **more):
    return [
        Prompt(
            id=f"p{i}", messages=({"role": "user", "content": f"q{i}"},), answer="r", hints={"solution": f"s{i}", "long": "x" * 9}, **more
        )
        for i in range(n)
    ]


def verify(prompt, text):
    return Verdict(reward=float(text == "r"), correct=text == "r", parts={"answer": float(text == "r")})


def by_seed(request):
    return "rw"[request.seed % 2]


def make(script=by_seed, *, verifier=verify, num_prompts=4, group=2, pool=6, engine=None, sampling=SAMPLING, show=None, **settings):
    engine = engine or ScriptedEngine(script)
    chosen = SourceSettings(num_prompts=num_prompts, group=group, seed=11, **settings)
    return RolloutSource(engine, shuffled_stream(prompts(pool), 5), verifier, CODEC, sampling, chosen, show), engine


def outline(judged):
    return [(j.prompt.id, j.group, j.member, j.text, j.completion.token_ids, j.verdict.reward) for j in judged]


def test_requests_and_numbering_by_hand():
    source, engine = make()
    judged = source.collect(step=3)
    drawn = [p.id for p in shuffled_stream(prompts(6), 5).take(4)]
    assert [(j.prompt.id, j.group, j.member) for j in judged] == [(name, g, m) for g, name in enumerate(drawn) for m in (0, 1)]
    [requests] = engine.requests
    assert [r.seed for r in requests] == [request_seed(11, name, m, 3) for name in drawn for m in (0, 1)]
    assert [r.prompt_ids for r in requests] == [(1, ord("q"), ord(name[1])) for name in drawn for _ in (0, 1)]
    assert [j.prompt_ids for j in judged] == [r.prompt_ids for r in requests]
    assert [j.text for j in judged] == [by_seed(r) for r in requests]
    assert all(j.completion.token_ids == (ord(j.text), 0) for j in judged), "the end token stays in the completion, not in the text"


def shown(prompt):
    return (9, ord(prompt.id[1]))


def test_answers_under_a_view_are_asked_with_its_ids_and_keep_the_students_prompt():
    source, engine = make(student_share=0.0, view="main", show=shown)
    judged = source.collect(3)
    [requests] = engine.requests
    assert [r.prompt_ids for r in requests] == [(9, ord(j.prompt.id[1])) for j in judged], "the whole group under the view"
    assert {j.completion.source for j in judged} == {"view"} and all(j.prompt_ids[0] == 1 for j in judged)
    assert all(torch.isfinite(j.completion.logprobs).all() for j in judged)
    assert source.meters()["tokens/student"].sum == sum(len(j.completion.token_ids) for j in judged), "the student sampled them"
    blind, _ = make(student_share=0.0, view="main", show=lambda prompt: None)
    with pytest.raises(ValueError, match="the view of signal 'main' has nothing to show for prompt"):
        blind.collect(0)


def test_a_mixture_with_a_view_tosses_a_coin_a_prompt():
    source, _ = make(student_share=0.5, view="main", show=shown, num_prompts=40, pool=40)
    by_prompt = {}
    for j in source.collect(0):
        by_prompt.setdefault(j.prompt.id, set()).add(j.completion.source)
    assert all(len(sources) == 1 for sources in by_prompt.values()) and 10 < sum(s == {"view"} for s in by_prompt.values()) < 30


def test_meters_by_hand():
    answers = iter(["r", "ww", "cccc", "r"])
    source, _ = make(lambda request: next(answers), num_prompts=2)
    source.collect(0)
    meters = source.meters()
    assert meters["tokens/student"] == Meter(sum=2 + 3 + 4 + 2, count=1)
    assert meters["length/mean"] == Meter(sum=11, count=4)
    assert meters["length/truncated"] == Meter(sum=1, count=4)
    assert meters["reward/mean"] == meters["accuracy/train"] == meters["reward/answer"] == Meter(sum=2, count=4)
    assert meters["verdict/error"] == Meter(sum=0, count=4)
    assert meters["tokens/discarded"].mean == 0
    assert "rollout/dataset_share" not in meters
    assert source.totals() == {"generated_tokens": 11, "discarded_tokens": 0, "verifier_errors": 0}


def test_second_draw_of_a_prompt_in_a_step_has_seeds_of_its_own():
    source, engine = make(num_prompts=5, pool=2)
    source.collect(0)
    seeds = [r.seed for r in engine.requests[0]]
    assert len(set(seeds)) == 10


def test_steps_differ_and_repeat():
    first, _ = make()
    steps = [outline(first.collect(step)) for step in range(3)]
    second, _ = make()
    assert [outline(second.collect(step)) for step in range(3)] == steps
    assert steps[0] != steps[1]


@pytest.mark.parametrize("settings", [{}, {"filter": "mixed_groups"}, {"student_share": 0.5, "dataset_hint": "solution"}])
def test_resume_is_exact_after_every_step(settings):
    whole, _ = make(**settings)
    steps = [outline(whole.collect(step)) for step in range(6)]
    for cut in range(6):
        first, _ = make(**settings)
        for step in range(cut):
            first.collect(step)
        state = json.loads(json.dumps(first.state()))
        second, _ = make(**settings)
        second.load_state(state)
        assert [outline(second.collect(step)) for step in range(cut, 6)] == steps[cut:]
        assert second.totals() == whole.totals()


def by_prompt(**answers):
    """Member answers by prompt number, e.g. p0="rw"; a prompt drawn again answers the same."""
    turn = {}

    def script(request):
        name = f"p{chr(request.prompt_ids[-1])}"
        turn[name] = turn.get(name, -1) + 1
        return answers[name][turn[name] % len(answers[name])]

    return script


def test_filter_refills_until_the_batch_is_full():
    order = [p.id for p in shuffled_stream(prompts(6), 5).take(6)]
    mixed = {order[1], order[3], order[4]}
    source, engine = make(by_prompt(**{name: "rw" if name in mixed else "rr" for name in order}), num_prompts=3, filter="mixed_groups")
    judged = source.collect(0)
    assert [(j.prompt.id, j.group, j.member, j.text) for j in judged] == [
        (order[1], 0, 0, "r"),
        (order[1], 0, 1, "w"),
        (order[3], 1, 0, "r"),
        (order[3], 1, 1, "w"),
        (order[4], 2, 0, "r"),
        (order[4], 2, 1, "w"),
    ]
    assert [len(requests) for requests in engine.requests] == [6, 4]  # three groups, then the two that were missing
    meters = source.meters()
    assert meters["tokens/student"].sum == 20
    assert meters["tokens/discarded"].sum == 8
    assert meters["accuracy/train"] == Meter(sum=7, count=10), "accuracy is that of all answers, not of the filtered ones"
    assert meters["rollout/groups_kept"] == Meter(sum=3, count=5)
    assert meters["rollout/rounds"].sum == 2
    assert source.totals() == {"generated_tokens": 20, "discarded_tokens": 8, "verifier_errors": 0}


def test_filter_stops_after_max_refill_with_what_it_has():
    order = [p.id for p in shuffled_stream(prompts(6), 5).take(6)]
    script = by_prompt(**{name: "rw" if name == order[0] else "ww" for name in order})
    source, engine = make(script, num_prompts=2, filter="mixed_groups", max_refill=2)
    judged = source.collect(0)
    assert [len(requests) for requests in engine.requests] == [4, 2, 2]
    assert [(j.prompt.id, j.group) for j in judged] == [(order[0], 0)] * 2
    assert source.meters()["tokens/discarded"].sum == 12


def test_filter_that_no_group_passes_gives_the_last_round_back():
    source, engine = make(lambda request: "w", num_prompts=2, filter="mixed_groups", max_refill=1)
    judged = source.collect(0)
    order = [p.id for p in shuffled_stream(prompts(6), 5).take(4)]
    assert [j.prompt.id for j in judged] == [order[2], order[2], order[3], order[3]]
    assert [j.group for j in judged] == [0, 0, 1, 1]
    assert source.meters()["tokens/student"].sum == 16
    assert source.meters()["tokens/discarded"].sum == 8


def test_filter_ignores_rewards_that_mean_nothing():
    def flaky(prompt, text):
        if text == "w":
            raise RuntimeError("judge is down")
        return verify(prompt, text)

    source, _ = make(by_prompt(**{f"p{i}": "rw" for i in range(6)}), verifier=flaky, num_prompts=2, filter="mixed_groups", max_refill=0)
    source.collect(0)
    assert source.meters()["rollout/groups_kept"] == Meter(sum=2, count=2)  # nothing passed: the round came back whole
    assert source.meters()["tokens/discarded"].sum == 0


def test_dataset_answers():
    source, engine = make(student_share=0.0, dataset_hint="solution", group=3)
    judged = source.collect(0)
    assert engine.requests == []
    assert [(j.group, j.member) for j in judged] == [(g, 0) for g in range(4)], "one answer a prompt, whatever the group size"
    for item in judged:
        text = item.prompt.hints["solution"]
        assert item.text == text
        assert item.completion.token_ids == (*map(ord, text), 0)
        assert item.completion.logprobs.isnan().all()
        assert item.completion.loss_mask.tolist() == [True] * 3
        assert (item.completion.source, item.completion.finish, item.completion.versions) == ("dataset", "stop", ())
        assert item.completion.temperature == 1.0
    meters = source.meters()
    assert meters["tokens/student"].sum == 0
    assert meters["rollout/dataset_share"].mean == 1.0
    assert not {"reward/mean", "accuracy/train", "length/mean"} & set(meters), "the data's answers are not the student's"
    assert source.totals()["generated_tokens"] == 0


def test_long_dataset_answers_are_cut_without_an_end():
    source, _ = make(student_share=0.0, dataset_hint="long")
    completion = source.collect(0)[0].completion
    assert completion.token_ids == (ord("x"),) * 4
    assert completion.finish == "length"


def test_missing_dataset_hint_names_the_prompt():
    source, _ = make(student_share=0.0, dataset_hint="solutions")
    with pytest.raises(ValueError, match=r"has no hint 'solutions' \(did you mean 'solution'\?\) to learn from; it has solution, long"):
        source.collect(0)


def test_coin_is_tossed_per_prompt_and_has_the_right_share():
    source, engine = make(student_share=0.5, dataset_hint="solution", num_prompts=6)
    judged = source.collect(0)
    for item in judged:
        expected = student_answers(source.settings, item.prompt.id, 0, 0)
        assert (item.completion.source == "student") == expected
    from_student = {j.prompt.id for j in judged if j.completion.source == "student"}
    assert 0 < len(from_student) < 6
    assert len(engine.requests[0]) == 2 * len(from_student)
    settings = replace(source.settings, student_share=0.3)
    share = sum(student_answers(settings, f"p{i}", 0, step) for i in range(100) for step in range(100)) / 10_000
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 10_000)


def test_overlong_answers_can_leave_the_loss():
    masked, _ = make(lambda request: "cccc", overlong="mask")
    assert all(not j.completion.loss_mask.any() for j in masked.collect(0))
    kept, _ = make(lambda request: "cccc")
    assert all(j.completion.loss_mask.all() for j in kept.collect(0))
    short, _ = make(lambda request: "r", overlong="mask")
    assert all(j.completion.loss_mask.all() for j in short.collect(0))


def test_verifier_errors_are_counted_and_do_not_stop_a_step():
    def flaky(prompt, text):
        if text == "w":
            raise RuntimeError("judge is down")
        return verify(prompt, text)

    answers = iter("rwrr" * 2)
    source, _ = make(lambda request: next(answers), verifier=flaky)
    judged = source.collect(0)
    assert [j.verdict.status for j in judged] == ["score", "error", "score", "score"] * 2
    assert judged[1].verdict.feedback == "RuntimeError: judge is down"
    assert source.meters()["verdict/error"] == Meter(sum=2, count=8)
    assert source.meters()["accuracy/train"] == Meter(sum=6, count=6)
    assert source.totals()["verifier_errors"] == 2


def test_a_verifier_that_always_fails_stops_the_run_with_its_words():
    def broken(prompt, text):
        raise RuntimeError("judge is down")

    source, _ = make(verifier=broken)
    with pytest.raises(ValueError, match="failed on 8 of 8 answers of this step; first on prompt 'p[0-5]': RuntimeError: judge is down"):
        source.collect(0)


def test_share_of_errors_that_stops_the_run_can_be_lowered():
    answers = iter("rwrr")
    flaky = lambda prompt, text: verify(prompt, text) if text == "r" else 1 / 0  # noqa: E731
    source, _ = make(lambda request: next(answers), verifier=flaky, num_prompts=2, max_error_share=0.25)
    with pytest.raises(ValueError, match="failed on 1 of 4 answers of this step.*ZeroDivisionError"):
        source.collect(0)


def test_abstaining_is_not_an_error():
    source, _ = make(verifier=lambda prompt, text: Verdict(status="abstain"))
    source.collect(0)
    assert source.meters()["verdict/abstain"].mean == 1.0
    assert "reward/mean" not in source.meters()


def test_too_long_prompt_is_refused():
    source, _ = make(max_prompt_tokens=2)
    with pytest.raises(ValueError, match="has 3 tokens, more than 2; raise data.max_prompt_tokens"):
        source.collect(0)


@pytest.mark.parametrize(
    ("choice", "parsed"),
    [
        ("student", (1.0, "", "")),
        ({"dataset": "solution"}, (0.0, "solution", "")),
        ({"mixed": {"student": 0.5, "dataset": "facts"}}, (0.5, "facts", "")),
        ({"view": "main"}, (0.0, "", "main")),
        ({"mixed": {"student": 0.25, "view": "main"}}, (0.25, "", "main")),
    ],
)
def test_source_choices(choice, parsed):
    assert parse_source(choice)[:3] == parsed and parse_source(choice).schedule is None


def test_in_pairs_the_data_answers_every_prompt_after_the_student():
    assert parse_source({"paired": {"dataset": "solution"}}) == Mixture(1.0, "solution", paired=True)
    source, _ = make(group=2, paired=True, dataset_hint="solution")
    judged = source.collect(0)
    assert [(j.group, j.member, j.completion.source) for j in judged[:4]] == [
        (0, 0, "student"), (0, 1, "student"), (0, 2, "dataset"), (1, 0, "student"),
    ]  # fmt: skip
    assert source.meters()["rollout/dataset_share"].mean == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="mixed_groups"):
        make(group=2, paired=True, dataset_hint="solution", filter="mixed_groups")


def test_a_scheduled_share_of_the_student_is_the_schedules_and_is_remembered_in_the_metrics():
    loop = {"rise_when_worse": {"metric": "eval/dev", "tolerance": 0.1, "rise": 1.0}}
    mixture = parse_source({"mixed": {"student": loop, "dataset": "solution"}})
    assert mixture.kind == "mixed" and mixture.reads_data
    source, _ = make(dataset_hint="solution", student_share=mixture.student, schedule=mixture.schedule)
    metrics, writers = {}, []
    for step, accuracy in enumerate((None, 0.8, 0.75, 0.6, 0.9)):
        metrics |= {} if accuracy is None else {"eval/dev": accuracy}
        writers.append({j.completion.source for j in source.collect(step, metrics)})
        metrics |= {name: meter.mean for name, meter in source.meters().items()}
    assert writers == [{"dataset"}, {"dataset"}, {"dataset"}, {"student"}, {"student"}]
    assert metrics["schedule/rollout.source"] == 1.0 and "schedule/rollout.source/reference" in metrics
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        parse_source({"mixed": {"student": {"linar": {}}, "dataset": "solution"}})


@pytest.mark.parametrize(
    "choice",
    [
        "students",
        "dataset",
        {"dataset": ""},
        {"mixed": {"student": 2, "dataset": "x"}},
        {"mixed": {"student": True, "dataset": "x"}},
        {"mixed": 1},
        {"mixed": {"student": 0.5, "dataset": "x", "view": "main"}},
        {"view": 3},
        3,
    ],
)
def test_other_sources_are_refused(choice):
    with pytest.raises(ValueError, match=r"write student \| \{dataset: HINT\} \| \{view: SIGNAL\} \| \{paired"):
        parse_source(choice)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompts": 0}, "must be at least 1"),
        ({"group": 0}, "must be at least 1"),
        ({"student_share": 1.5}, "between 0 and 1"),
        ({"student_share": 0.5}, "names no hint"),
        ({"filter": "mixed_groups", "group": 1}, "needs group 2 or more"),
        ({"filter": "mixed_groups", "student_share": 0.5, "dataset_hint": "solution"}, "needs group 2 or more and source student"),
    ],
)
def test_settings_under_which_no_step_could_run(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
