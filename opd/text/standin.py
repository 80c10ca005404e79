"""Tokenizers that stand in for a family's own where no hub can be asked: bytes, the family's turns, and as many entries as the real one has.

They cut text into bytes, so texts are three to four times as long in tokens as with the real tokenizer; ids beyond the bytes are fillers, there so
that the head is as wide as the real one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How a family writes a conversation. end: what ends a turn, and so an answer; also: further ends that its generation config lists."""

    begin: str
    pad: str
    end: str
    also: tuple[str, ...]
    special: tuple[str, ...]
    template: str


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_HEADERS = (
    "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MODEL_TURNS = (  # no role for a system message: it opens the first question
    "<bos>{% set first = namespace(text='') %}{% for message in messages %}{% if message.role == 'system' %}"
    "{% set first.text = message.content + '\n\n' %}{% else %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ first.text }}{{ message.content }}<end_of_turn>\n{% set first.text = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA = Turns(
    begin="<bos>", pad="<pad>", end="<end_of_turn>", also=("<eos>",), special=("<eos>", "<start_of_turn>"), template=_MODEL_TURNS
)  # fmt: skip
FAMILIES: Mapping[str, Turns] = {
    "qwen3": Turns(
        begin="", pad="<|endoftext|>", end="<|im_end|>", also=("<|endoftext|>",), special=("<|im_start|>", "<think>", "</think>"), template=_CHATML
    ),
    "llama3": Turns(
        begin="<|begin_of_text|>", pad="<|finetune_right_pad_id|>", end="<|eot_id|>", also=("<|end_of_text|>", "<|eom_id|>"),
        special=("<|end_of_text|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"), template=_HEADERS,
    ),
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
}  # fmt: skip
SMALLEST = 320
"""Entries that bytes, every family's special tokens and a few fillers need."""


def standin_tokenizer(family: str, size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `size` entries with the family's chat template. Raises ValueError below SMALLEST."""
    if size < SMALLEST:
        raise ValueError(f"a stand-in tokenizer of {size} entries is too small: it needs {SMALLEST}")
    turns = FAMILIES[family]
    special = dict.fromkeys([turns.begin, turns.pad, turns.end, *turns.special])
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *filter(None, special)]
    tokens += [f"|filler{number}|" for number in range(len(tokens), size)]
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = {"bos_token": turns.begin} if turns.begin else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=turns.pad, eos_token=turns.end, clean_up_tokenization_spaces=False,
        additional_special_tokens=[token for token in turns.special], **names,
    )  # fmt: skip
    tokenizer.chat_template = turns.template
    return tokenizer


def end_ids(family: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end an answer, as the family's generation config lists them."""
    turns = FAMILIES[family]
    return [tokenizer.convert_tokens_to_ids(token) for token in (turns.end, *turns.also)]
