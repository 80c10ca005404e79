"""A teacher whose weights never change, in this process: a frozen copy of the student, or another model."""

import copy
from collections.abc import Sequence

from opd_kernels import HeadView
from opd_rollout.backbone import head_of
from opd_rollout.scoring import score_tokens
from opd_rollout.types import ScoreRequest, TokenScores
from torch import nn


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, with weights of its own that take no gradient. Taken before a learner wraps the model."""
    return copy.deepcopy(model).requires_grad_(False).eval()


class LocalTeacher:
    """Holds a frozen module; every score carries version 0.

    token_budget bounds the padded tokens of a forward pass, chunk_bytes the head's scratch. vocab_size: valid ids of a padded head.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        token_budget: int,
        chunk_bytes: int | None = None,
        packed: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self._model = model.requires_grad_(False).eval()
        self._head = head_of(model, vocab_size=vocab_size)
        self._options = {"temperature": temperature, "token_budget": token_budget, "chunk_bytes": chunk_bytes, "packed": packed}

    def scores(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """See opd_rollout.scoring.score_tokens."""
        return score_tokens(self._model, self._head, requests, version=0, **self._options)

    def head(self) -> HeadView:
        """The head that turns this teacher's hidden states into its distribution."""
        head = self._head
        bias = None if head.bias is None else head.bias.detach()
        return HeadView(
            weight=head.weight.detach(), bias=bias, softcap=head.softcap, logit_scale=head.logit_scale, vocab_size=head.vocab_size
        )
