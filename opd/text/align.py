"""Two tokenizers over one text: where their tokens end together, and what a teacher's scores say of the student's tokens.

A span is a shortest run of the student's tokens and of the teacher's that cover the same bytes. With one tokenizer every token is a span of
its own and everything here gives back what the teacher said.

Legend: T tokens of the student, U of the teacher, C spans, K candidates, V ids. Host side, no gradients but where said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from opd_kernels import PAD_LOGP
from opd_rollout.types import TokenScores
from torch import Tensor

from opd.config.choices import Positive

SMALLEST = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Number of each token's span, -1 for tokens that belong to none: `student` [T], `teacher` [U] int64."""

    student: Tensor
    teacher: Tensor


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> Spans:
    """The spans of two tokenisations, each given as its tokens' bytes.

    Tokens without bytes at the very end (end of sequence) are a span where both sides have one. Where the texts differ (a character cut in
    half by a length limit) the spans stop.
    """
    ends = [_ends(side) for side in (student, teacher)]
    common, whole = _common_prefix(b"".join(student), b"".join(teacher)), (b"".join(student), b"".join(teacher))
    shared = sorted({end for end in ends[0] if 0 < end <= common} & set(ends[1]))
    numbers = {end: number for number, end in enumerate(shared)}
    found = [_numbered(side, stops, shared) for side, stops in zip((student, teacher), ends, strict=True)]
    if student and teacher and not student[-1] and not teacher[-1] and whole[0] == whole[1]:
        for side in found:
            side[-1] = len(numbers)
    return Spans(student=torch.tensor(found[0], dtype=torch.int64), teacher=torch.tensor(found[1], dtype=torch.int64))


def _ends(pieces: Sequence[bytes]) -> list[int]:
    ends, total = [], 0
    for piece in pieces:
        total += len(piece)
        ends.append(total if piece else -1)
    return ends


def _common_prefix(one: bytes, other: bytes) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _numbered(pieces: Sequence[bytes], ends: Sequence[int], shared: Sequence[int]) -> list[int]:
    """A token belongs to the first span that ends at or after it."""
    out, at = [], 0
    for piece, end in zip(pieces, ends, strict=True):
        while at < len(shared) and piece and shared[at] < end:
            at += 1
        out.append(at if piece and at < len(shared) else -1)
    return out


def last_of_span(spans: Tensor) -> Tensor:
    """True at each span's last token [T] bool."""
    following = torch.cat([spans[1:], spans.new_full((1,), -2)])
    return (spans >= 0) & (spans != following)


def single(spans: Tensor) -> Tensor:
    """True at the tokens that are a span by themselves [T] bool."""
    before = torch.cat([spans.new_full((1,), -2), spans[:-1]])
    return last_of_span(spans) & (spans != before)


def sums(values: Tensor, spans: Tensor, count: int) -> Tensor:
    """Sum of the values over each span [C]; differentiable in the values."""
    total = values.new_zeros(count + 1)
    return total.index_add(0, torch.where(spans < 0, count, spans), values)[:count]


def on_student_tokens(
    scores: TokenScores, spans: Spans, bytes_of: Sequence[bytes], ids_by_bytes: Mapping[bytes, int], request: "Asked"
) -> TokenScores:
    """A teacher's scores of its own tokens as scores of the student's (their `span` says which belong together).

    sampled: each token gets an equal share of its span's log-prob, so that sums over spans and answers are the teacher's. Candidates: the
    teacher's top-k at a span's last token, joined to the bytes of the span's earlier tokens and weighed by their probability (the Bayesian
    merge of TRL's GOLD), where the student has a token of exactly these bytes; the rest is the tail. With `ranks`: no ids in common, but the
    teacher's j-th largest probability stands at the student's j-th candidate (ULD, arXiv 2402.12030).
    """
    count = max(_largest(spans.student), _largest(spans.teacher)) + 1
    total = sums(scores.sampled.float(), spans.teacher, count)
    size = sums(torch.ones(len(spans.student)), spans.student, count).clamp_min(1.0)
    place = spans.student.clamp_min(0)
    inside = spans.student >= 0
    sampled = torch.where(inside, (total / size)[place], 0.0) if count else torch.zeros(len(spans.student))
    last = {int(n): u for u, n in enumerate(spans.teacher.tolist()) if n >= 0}
    first = {int(n): u for u, n in reversed(list(enumerate(spans.teacher.tolist()))) if n >= 0}
    entropy = torch.stack([scores.entropy[first[n]] if n in first else scores.entropy.new_zeros(()) for n in spans.student.tolist()])
    ids, logp = request.token[:, None], sampled[:, None].clone()
    if request.support_ids is not None:
        ids, logp = request.support_ids, _ranked(scores, spans, last, request.support_ids)
    elif request.k:
        ids, logp = _mapped(scores, spans, first, last, bytes_of, ids_by_bytes, request, sampled)
    mass = torch.where(ids >= 0, logp.double(), PAD_LOGP).logsumexp(-1).exp()
    tail = torch.log1p(-mass.clamp_max(1.0 - SMALLEST)).float()
    return TokenScores(
        sampled=sampled, ids=ids, logp=logp, tail_logp=tail, entropy=entropy, temperature=scores.temperature, version=scores.version,
        view_hash=scores.view_hash, span=spans.student,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked in the student's terms: its tokens [T], its candidates' ids [T, K] or None, and how many of the teacher's own."""

    token: Tensor
    support_ids: Tensor | None
    k: int


def _largest(spans: Tensor) -> int:
    return int(spans.max()) if spans.numel() else -1


def _ranked(scores: TokenScores, spans: Spans, last: Mapping[int, int], support_ids: Tensor) -> Tensor:
    """The teacher's probabilities by rank at the student's candidates, which come sorted; column 0 (the sampled token) has its double's rank."""
    logp = torch.full(support_ids.shape, PAD_LOGP)
    alone = single(spans.student).tolist()
    for t, n in enumerate(spans.student.tolist()):
        if not alone[t] or n not in last:
            continue
        ranked = scores.logp[last[n], 1:].float()
        dropped = scores.ids[last[n], 1:] < 0
        ranked = torch.where(dropped, scores.logp[last[n], 0].float(), ranked).sort(descending=True).values
        for column in range(1, support_ids.shape[1]):
            at = column if int(support_ids[t, column]) >= 0 else 0
            if column - 1 < len(ranked):
                logp[t, at] = ranked[column - 1]
    return logp


def _mapped(
    scores: TokenScores,
    spans: Spans,
    first: Mapping[int, int],
    last: Mapping[int, int],
    bytes_of: Sequence[bytes],
    ids_by_bytes: Mapping[bytes, int],
    request: Asked,
    sampled: Tensor,
) -> tuple[Tensor, Tensor]:
    """(ids [T, k + 1], logp): column 0 the student's token, then the teacher's candidates as tokens of the student, -1 where it has none."""
    ids = torch.full((len(request.token), request.k + 1), -1, dtype=torch.int64)
    logp = torch.full(ids.shape, PAD_LOGP)
    ids[:, 0], logp[:, 0] = request.token, sampled
    alone = single(spans.student).tolist()
    teacher_tokens = scores.ids[:, 0].tolist()
    for t, n in enumerate(spans.student.tolist()):
        if not alone[t] or n not in last:
            continue
        earlier = range(first[n], last[n])
        prefix = b"".join(bytes_of[teacher_tokens[u]] for u in earlier)
        weight = float(scores.sampled[first[n] : last[n]].sum())
        for column in range(1, request.k + 1):
            candidate = int(scores.ids[last[n], column])
            known = ids_by_bytes.get(prefix + bytes_of[candidate]) if candidate >= 0 else None
            if known is not None and known != int(request.token[t]):
                ids[t, column], logp[t, column] = known, weight + float(scores.logp[last[n], column])
    return ids, logp


def span_likelihood(student_logp: Tensor, teacher_logp: Tensor, *, tau: Positive = 100.0) -> Tensor:
    """Cross-entropy [N] of the two events "this span" and "anything else", both sides' probabilities to the power 1 / tau (ALM, 2503.20083).

    student_logp, with its graph, and teacher_logp are log-probs of whole spans. Least where they agree; values shrink with tau.
    """
    ours = (student_logp / tau).clamp_max(-SMALLEST)
    theirs = (teacher_logp.to(student_logp) / tau).clamp_max(-SMALLEST)
    return -(theirs.exp() * ours - torch.expm1(theirs) * torch.log(-torch.expm1(ours)))


def rank_distance(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Sum of |p - q| [N] over candidates paired by rank (ULD, arXiv 2402.12030; there over whole sorted vocabularies)."""
    return (student_logp.exp() - teacher_logp.exp()).abs().sum(-1)


def sorted_distance(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """ULD in full [N]: sum of |sorted p - sorted q|, the smaller vocabulary filled up with zeros. student_logp [N, V], teacher_logp [N, V']."""
    width = max(student_logp.shape[-1], teacher_logp.shape[-1])
    sides = [x.exp().sort(dim=-1, descending=True).values for x in (student_logp, teacher_logp)]
    ours, theirs = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in sides)
    return (ours - theirs).abs().sum(-1)
