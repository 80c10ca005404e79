"""Which bytes of a text each of its tokens stands for: what spans and tokenizers of different models have in common."""

import re
from collections.abc import Callable, Sequence
from functools import cache

from opd.text import chat

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: chat.Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """The bytes of each token; special tokens have none. Joined they are the decoded text.

    Knows byte-level BPE, SentencePiece's pieces (with byte fallback) and tokens that are plain text.
    Raises ValueError where none of these gives back the text: the tokenizer then changes what it reads, and bytes have no place in it.
    """
    special, text = set(tokenizer.all_special_ids), chat.decode(tokenizer, ids)
    names = ["" if token in special else str(name) for token, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)]
    for read in (_byte_level, _sentence_piece, lambda name: name.encode()):
        found = _read_all(names, read)
        if found is None:
            continue
        joined = b"".join(found).decode("utf-8", errors="replace")
        if joined == text:
            return found
        if joined == f" {text}":  # SentencePiece writes a space before the first word that decoding takes away
            first = next(index for index, piece in enumerate(found) if piece)
            return [*found[:first], found[first][1:], *found[first + 1 :]]
    raise ValueError(
        f"the tokens of {text[:40]!r} do not join to their text; spans and other tokenizers need a byte-level BPE or SentencePiece tokenizer"
    )


def vocabulary_bytes(tokenizer: chat.Tokenizer) -> list[bytes]:
    """The bytes of every id of the vocabulary; nothing for special tokens and ids without a token."""
    special, names = set(tokenizer.all_special_ids), tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    known = ["" if number in special or name is None else str(name) for number, name in enumerate(names)]
    share = sum(_byte_level(name) is not None for name in known) / max(len(known), 1)
    read = _byte_level if share == 1.0 else _sentence_piece
    return [read(name) or b"" for name in known]


def byte_spans(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    """(start, end) of each piece in the joined bytes."""
    spans, start = [], 0
    for piece in pieces:
        spans.append((start, start + len(piece)))
        start += len(piece)
    return spans


def _read_all(names: Sequence[str], read: Callable[[str], bytes | None]) -> list[bytes] | None:
    found = [read(name) for name in names]
    return None if any(piece is None for piece in found) else [piece for piece in found if piece is not None]


def _byte_level(name: str) -> bytes | None:
    table = _byte_table()
    return bytes(table[c] for c in name) if all(c in table for c in name) else None


def _sentence_piece(name: str) -> bytes | None:
    byte = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(byte.group(1), 16)]) if byte else name.replace("\u2581", " ").encode()


@cache
def _byte_table() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte: itself where it is visible, else one from U+0100 on, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}
