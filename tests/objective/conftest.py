"""Small fp64 batches: a "head" that is the identity, so that hidden states are logits and every number can be checked densely."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from opd_kernels import dense_divergence, selected_logprobs
from opd_rollout.layout import TokenLayout
from torch import Tensor

from opd.objective import Objective, build_objective, denominators, token_loss, token_weight
from opd.types import MicroBatch, SignalRows, TokenRows

FIXTURE_STUDENT = (1.3, 0.4, -0.2, 0.0, -1.1, 0.7, -2.0)
FIXTURE_TEACHER = (0.2, 1.5, -0.7, 0.3, -0.4, -1.2, 0.9)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fixture_logits() -> tuple[Tensor, Tensor]:
    """(student, teacher) [1, 7] fp64 of the pinned numbers."""
    student = torch.tensor([FIXTURE_STUDENT], dtype=torch.float64, requires_grad=True)
    return student, torch.tensor([FIXTURE_TEACHER], dtype=torch.float64)


def score_signal(logits: Tensor, ids: Tensor, token: Tensor, columns: slice, available: Tensor | None = None) -> SignalRows:
    """Teacher scores at ids [N, k] (-1 pads) from its logits [N, V]."""
    logp = logits.log_softmax(-1)
    at = torch.where(ids >= 0, logp.gather(-1, ids.clamp_min(0)), -1e4) if ids.shape[1] else logp[:, :0]
    inside = torch.zeros_like(logp, dtype=torch.bool)
    for column in range(ids.shape[1]):
        real = ids[:, column] >= 0
        inside[real, ids[real, column]] = True
    return SignalRows(
        available=torch.ones(len(token), dtype=torch.bool) if available is None else available,
        sampled=logp.gather(-1, token[:, None])[:, 0],
        entropy=-(logp.exp() * logp).sum(-1),
        columns=columns,
        logp=at,
        tail_logp=torch.where(inside, -torch.inf, logp).logsumexp(-1),
        hidden=logits,
    )


def top_ids(logits: Tensor, k: int, token: Tensor | None) -> Tensor:
    """Top-k ids [N, k]; with `token` [N, k + 1]: the token first, -1 where it occurs again."""
    ids = logits.topk(k, dim=-1).indices
    if token is None:
        return ids
    return torch.cat([token[:, None], torch.where(ids == token[:, None], -1, ids)], dim=-1)


def make_rows(
    token: Tensor,
    teachers: Mapping[str, tuple[Tensor, Tensor]],
    *,
    terms: tuple[str, ...] = (),
    sequence: Tensor | None = None,
    position: Tensor | None = None,
    **changes: object,
) -> TokenRows:
    """Rows of the tokens with signals {name: (logits [N, V], ids [N, k])}; every term routed 1 with advantage 1 unless changed."""
    count = len(token)
    ids, signals = [token[:, None]], {}
    for name, (logits, support) in teachers.items():
        start = sum(part.shape[1] for part in ids)
        signals[name] = score_signal(logits, support, token, slice(start, start + support.shape[1]))
        ids.append(support)
    sequence = torch.zeros(count, dtype=torch.int64) if sequence is None else sequence
    ones = torch.ones(count, dtype=torch.float64)
    lengths = torch.stack([(sequence == s).sum() for s in sequence]).double() if count else ones
    values = {
        "token": token,
        "sequence": sequence,
        "position": torch.arange(count) if position is None else position,
        "loss_mask": torch.ones(count, dtype=torch.bool),
        "ids": torch.cat(ids, dim=-1),
        "behaviour_logp": torch.full((count,), torch.nan, dtype=torch.float64),
        "old_logp": None,
        "signals": signals,
        "advantage": dict.fromkeys(terms, ones),
        "route": dict.fromkeys(terms, ones),
        "fields": {f"length/{term}": lengths for term in terms},
    }
    return TokenRows(**{**values, **changes})


def batch_of(rows: TokenRows) -> MicroBatch:
    empty = torch.zeros((0, 0), dtype=torch.int64)
    layout = TokenLayout(
        input_ids=empty,
        position_ids=empty,
        attention_mask=None,
        predict_at=rows.token,
        token=rows.token,
        sequence=rows.sequence,
        position=rows.position,
        num_sequences=len(rows.sequence.unique()),
    )
    return MicroBatch(layout=layout, rows=rows, temperature=1.0)


def run(objective: Objective, logits: Tensor, rows: TokenRows, divisors: Mapping[str, float] | None = None) -> SimpleNamespace:
    """Loss, its gradient in the student's logits [N, V], and the columns, through the real vocabulary operations."""
    objective = objective.at(0, {})
    if divisors is None:
        divisors = denominators(objective, [batch_of(rows)], lambda counts: counts)
    weight = torch.eye(logits.shape[1], dtype=logits.dtype)
    logits = logits.detach().requires_grad_()
    selected = selected_logprobs(logits, weight, rows.ids)
    full = {}
    for term in objective.needs.full_terms:
        factor = token_weight(term, divisors, selected, rows)
        teacher = rows.signals[term.signal].hidden.to(logits.dtype)
        full[term.name] = dense_divergence(logits, weight, teacher, weight, term.dense, token_weight=factor)
    loss, columns = token_loss(objective, divisors, selected, rows, full)
    loss.backward()
    return SimpleNamespace(loss=loss.detach(), gradient=logits.grad, columns=columns, divisors=divisors)


@pytest.fixture
def small() -> SimpleNamespace:
    """The helpers above, by name."""
    return SimpleNamespace(
        rows=make_rows, run=run, batch=batch_of, top_ids=top_ids, score=score_signal, build=lambda *specs: build_objective(list(specs))
    )


Build = Callable[..., Objective]
