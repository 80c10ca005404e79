"""Teachers by domain: who sees which prompts, and what is refused before a run starts."""

import pytest

from opd.contexts import SignalViews, check_domains, in_domain, unanswered
from opd.tasks import TASKS
from opd.tasks.tokenizer import character_tokenizer
from opd.text.chat import render
from opd.types import Prompt
from opd.views import TEMPLATES, resolve_view

PROMPTS = [Prompt(id=d, messages=({"role": "user", "content": "1+1"},), domain=d) for d in ("math", "math/algebra", "code", "mathematics")]


def test_a_domain_holds_its_parts_and_nothing_that_only_begins_alike():
    assert [in_domain(prompt, "math") for prompt in PROMPTS] == [True, True, False, False]
    assert all(in_domain(prompt, "") for prompt in PROMPTS)


def test_a_signal_shows_nothing_outside_its_domain():
    tokenizer, plain = character_tokenizer(TASKS["expr"].characters), resolve_view("plain", TEMPLATES)
    judged = [unanswered(prompt, render(tokenizer, prompt.messages)) for prompt in PROMPTS]
    views = SignalViews(tokenizer, {"first": plain, "second": plain, "all": plain}, 99, {"first": "math", "second": "code"})
    shown = {name: [ids is not None for ids in contexts] for name, contexts in views(judged).items()}
    assert shown == {"first": [True, True, False, False], "second": [False, False, True, False], "all": [True] * 4}


def test_domains_without_prompts_and_prompts_without_a_teacher_are_refused():
    check_domains({"first": "math", "second": ""}, PROMPTS)
    check_domains({}, PROMPTS)
    with pytest.raises(ValueError, match="signals.first.domain: no training prompt has the domain 'maths' .did you mean 'math'"):
        check_domains({"first": "maths", "second": ""}, PROMPTS)
    with pytest.raises(ValueError, match="no teacher sees the prompts of the domain 'mathematics'"):
        check_domains({"first": "math", "second": "code"}, PROMPTS)
