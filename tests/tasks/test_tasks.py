"""Laws of every embedded task: gold answers, disjoint splits, determinism, alphabets, hints that hold what they say and no more."""

from itertools import islice

import pytest

from opd.tasks import HINT_TEMPLATES, TASKS
from opd.tasks.tokenizer import character_tokenizer
from opd.tasks.types import NUM_HELD_OUT, SPLITS, bucket_of
from opd.tasks.words import problem_of
from opd.types import Prompt

CASES = [(name, difficulty) for name, task in TASKS.items() for difficulty in task.difficulties]
SPELLED = [name for name, task in TASKS.items() if task.characters]


def take(name: str, split: str, number: int, difficulty: str = "standard", seed: int = 0) -> list[Prompt]:
    return list(islice(TASKS[name].prompts(split, seed, difficulty), number))


def question(prompt: Prompt) -> str:
    name, key = prompt.id.split(":", 1)
    return problem_of(key).question if name == "words" else key


def drawn(prompt: Prompt) -> str:
    """What decides on the split: the question, of a word problem its plan, so that the same one in other words is in the same split."""
    name, key = prompt.id.split(":", 1)
    return key.split("|")[1] if name == "words" else key


def kind_of(prompt: Prompt) -> str:
    """The kind of hint that the user message shows, "" for none."""
    text, templates = prompt.messages[0]["content"], TASKS[prompt.id.split(":")[0]].templates
    return next((kind for kind, template in templates.items() if "\n" in text and text.startswith(template.split("{")[0])), "")


@pytest.mark.parametrize(("name", "difficulty"), CASES)
def test_gold_solutions_are_graded_right(name, difficulty):
    verify = TASKS[name].verify
    for split in ("train", "dev", "test"):
        for prompt in take(name, split, 300, difficulty):
            verdict = verify(prompt, prompt.hints["solution"])
            assert (verdict.reward, verdict.correct, verdict.feedback) == (1.0, True, "")
            assert verdict.parts == {"answer": 1.0, "steps": 1.0}
    for prompt in take(name, "pretrain_teacher", 300, difficulty):
        assert verify(prompt, prompt.hints["demonstration"]).reward == 1.0


@pytest.mark.parametrize(("name", "difficulty"), CASES)
def test_held_out_splits_are_finite_distinct_and_blind_to_the_seed(name, difficulty):
    for split in ("dev", "test"):
        prompts = take(name, split, NUM_HELD_OUT + 1, difficulty)
        assert len(prompts) == NUM_HELD_OUT >= 512
        assert len({drawn(prompt) for prompt in prompts}) == NUM_HELD_OUT
        assert prompts == take(name, split, NUM_HELD_OUT, difficulty, seed=7)


@pytest.mark.parametrize(("name", "difficulty"), CASES)
def test_a_question_belongs_to_one_split_by_its_text(name, difficulty):
    for split in SPLITS:
        bucket = split if split in ("dev", "test") else "train"
        assert {bucket_of(drawn(prompt), TASKS[name].num_buckets) for prompt in take(name, split, 400, difficulty)} == {bucket}


@pytest.mark.parametrize("name", TASKS)
def test_streams_are_functions_of_split_seed_and_difficulty(name):
    for split in ("train", "pretrain_base", "pretrain_teacher"):
        assert take(name, split, 50) == take(name, split, 50)
        assert take(name, split, 50) != take(name, split, 50, seed=1)
        assert take(name, split, 50) != take(name, split, 50, difficulty="easy")
    assert {p.id: p.hints for p in take(name, "train", 3000)}.items() >= {p.id: p.hints for p in take(name, "train", 50)}.items()


@pytest.mark.parametrize("name", SPELLED)
def test_everything_written_is_in_the_alphabet(name):
    alphabet = set(TASKS[name].characters)
    for split in SPLITS:
        for prompt in take(name, split, 200):
            texts = [prompt.messages[0]["content"], prompt.answer, *prompt.hints.values()]
            assert set("".join(texts)) <= alphabet
            assert prompt.domain == f"{name}/standard"
    for prompt in take(name, "train", 50):
        for text in ("", "junk", *prompt.hints.values()):
            assert set(TASKS[name].verify(prompt, text).feedback) <= alphabet


@pytest.mark.parametrize("name", TASKS)
def test_bare_question_and_templates(name):
    for prompt in take(name, "train", 50):
        assert [dict(m) for m in prompt.messages] == [{"role": "user", "content": question(prompt)}]
        assert set(prompt.hints) == {*TASKS[name].templates, "fact"} - {"feedback"} >= {"solution", "facts", "answer"}
        assert prompt.answer == prompt.hints["answer"]
    kinds = {template.split("{")[0] for template in TASKS[name].templates.values()}
    assert len(kinds) == len(TASKS[name].templates) >= len(HINT_TEMPLATES) == 4
    shown = take(name, "pretrain_base", 2000)
    assert {kind_of(prompt) for prompt in shown} == {"", *TASKS[name].templates}
    bare = sum("\n" not in prompt.messages[0]["content"] for prompt in shown) / len(shown)
    assert 0.3 < bare < 0.6


@pytest.mark.parametrize("name", TASKS)
def test_base_demonstrations_are_partly_wrong_alone_and_better_with_the_answer(name):
    verify = TASKS[name].verify
    right: dict[str, list[bool]] = {}
    for prompt in take(name, "pretrain_base", 3000):
        right.setdefault(kind_of(prompt), []).append(verify(prompt, prompt.hints["demonstration"]).correct)
    rate = {kind: sum(values) / len(values) for kind, values in right.items()}
    assert 0.4 < rate[""] < 0.75
    assert rate["answer"] > rate[""]


@pytest.mark.parametrize("name", TASKS)
def test_unknown_split_and_difficulty(name):
    with pytest.raises(ValueError, match="no split 'validation'.*pretrain_base"):
        take(name, "validation", 1)
    with pytest.raises(ValueError, match="no difficulty 'trivial'.*easy"):
        take(name, "train", 1, "trivial")


@pytest.mark.parametrize("name", SPELLED)
def test_tokenizer_round_trip(name, tmp_path):
    made = character_tokenizer(TASKS[name].characters)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, type(made).from_pretrained(tmp_path)):
        assert len(tokenizer) == 5 + len(set(TASKS[name].characters))
        for prompt in take(name, "pretrain_base", 50):
            message, text = prompt.messages[0]["content"], prompt.hints["demonstration"]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
            rendered = tokenizer.apply_chat_template([dict(m) for m in prompt.messages], add_generation_prompt=True, tokenize=False)
            assert rendered == f"<|user|>{message}<|assistant|>"
            assert len(tokenizer(rendered, add_special_tokens=False)["input_ids"]) == len(message) + 2
        assert tokenizer("é", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
