"""A teacher with a tokenizer of its own: it reads the student's text in its own tokens, and its scores come back on the student's."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from opd_rollout.types import ScoreRequest, TokenScores

from opd.text import chat
from opd.text.align import Asked, Vocabularies, align, on_student_tokens
from opd.text.token_bytes import token_bytes, vocabulary_bytes


class AlignedTeacher:
    """Wraps a scorer of the teacher's tokens. Contexts arrive in the teacher's ids (its views are rendered by its own chat template)."""

    def __init__(
        self, scores: Callable[[Sequence[ScoreRequest]], list[TokenScores]], *, student: chat.Tokenizer, teacher: chat.Tokenizer
    ) -> None:
        """Raises ValueError for tokenizers whose tokens do not join to their text, and for a teacher without an end of sequence."""
        if teacher.eos_token_id is None:
            raise ValueError("the teacher's tokenizer has no end of sequence; set eos_token in its tokenizer_config.json")
        self._inner, self._student, self._teacher = scores, student, teacher
        self._both = Vocabularies.of(vocabulary_bytes(student), vocabulary_bytes(teacher))
        self._special = set(student.all_special_ids)

    def scores(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """In the order of the requests, with `span` set; hidden states are refused, they belong to another vocabulary.

        Of `support_ids` the order alone counts. With `k` as well: columns 0..k as for k alone, then a column for each of support_ids but the
        first, for the student's candidates that the teacher's vocabulary lacks.
        """
        assert not any(request.hidden for request in requests), "refused when the recipe loads"
        theirs = [self._translated(request) for request in requests]
        asked = [replace(one, completion_ids=ids, support_ids=None, k=_width(one)) for one, ids in zip(requests, theirs, strict=True)]
        found = self._inner(asked)
        return [self._placed(*one) for one in zip(requests, theirs, found, strict=True)]

    def _translated(self, request: ScoreRequest) -> tuple[int, ...]:
        ids = request.completion_ids
        text = chat.decode(self._student, ids)
        end = (self._teacher.eos_token_id,) if ids and ids[-1] in self._special else ()
        return (*chat.tokenize(self._teacher, text), *end)

    def _placed(self, request: ScoreRequest, theirs: tuple[int, ...], scores: TokenScores) -> TokenScores:
        spans = align(token_bytes(self._student, request.completion_ids), token_bytes(self._teacher, theirs))
        support_ids = None if request.support_ids is None else request.support_ids.cpu()
        asked = Asked(token=torch.tensor(request.completion_ids, dtype=torch.int64), support_ids=support_ids, k=request.k)
        on_host = {name: getattr(scores, name).cpu() for name in ("sampled", "ids", "logp", "tail_logp", "entropy")}
        return on_student_tokens(replace(scores, **on_host), spans, self._both, asked)


def _width(request: ScoreRequest) -> int:
    return request.k if request.k or request.support_ids is None else request.support_ids.shape[1] - 1
