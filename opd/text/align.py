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


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabularies:
    """The bytes of every id of both sides (none for special tokens), each student id by its bytes, and all bytes that are a token of the teacher."""

    student: Sequence[bytes]
    teacher: Sequence[bytes]
    id_of: Mapping[bytes, int]
    known: frozenset[bytes]

    @staticmethod
    def of(student: Sequence[bytes], teacher: Sequence[bytes]) -> "Vocabularies":
        """Where several ids have the same bytes the first one counts."""
        id_of = {piece: number for number, piece in reversed(list(enumerate(student))) if piece}
        return Vocabularies(student=student, teacher=teacher, id_of=id_of, known=frozenset(piece for piece in teacher if piece))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked in the student's terms: its tokens [T], its candidates' ids [T, K] or None, and how many of the teacher's own."""

    token: Tensor
    support_ids: Tensor | None
    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A span of one student token: its place t, the teacher's last place u, the bytes of the teacher's earlier tokens and their log-prob."""

    t: int
    u: int
    prefix: bytes
    logp: float


def on_student_tokens(scores: TokenScores, spans: Spans, both: Vocabularies, request: Asked) -> TokenScores:
    """A teacher's scores of its own tokens as scores of the student's (their `span` says which belong together).

    sampled: each token gets an equal share of its span's log-prob, so that sums over spans and answers are the teacher's. Candidates: the
    teacher's top-k at a span's last token, joined to the bytes of the span's earlier tokens and weighed by their probability (the Bayesian
    merge of TRL's GOLD), where the student has a token of exactly these bytes; the rest is the tail. With ids of the student's and no k: no
    ids in common, but the teacher's j-th largest probability stands at the student's j-th candidate (ULD, arXiv 2402.12030). With both: the
    candidates as with k, then the same by rank for what is left over on both sides.
    """
    count = max(_largest(spans.student), _largest(spans.teacher)) + 1
    total = sums(scores.sampled.float(), spans.teacher, count)
    size = sums(torch.ones(len(spans.student)), spans.student, count).clamp_min(1.0)
    place = spans.student.clamp_min(0)
    inside = spans.student >= 0
    sampled = torch.where(inside, (total / size)[place], 0.0) if count else torch.zeros(len(spans.student))
    first = {int(n): u for u, n in reversed(list(enumerate(spans.teacher.tolist()))) if n >= 0}
    entropy = torch.stack([scores.entropy[first[n]] if n in first else scores.entropy.new_zeros(()) for n in spans.student.tolist()])
    ids, logp = request.token[:, None], sampled[:, None].clone()
    runs = _runs(scores, spans, first, both)
    if request.k:
        ids, logp = _mapped(scores, runs, both, request, sampled)
    elif request.support_ids is not None:
        ids, logp = request.support_ids, _ranked(scores, runs, request.support_ids)
    mass = torch.where(ids >= 0, logp.double(), PAD_LOGP).logsumexp(-1).exp()
    tail = torch.log1p(-mass.clamp_max(1.0 - SMALLEST)).float()
    if request.k and request.support_ids is not None:
        more = _unpaired(scores, runs, both, request.support_ids)
        ids, logp = (torch.cat(pair, dim=-1) for pair in zip((ids, logp), more, strict=True))
    return TokenScores(
        sampled=sampled, ids=ids, logp=logp, tail_logp=tail, entropy=entropy, temperature=scores.temperature, version=scores.version,
        view_hash=scores.view_hash, span=spans.student,
    )  # fmt: skip


def _runs(scores: TokenScores, spans: Spans, first: Mapping[int, int], both: Vocabularies) -> list[_Run]:
    last = {int(n): u for u, n in enumerate(spans.teacher.tolist()) if n >= 0}
    alone, tokens = single(spans.student).tolist(), scores.ids[:, 0].tolist()
    found = []
    for t, n in enumerate(spans.student.tolist()):
        if alone[t] and n in last:
            prefix = b"".join(both.teacher[tokens[u]] for u in range(first[n], last[n]))
            found.append(_Run(t=t, u=last[n], prefix=prefix, logp=float(scores.sampled[first[n] : last[n]].sum())))
    return found


def _largest(spans: Tensor) -> int:
    return int(spans.max()) if spans.numel() else -1


def _ranked(scores: TokenScores, runs: Sequence[_Run], support_ids: Tensor) -> Tensor:
    """The teacher's probabilities by rank at the student's candidates, which come sorted; column 0 (the sampled token) has its double's rank."""
    logp = torch.full(support_ids.shape, PAD_LOGP)
    for run in runs:
        ranked = scores.logp[run.u, 1:].float()
        dropped = scores.ids[run.u, 1:] < 0
        ranked = torch.where(dropped, scores.logp[run.u, 0].float(), ranked).sort(descending=True).values
        for column in range(1, support_ids.shape[1]):
            at = column if int(support_ids[run.t, column]) >= 0 else 0
            if column - 1 < len(ranked):
                logp[run.t, at] = ranked[column - 1]
    return logp


def _mapped(scores: TokenScores, runs: Sequence[_Run], both: Vocabularies, request: Asked, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [T, k + 1], logp): column 0 the student's token, then the teacher's candidates as tokens of the student, -1 where it has none."""
    ids = torch.full((len(request.token), request.k + 1), -1, dtype=torch.int64)
    logp = torch.full(ids.shape, PAD_LOGP)
    ids[:, 0], logp[:, 0] = request.token, sampled
    for run in runs:
        for column, candidate in enumerate(scores.ids[run.u, 1 : request.k + 1].tolist(), start=1):
            partner = _partner(candidate, run, both)
            if partner is not None and partner != int(request.token[run.t]):
                ids[run.t, column], logp[run.t, column] = partner, run.logp + float(scores.logp[run.u, column])
    return ids, logp


def _partner(candidate: int, run: _Run, both: Vocabularies) -> int | None:
    """The student's token for what the run would be with this last token of the teacher's."""
    piece = both.teacher[candidate] if candidate >= 0 else b""
    return both.id_of.get(run.prefix + piece) if piece else None


def _unpaired(scores: TokenScores, runs: Sequence[_Run], both: Vocabularies, support_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [T, K - 1], logp): the student's candidates that no token of the teacher's continues to, likeliest first, each beside the
    probability of that rank among the teacher's candidates that the student lacks. The token that was sampled is none: it has its partner."""
    ids = torch.full((support_ids.shape[0], support_ids.shape[1] - 1), -1, dtype=torch.int64)
    logp = torch.full(ids.shape, PAD_LOGP)
    for run in runs:
        pieces = [(number, both.student[number]) for number in support_ids[run.t, 1:].tolist() if number >= 0]
        ours = [number for number, piece in pieces if not (piece.startswith(run.prefix) and piece[len(run.prefix) :] in both.known)]
        columns = [c for c, other in enumerate(scores.ids[run.u].tolist()) if c and other >= 0 and _partner(other, run, both) is None]
        theirs = sorted((run.logp + float(scores.logp[run.u, c]) for c in columns), reverse=True)[: len(ours)]
        ids[run.t, : len(ours)] = torch.tensor(ours, dtype=torch.int64)
        logp[run.t, : len(theirs)] = torch.tensor(theirs)
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
