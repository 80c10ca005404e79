"""Messages to token ids and back: the only caller of a chat template.

Ids are those of the rendered text, tokenised whole, with the generation prompt: what a model of this family saw in training.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.types import Message

Tokenizer = PreTrainedTokenizerBase
_PROBES: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "a"},),
    ({"role": "user", "content": "Is 7 > 5?\nSay why."},),
    ({"role": "user", "content": "Write a letter.\n\n"},),
)


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, thinking: bool | None = None) -> tuple[int, ...]:
    """Ids of a conversation up to where the assistant speaks.

    thinking: passed to templates that know `enable_thinking`; None leaves their default.
    Raises ValueError without a chat template, or where the template refuses the conversation.
    """
    return tokenize(tokenizer, _render_text(tokenizer, messages, thinking, speak=True))


def tokenize(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of plain text; nothing is added at either end."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of a completion; special tokens leave no trace and spaces stay as they are."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_alphabet(tokenizer: Tokenizer, texts: Iterable[str], whose: str) -> None:
    """Raises ValueError for the first text that the tokenizer cannot write: a model would read gaps and unknown tokens."""
    for text in texts:
        found = decode(tokenizer, tokenize(tokenizer, text))
        missing = sorted(set(text) - set(found) - set(" \n\t"))
        if missing:
            signs = " ".join(missing[:8])
            raise ValueError(f"the tokenizer of {whose} cannot write {signs!r} of the question {text[:40]!r}: this model was made for other data")


def assistant_prefix(tokenizer: Tokenizer, *, thinking: bool | None = None) -> tuple[int, ...]:
    """The ids between the last turn and the first completion token.

    Raises ValueError when they depend on the conversation: a completion would then continue different texts in different views.
    """
    found = set()
    for messages in _PROBES:
        opened = _render_text(tokenizer, messages, thinking, speak=True)
        closed = _render_text(tokenizer, messages, thinking, speak=False)
        if not opened.startswith(closed):
            raise ValueError(
                "the chat template changes earlier turns when it opens the assistant's; give the tokenizer another chat_template"
            )
        prefix = tokenize(tokenizer, opened[len(closed) :])
        ids = tokenize(tokenizer, opened)
        if ids[len(ids) - len(prefix) :] != prefix:
            raise ValueError(
                "the chat template's opening of the assistant's turn is merged with the text before it by the tokenizer, "
                "so views cannot share it; begin it with a special token or a newline"
            )
        found.add(prefix)
    if len(found) > 1:
        raise ValueError(
            f"the assistant's turn opens differently in different conversations: {sorted(found)}; give the tokenizer another chat_template"
        )
    return found.pop()


def stop_ids(tokenizer: Tokenizer, generation_config: Any = None) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's end of sequence first, then those of the generation config, each once.

    Raises ValueError when there are none: every completion would run to its length limit.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    more = listed if isinstance(listed, list | tuple) else [listed]
    found = tuple(dict.fromkeys(int(i) for i in (tokenizer.eos_token_id, *more) if i is not None))
    if not found:
        raise ValueError("no end-of-sequence token: set eos_token in the tokenizer or eos_token_id in generation_config.json")
    return found


def _render_text(tokenizer: Tokenizer, messages: Sequence[Message], thinking: bool | None, *, speak: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; add chat_template.jinja to the model folder or set tokenizer.chat_template")
    options: Mapping[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=speak, tokenize=False, **options)
    except Exception as error:  # templates raise whatever jinja raises; a conversation that they refuse is the user's to mend
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(f"the chat template refuses a conversation of roles [{roles}]: {error}") from error
