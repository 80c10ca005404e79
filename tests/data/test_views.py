from dataclasses import replace

import pytest
import torch
from opd_rollout.types import Completion

from opd.contexts import SignalViews, ViewCounts, render_views
from opd.text import chat
from opd.text.bpe import train_byte_bpe
from opd.types import Judged, Prompt, Verdict
from opd.views import TEMPLATES, ViewInput, resolve_view, segments

TASK_TEMPLATES = {
    "solution": "S{hint}\n{question}",
    "facts": "F{hint}\n{question}",
    "answer": "A{hint}\n{question}",
    "feedback": "W{hint}\n{question}",
}
HINTS = {"solution": "1+1=2;2+1=3", "facts": "1+1=2", "answer": "3"}
TOKENIZER = train_byte_bpe(["1+1=2;2+1=3 What is 1+1+1?"], 300)


def answered(text="3", *, verdict=None, group=0, member=0, hints=None, messages=None, id="p"):
    messages = messages or ({"role": "user", "content": "1+1+1?"},)
    prompt = Prompt(id=id, messages=messages, answer="3", hints=HINTS if hints is None else hints)
    ids = chat.tokenize(TOKENIZER, text)
    completion = Completion(
        token_ids=ids,
        logprobs=torch.zeros(len(ids)),
        loss_mask=torch.ones(len(ids), dtype=torch.bool),
        source="student",
        temperature=1.0,
        finish="stop",
        versions=(),
    )
    return Judged(
        prompt=prompt,
        prompt_ids=chat.render(TOKENIZER, messages),
        completion=completion,
        text=text,
        verdict=verdict or Verdict(reward=1.0, correct=True),
        group=group,
        member=member,
    )


WRONG = Verdict(feedback="step 2 is wrong")


def view_of(choice, judged, group=None, templates=TASK_TEMPLATES):
    return resolve_view(choice, templates).view(ViewInput(judged=judged, group=group or [judged], templates=templates))


def content(view):
    return None if view is None else view.messages[view.question]["content"]


@pytest.mark.parametrize(
    ("choice", "kind", "text"),
    [
        ("solution", "solution", "S1+1=2;2+1=3\n1+1+1?"),
        ("facts", "facts", "F1+1=2\n1+1+1?"),
        ("answer", "answer", "A3\n1+1+1?"),
        ("demonstration", "demonstration", "S1+1=2;2+1=3\n1+1+1?"),
        ({"hint": {"name": "facts"}}, "facts", "F1+1=2\n1+1+1?"),
        ({"solution": {"template": "opsd"}}, "solution", "S1+1=2;2+1=3\n1+1+1?"),
        ({"solution": {"template": "{question} <- {hint}"}}, "solution", "1+1+1? <- 1+1=2;2+1=3"),
        ("plain", "plain", "1+1+1?"),
    ],
)
def test_hint_views_by_hand(choice, kind, text):
    view = view_of(choice, answered())
    assert (view.kind, content(view), view.question) == (kind, text, 0)


def test_named_template_of_real_text():
    view = view_of({"solution": {"template": "opsd"}}, answered(), templates=TEMPLATES)
    assert content(view) == TEMPLATES["opsd"].replace("{hint}", HINTS["solution"]).replace("{question}", "1+1+1?")
    assert content(view_of("solution", answered(), templates=TEMPLATES)) != content(view)


def test_missing_hint_gives_no_view_and_answer_falls_back_to_the_prompts():
    bare = answered(hints={})
    assert [view_of(name, bare) for name in ("solution", "facts", "demonstration")] == [None, None, None]
    assert content(view_of("answer", bare)) == "A3\n1+1+1?"
    assert view_of("solution", answered(hints={"solution": "  \n"})) is None


def test_hint_that_looks_like_a_slot_is_not_filled_again():
    assert content(view_of("facts", answered(hints={"facts": "{question}{hint}"}))) == "F{question}{hint}\n1+1+1?"


def test_only_the_last_user_message_changes():
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "1+1+1?"},
    )
    view = view_of("facts", answered(messages=messages))
    assert view.messages == (*messages[:3], {"role": "user", "content": "F1+1=2\n1+1+1?"})
    assert view.question == 3


def test_peer_success_is_the_first_correct_sibling():
    group = [
        answered("wrong", verdict=WRONG, member=0),
        answered("good one", member=1),
        answered("<think>no\nyes</think> good two", member=2),
        answered("broken", verdict=Verdict(status="error", reward=1.0, correct=True), member=3),
    ]
    shown = [content(view_of("peer_success", item, group)) for item in group]
    assert shown == ["Sgood one\n1+1+1?", "Sgood two\n1+1+1?", "Sgood one\n1+1+1?", "Sgood one\n1+1+1?"]
    assert content(view_of({"peer_success": {"own": True}}, group[1], group)) == "Sgood one\n1+1+1?"
    assert view_of("peer_success", group[1], group[:2]) is None
    assert view_of("peer_success", group[3], [group[0], group[3]]) is None


def test_feedback_and_its_solution():
    wrong, right = answered("x", verdict=WRONG, member=0), answered("good", member=1)
    assert content(view_of("feedback", wrong)) == "Wstep 2 is wrong\n1+1+1?"
    assert view_of("feedback", right) is None
    sdpo = {"feedback": {"solution": "peer_success", "own": False}}
    assert content(view_of(sdpo, wrong, [wrong, right])) == "Sgood\n1+1+1?"
    assert content(view_of(sdpo, wrong, [wrong])) == "Wstep 2 is wrong\n1+1+1?"
    assert view_of(sdpo, right, [wrong, right]) is None
    crashed = answered("x", verdict=Verdict(status="error", feedback="Timeout"))
    assert view_of("feedback", crashed) is None, "an exception's text is no feedback"


def test_feedback_and_a_siblings_solution_together():
    wrong, right = answered("x", verdict=WRONG, member=0), answered("good", member=1)
    both = {"feedback": {"solution": "peer_success", "together": True}}
    shown = view_of(both, wrong, [wrong, right], TEMPLATES)
    text = TEMPLATES["solution_and_feedback"].replace("{hint}", "good").replace("{feedback}", "step 2 is wrong").replace("{question}", "1+1+1?")
    assert (content(shown), shown.hint) == (text, "good")
    assert content(view_of(both, wrong, [wrong, right])) == "Wstep 2 is wrong\nSgood\n1+1+1?"
    assert content(view_of(both, wrong, [wrong])) == "Wstep 2 is wrong\n1+1+1?"
    silent = answered("x", verdict=Verdict(), member=0)
    assert content(view_of(both, silent, [silent, right])) == "Sgood\n1+1+1?"
    assert view_of(both, right, [wrong, right]) is None


def test_segments_join_to_the_text_and_end_where_a_reader_stops():
    text = "First 1.5 is said. Then?\nx=2;y=3;"
    assert segments(text) == ["First 1.5 is said.", " Then?\n", "x=2;", "y=3;"]
    assert "".join(segments(text)) == text and segments("") == []
    assert segments("three small words") == ["three ", "small ", "words"] and segments("0+5") == ["0", "+", "5"]


@pytest.mark.parametrize(
    ("choice", "shown"),
    [
        ({"share": 0.0}, "9"),
        ({"share": 0.5}, "a;b;\n9"),
        ({"share": 0.74}, "a;b;\n9"),
        ({"share": 1.0}, "a;b;c;9"),
        ({"share": 0.5, "answer": False}, "a;b;"),
    ],
)
def test_partial_solution_by_hand(choice, shown):
    judged = answered(hints={"solution": "a;b;c;9", "answer": "9"})
    assert content(view_of({"partial_solution": choice}, judged)) == f"S{shown}\n1+1+1?"


def test_partial_solution_takes_its_share_from_a_controller():
    judged = answered(hints={"solution": "a;b;c;9", "answer": "9"})
    spec = resolve_view({"partial_solution": {"share": "exposure"}}, TASK_TEMPLATES)
    seen = ViewInput(judged=judged, group=[judged], templates=TASK_TEMPLATES, controls={"exposure": 0.25})
    assert content(spec.view(seen)) == "Sa;\n9\n1+1+1?"
    assert view_of({"partial_solution": {"share": 0.5}}, answered(hints={"answer": "9"})) is None, "no solution, no view"


def test_wrong_answer_is_the_worst_siblings_last_word_in_the_form_of_the_right_one():
    bad, worse = (answered(text, verdict=Verdict(reward=reward), member=m) for m, (text, reward) in enumerate((("so 4", 0.2), ("so 7", -1.0))))
    broken, right = answered("so 8", verdict=Verdict(status="error", reward=-5.0), member=2), answered("so 3", member=3)
    assert content(view_of("wrong_answer", right, [bad, worse, broken, right])) == "A7\n1+1+1?"
    assert content(view_of("answer", right)) == "A3\n1+1+1?"
    assert view_of("wrong_answer", right, [broken, right]) is None


def test_revision_puts_the_attempt_and_the_verdict_into_the_assistants_turn():
    phrases = {"right": "ok", "wrong": "no", "between": "|"}
    for verdict, phrase in ((WRONG, "no"), (Verdict(reward=1.0, correct=True), "ok")):
        judged = answered("1+1=2;3", verdict=verdict)
        [ids], counts = render_views(TOKENIZER, [judged], resolve_view({"revision": phrases}, TASK_TEMPLATES), 100)
        assert ids == judged.prompt_ids + chat.tokenize(TOKENIZER, f"1+1=2;3|{phrase}|") and counts.shown == 1
        [short], counts = render_views(TOKENIZER, [judged], resolve_view({"revision": phrases}, TASK_TEMPLATES), len(ids) - 1)
        assert counts.shortened == 1 and len(short) < len(ids), "the first copy is shortened, the scored one never"
        assert TOKENIZER.decode(short).endswith(f"|{phrase}|")
    assert view_of("revision", answered("x", verdict=Verdict(status="abstain"))) is None


def test_instruction_and_note():
    assert content(view_of({"instruction": {"text": "Be brief."}}, answered(), templates=TEMPLATES)) == "1+1+1?\n\nBe brief."
    noted = replace(answered("x"), notes={"critique": "step 2"})
    assert content(view_of({"note": {"name": "critique"}}, noted)) == "Wstep 2\n1+1+1?"
    assert view_of({"note": {"name": "other"}}, noted) is None


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("solutoin", "unknown name 'solutoin' \\(did you mean 'solution'"),
        ({"solution": {"templat": "opsd"}}, "unknown parameter 'templat' \\(did you mean 'template'"),
        ({"solution": {"template": "opds"}}, "no template 'opds' \\(did you mean 'opsd'"),
        ({"solution": {"template": "only {hint}"}}, "lacks {question}"),
        ({"hint": {"name": "picture"}}, "no template 'picture'"),
        ("hint", "needs name"),
        ({"partial_solution": {"share": 1.5}}, "share is 1.5; it must be a number at least 0 and at most 1 or a text"),
        ("instruction", "needs text"),
        ({"feedback": {"solution": "peers"}}, "must be none | peer_success"),
    ],
)
def test_mistakes_are_refused_before_work_starts(choice, message):
    with pytest.raises(ValueError, match=message):
        resolve_view(choice, TASK_TEMPLATES)


def test_render_views_counts_and_context_ids():
    judged = [answered(group=0), answered(group=1, hints={}), answered("x", verdict=WRONG, group=0, member=1)]
    contexts, counts = render_views(TOKENIZER, judged, resolve_view("facts", TASK_TEMPLATES), 100)
    expected = chat.tokenize(TOKENIZER, "<|user|>F1+1=2\n1+1+1?<|assistant|>")
    assert contexts == [expected, None, expected]
    assert counts == ViewCounts(shown=2, absent=1, shortened=0, dropped=0)


def test_whole_groups_of_a_step_keep_their_contexts_and_parts_of_a_group_are_shown_anew(monkeypatch):
    hints = {"solution": "1+1=2;2+1=3;3+1=4;9", "answer": "9"}
    verdicts = {0: WRONG, 1: None}  # of a group's members
    judged = [answered("3", group=group, member=n, verdict=verdict, hints=hints) for group in (0, 1) for n, verdict in verdicts.items()]
    peers, share = resolve_view("peer_success", TASK_TEMPLATES), resolve_view({"partial_solution": {"share": "exposure"}}, TASK_TEMPLATES)
    views = SignalViews(TOKENIZER, {"peers": peers, "part": share}, 100)
    given, counted = views(judged, {"exposure": 0.5}), dict(views.meters())
    step = {name: list(found) for name, found in given.items()}
    given["part"].clear()  # whoever holds it may change it
    rendered = []
    monkeypatch.setattr(chat, "render", lambda *a, render=chat.render, **k: rendered.append(1) or render(*a, **k))
    assert views(judged[2:], {"exposure": 0.5}) == {name: found[2:] for name, found in step.items()}
    assert rendered == [] and views.meters() == counted
    assert views(judged[2:]) == views(judged[2:], {"exposure": 0.5}), "who looks at a step's answers sees what the step showed"
    assert views(judged[2:], {"exposure": 0.9})["part"] != step["part"][2:] == views(judged[2:], {"exposure": 0.5})["part"]
    fresh = SignalViews(TOKENIZER, {"peers": peers, "part": share}, 100)
    assert views(judged[:1], {"exposure": 0.5}) == fresh(judged[:1], {"exposure": 0.5})
    others = [answered("3", group=0, member=n, verdict=verdict, hints=hints | {"solution": "9"}) for n, verdict in verdicts.items()]
    views(judged, {"exposure": 1.0})
    assert views(others) == fresh(others, {"exposure": 1.0}) != views(judged[:2]), "other answers under the same number"
    assert step["peers"][0] is not None and views(judged[:1], {"exposure": 0.5})["peers"] == [None]


def test_groups_are_kept_apart():
    judged = [answered("first", group=0), answered("second", group=1), answered("x", verdict=WRONG, group=1, member=1)]
    contexts, counts = render_views(TOKENIZER, judged, resolve_view("peer_success", TASK_TEMPLATES), 100)
    assert contexts == [None, None, chat.tokenize(TOKENIZER, "<|user|>Ssecond\n1+1+1?<|assistant|>")]
    assert counts.absent == 2


def test_only_the_hint_is_shortened_and_as_little_as_needed():
    judged = answered(hints={"solution": "abcdefghij" * 20})
    spec = resolve_view({"solution": {"template": "{question}|{hint}|"}}, TASK_TEMPLATES)
    [full], counts = render_views(TOKENIZER, [judged], spec, 10_000)
    assert counts.shortened == 0
    for limit in range(len(full) - 1, 0, -7):
        [ids], counts = render_views(TOKENIZER, [judged], spec, limit)
        hintless = len(chat.tokenize(TOKENIZER, "<|user|>1+1+1?||<|assistant|>"))
        if limit <= hintless:
            assert ids is None
            assert counts == ViewCounts(shown=0, absent=0, shortened=0, dropped=1)
            continue
        assert counts == ViewCounts(shown=1, absent=0, shortened=1, dropped=0)
        assert len(ids) == limit, "these letters are a token each"
        text = TOKENIZER.decode(ids)
        assert text.startswith("<|user|>1+1+1?|abc"[: limit + 14])
        assert text.endswith("|<|assistant|>")


def test_shortening_is_safe_where_the_hint_stands_in_the_question_too():
    judged = answered(hints={"facts": "1+1+1?1+1+1?1+1+1?"})
    spec = resolve_view({"facts": {"template": "{question} / {hint}"}}, TASK_TEMPLATES)
    [full], _ = render_views(TOKENIZER, [judged], spec, 1000)
    [ids], counts = render_views(TOKENIZER, [judged], spec, len(full) - 2)
    assert counts.shortened == 1
    assert TOKENIZER.decode(ids).startswith("<|user|>1+1+1? / 1+1")


def test_plain_view_equals_the_students_prompt_and_is_never_cut():
    judged = answered()
    [ids], _ = render_views(TOKENIZER, [judged], resolve_view("plain", {}), 1000)
    assert ids == judged.prompt_ids
    [none], counts = render_views(TOKENIZER, [judged], resolve_view("plain", {}), len(ids) - 1)
    assert (none, counts.dropped) == (None, 1)


def test_student_with_another_opening_of_the_assistants_turn_is_refused():
    judged = replace(answered(), prompt_ids=(5, 6, 7))
    with pytest.raises(ValueError, match="the student's prompt does not end with the assistant's opening"):
        render_views(TOKENIZER, [judged], resolve_view("facts", TASK_TEMPLATES), 100)


def test_a_view_of_ones_own_through_its_door(tmp_path, monkeypatch):
    lines = [
        "from opd.views import place",
        "def shout(seen, *, mark: str = '!'):",
        "    return place(seen, 'facts', mark + seen.judged.text, '{hint}{question}')",
    ]
    (tmp_path / "my_paper.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    assert content(view_of({"fn": "my_paper:shout", "mark": "?"}, answered("good"))) == "?good1+1+1?"
    with pytest.raises(ValueError, match="unknown parameter 'marks' \\(did you mean 'mark'"):
        resolve_view({"fn": "my_paper:shout", "marks": "?"}, TASK_TEMPLATES)
