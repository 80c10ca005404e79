import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd.text import chat
from opd.text.bpe import SMALLEST, train_byte_bpe

TEXTS = ["Mara packs 6 boxes with 12 candles each.", "The café sells crêpes; 9 an hour.", "#### 22\n#### 23"] * 3
USER = ({"role": "user", "content": "How many?"},)


@pytest.fixture()
def tokenizer():
    return train_byte_bpe(TEXTS, 300)


def test_render_equals_the_template_by_hand(tokenizer):
    ids = chat.render(tokenizer, ({"role": "system", "content": "Be brief."}, *USER))
    assert ids == chat.tokenize(tokenizer, "<|system|>Be brief.<|user|>How many?<|assistant|>")
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|system|>")
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert chat.render(tokenizer, USER) == ids[ids.index(tokenizer.convert_tokens_to_ids("<|user|>")) :]


def test_render_keeps_the_end_of_assistant_turns(tokenizer):
    ids = chat.render(tokenizer, (*USER, {"role": "assistant", "content": "7"}, *USER))
    assert ids.count(tokenizer.eos_token_id) == 1


def test_thinking_reaches_templates_that_know_it(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{% endif %}",
        "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}",
    )
    plain = chat.render(tokenizer, USER)
    assert chat.render(tokenizer, USER, thinking=True) == plain
    assert chat.render(tokenizer, USER, thinking=False) == (*plain, *chat.tokenize(tokenizer, "<think></think>"))
    assert chat.assistant_prefix(tokenizer, thinking=False)[1:] == chat.tokenize(tokenizer, "<think></think>")


def test_assistant_prefix(tokenizer):
    assert chat.assistant_prefix(tokenizer) == (tokenizer.convert_tokens_to_ids("<|assistant|>"),)


def test_assistant_prefix_that_depends_on_the_conversation_is_refused(tokenizer):
    tokenizer.chat_template += "{% if add_generation_prompt and '7' in messages[-1].content %}!{% endif %}"
    with pytest.raises(ValueError, match="opens differently in different conversations"):
        chat.assistant_prefix(tokenizer)


def test_assistant_prefix_that_merges_with_the_question_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}\n\n{% endif %}"
    merged = train_byte_bpe(["a\n\n\n\nb"] * 50, SMALLEST + 3)
    merged.chat_template = tokenizer.chat_template
    with pytest.raises(ValueError, match="merged with the text before it"):
        chat.assistant_prefix(merged)


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{% if add_generation_prompt %}>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="changes earlier turns"):
        chat.assistant_prefix(tokenizer)


def test_missing_or_refusing_template_is_a_clear_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"roles \[user\]: no system role"):
        chat.render(tokenizer, USER)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat.render(tokenizer, USER)


def test_stop_ids(tokenizer):
    end = tokenizer.eos_token_id
    assert chat.stop_ids(tokenizer) == (end,)
    assert chat.stop_ids(tokenizer, SimpleNamespace(eos_token_id=[7, end, 9])) == (end, 7, 9)
    assert chat.stop_ids(tokenizer, SimpleNamespace(eos_token_id=7)) == (end, 7)
    tokenizer.eos_token = None
    assert chat.stop_ids(tokenizer, SimpleNamespace(eos_token_id=[7])) == (7,)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        chat.stop_ids(tokenizer, SimpleNamespace(eos_token_id=None))


@pytest.mark.parametrize("text", ["a . b , c ' s  two  spaces", "naïve 東京 🙂\n\ttab", "", "#### 1,000"])
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    ids = chat.tokenize(tokenizer, text)
    assert chat.decode(tokenizer, ids) == text
    assert chat.decode(tokenizer, (*ids, tokenizer.eos_token_id)) == text


def test_training_a_tokenizer_is_deterministic_across_processes():
    code = f"from opd.text.bpe import train_byte_bpe; print(train_byte_bpe({TEXTS!r}, 300).backend_tokenizer.to_str())"
    root = Path(__file__).resolve().parents[2]
    found = set()
    for threads in ("1", "4"):
        environment = {
            "PYTHONPATH": f"{root}:{root}/rollout:{root}/kernels",
            "RAYON_NUM_THREADS": threads,
            "PYTHONHASHSEED": threads,
            "TOKENIZERS_PARALLELISM": "true",
        }
        found.add(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout)
    [text] = found
    assert len(json.loads(text)["model"]["vocab"]) == 300


def test_vocabulary_size_and_merges(tokenizer):
    assert len(tokenizer) == 300
    assert len(chat.tokenize(tokenizer, TEXTS[0])) < len(TEXTS[0])
    assert len(train_byte_bpe(["abc"], 1000)) < 300  # a small text has few merges to offer
    assert tokenizer.pad_token_id == 0
    assert tokenizer.eos_token_id == 1


def test_saved_tokenizer_loads_with_its_template(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert chat.render(loaded, USER) == chat.render(tokenizer, USER)
    assert chat.stop_ids(loaded) == chat.stop_ids(tokenizer)


def test_tokenizer_needs_text_and_room():
    with pytest.raises(ValueError, match="260 is too small"):
        train_byte_bpe(["text"], SMALLEST - 1)
    with pytest.raises(ValueError, match="no text"):
        train_byte_bpe(["", ""], 300)
