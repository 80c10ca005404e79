"""From rows and log-probs to one number: the only place where terms, weights, routes and denominators meet.

Legend: N completion tokens of a micro-batch (or of a chunk), K ids a row. Nothing here looks at a token's neighbours: what depends on
a whole answer or batch arrives in `rows` (fields, advantage, route) or in `denominators`, so chunks and micro-batches may be cut anywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from opd_kernels import SelectedLogprobs
from torch import Tensor

from opd.objective.supports import Categories, categories
from opd.objective.surrogates import at_answer_ratio
from opd.objective.targets import other_signals
from opd.objective.terms import Objective, Term
from opd.objective.weights import TokenStatistics
from opd.text.align import sums
from opd.types import MicroBatch, SignalRows, TokenRows

EVERY_TOKEN = "*"
"""Key of `denominators` for the number of loss tokens in the whole optimiser step."""


def length_field(term: str) -> str:
    """Name of the field that holds, at each token, how many of its answer's tokens the term counts."""
    return f"length/{term}"


def keep_field(term: str) -> str:
    """Name of the field that says which tokens the term's selections keep."""
    return f"keep/{term}"


def weight_field(term: str) -> str:
    """Name of the field with the product of the term's weights that were made for the whole batch."""
    return f"weight/{term}"


def span_field(term: str) -> str:
    """Name of the field with the number of each token's span, -1 for none, of a term on spans."""
    return f"span/{term}"


IN_VIEW = "in_view"
"""Name of the field that is 1 where the student reads a view in the place of its own prompt; absent where it never does."""


def kept_tokens(term: Term, position: Tensor, loss_mask: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """Loss tokens that the term's gates and selections keep, bool like `position`."""
    for gate in term.gates:
        loss_mask = loss_mask & gate(position)
    selected = fields.get(keep_field(term.name))
    return loss_mask if selected is None else loss_mask & (selected > 0)


def active_tokens(term: Term, rows: TokenRows) -> Tensor:
    """Tokens that the term learns from [N] bool."""
    active = kept_tokens(term, rows.position, rows.loss_mask, rows.fields) & (rows.route[term.name] > 0)
    for signal in term.signals & rows.signals.keys():
        active = active & rows.signals[signal].available
    return active


def denominators(objective: Objective, batches: Sequence[MicroBatch], all_reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """What each term's sum is divided by, over all micro-batches and ranks of an optimiser step; one collective, before any forward.

    `all_reduce` sums a float64 vector over the ranks (the identity for one). 1.0 where nothing counts. Key EVERY_TOKEN: all loss tokens.
    """
    device = batches[0].rows.token.device if batches else None
    counts = torch.zeros(len(objective.terms) + 1, dtype=torch.float64, device=device)
    for batch in batches:
        rows = batch.rows
        counts += torch.stack([*(_count(term, rows) for term in objective.terms), rows.loss_mask.sum(dtype=torch.float64)])
    totals = all_reduce(counts).tolist()
    scale = [term.reduce.length if term.reduce.kind == "constant" else 1.0 for term in objective.terms] + [1.0]
    names = [*(term.name for term in objective.terms), EVERY_TOKEN]
    return {name: (total or 1.0) * factor for name, total, factor in zip(names, totals, scale, strict=True)}


def _count(term: Term, rows: TokenRows) -> Tensor:
    counted = kept_tokens(term, rows.position, rows.loss_mask, rows.fields) if term.reduce.over == "all" else active_tokens(term, rows)
    share = rows.route[term.name].double() if term.reduce.over == "weight" else torch.ones_like(counted, dtype=torch.float64)
    if term.reduce.kind != "token_mean":
        share = share / rows.fields[length_field(term.name)].double().clamp_min(1.0)
    return torch.where(counted, share, 0.0).sum()


def token_loss(
    objective: Objective, denominators: Mapping[str, float], selected: SelectedLogprobs, rows: TokenRows, full: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of these tokens, summed over tokens and terms, and per-token columns [N] for the meters (NaN where silent).

    selected: the student at rows.ids, with its graph. full: per-token losses [N] of the terms on the whole vocabulary or on hidden states.
    The loss of an optimiser step is the plain sum of this over its micro-batches and ranks.
    """
    total = selected.logp.new_zeros(())
    columns: dict[str, Tensor] = {"loss/total": selected.logp.new_zeros(rows.token.shape)}
    for term in objective.terms:
        active = active_tokens(term, rows)
        factor = token_weight(term, denominators, selected, rows)
        loss, extra = _term_loss(term, selected, rows, full, active)
        contribution = factor * torch.where(active, loss, 0.0)
        total = total + contribution.sum()
        columns[f"loss/{term.name}"] = contribution.detach()
        columns[f"share/{term.name}"] = torch.where(rows.loss_mask, active.to(loss.dtype), torch.nan)
        columns["loss/total"] = columns["loss/total"] + contribution.detach()
        columns |= {f"{name}/{term.name}": torch.where(active, value, torch.nan) for name, value in extra.items()}
    return total, columns | _common_columns(objective, selected, rows)


def token_weight(term: Term, denominators: Mapping[str, float], selected: SelectedLogprobs, rows: TokenRows) -> Tensor:
    """coef x route x weights / denominator [N], detached, 0 where the term does not apply; also `dense_divergence`'s token_weight."""
    assert not callable(term.coef), "call objective.at(step, metrics) first"
    student_logp = selected.logp[:, 0].detach()
    old_logp = student_logp if rows.old_logp is None else rows.old_logp.to(student_logp)
    entropy = None if selected.entropy is None else selected.entropy.detach()
    signal = rows.signals[term.signal] if term.signal else None
    now = TokenStatistics(student_logp=student_logp, old_logp=old_logp, entropy=entropy, rows=rows, signal=signal)
    factor = rows.route[term.name].to(student_logp) * (term.coef / denominators[term.name])
    if term.reduce.kind == "sequence_mean":
        factor = factor / rows.fields[length_field(term.name)].to(student_logp).clamp_min(1.0)
    for weight in term.weights:
        factor = factor * weight(now).detach()
    if term.fields:
        factor = factor * rows.fields[weight_field(term.name)].to(factor)
    return torch.where(active_tokens(term, rows), factor, 0.0)


def _term_loss(
    term: Term, selected: SelectedLogprobs, rows: TokenRows, full: Mapping[str, Tensor], active: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss [N], finite wherever the student's log-probs are, and the term's own columns."""
    student_logp = selected.logp[:, 0]
    if term.kind == "nll":
        return -student_logp, {}
    if term.kind == "entropy":
        assert selected.entropy is not None, "the learner asks the kernel for the entropy"
        return selected.entropy, {}
    if term.kind == "surrogate":
        return _surrogate(term, student_logp, rows, active)
    assert term.signal and term.support, "a divergence has a signal and a support"
    signal = rows.signals[term.signal]
    if term.support.kind in ("full", "hidden"):
        return full[term.name], {}
    assert term.loss, "a divergence has a loss"
    if term.support.kind == "sampled":
        teacher_logp = torch.where(signal.available, signal.sampled.to(student_logp), student_logp.detach())
        return term.loss(student_logp, teacher_logp), {}
    if term.support.kind == "spans":
        return _span_loss(term, student_logp, rows, signal), {}
    on = categories(term.support, selected, rows, signal)
    teacher_logp = on.teacher if term.target is None else _target(term, on, selected, rows)
    tails = {"tail_mass/student": on.student_tail.exp(), "tail_mass/teacher": on.teacher_tail.exp()}
    return term.loss(on.student, teacher_logp), tails


def _span_loss(term: Term, student_logp: Tensor, rows: TokenRows, signal: SignalRows) -> Tensor:
    """The loss of each token's span [N]; the term keeps the last token of each. All tokens of an answer must be here."""
    assert term.loss, "a divergence has a loss"
    number = rows.fields[span_field(term.name)].long()
    width = int(number.max()) + 2 if number.numel() else 1
    key = rows.sequence * width + number + 1
    count = int(key.max()) + 1 if key.numel() else 0
    ours, theirs = (sums(side, key, count) for side in (student_logp, signal.sampled.to(student_logp)))
    available = signal.available & (number >= 0)
    return term.loss(torch.where(available, ours[key], -1.0), torch.where(available, theirs[key], -1.0))


def _target(term: Term, on: Categories, selected: SelectedLogprobs, rows: TokenRows) -> Tensor:
    assert term.target and term.support, "only a divergence on a support has a target"
    others = [categories(term.support, selected, rows, rows.signals[name]).teacher for name in other_signals(term.target)]
    return term.target(on.student.detach(), on.teacher, *others)


def _surrogate(term: Term, student_logp: Tensor, rows: TokenRows, active: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    assert term.loss, "a surrogate has a loss"
    now = student_logp.detach()
    old_logp = now if rows.old_logp is None else rows.old_logp.to(now)
    advantage = torch.where(active, rows.advantage[term.name].to(now), 0.0)  # a NaN there would pass through a factor of 0
    if term.scope == "sequence":
        old_logp = at_answer_ratio(now, old_logp, rows.sequence, rows.loss_mask)
    loss, clipped = term.loss(student_logp, old_logp, advantage)
    columns = {"ratio": (now - old_logp).exp(), "advantage_size": advantage.abs()}
    return loss, columns if clipped is None else columns | {"clip_fraction": clipped.to(now)}


def _common_columns(objective: Objective, selected: SelectedLogprobs, rows: TokenRows) -> dict[str, Tensor]:
    """Entropies, the teachers' advantage over the student on its own tokens, and the engine's disagreement with the learner."""
    now = selected.logp[:, 0].detach()
    old_logp = now if rows.old_logp is None else rows.old_logp.to(now)
    own = rows.loss_mask & (rows.fields[IN_VIEW] == 0) if IN_VIEW in rows.fields else rows.loss_mask
    columns = {"engine_gap_nats": torch.where(own, (rows.behaviour_logp.to(now) - old_logp).abs(), torch.nan)}
    if selected.entropy is not None:
        columns["entropy/student"] = torch.where(own, selected.entropy.detach(), torch.nan)
    for name in sorted(set().union(*(term.signals for term in objective.terms))):
        signal = rows.signals[name]
        seen = own & signal.available
        columns[f"entropy/{name}"] = torch.where(seen, signal.entropy.to(now), torch.nan)
        columns[f"gap/{name}"] = torch.where(seen, signal.sampled.to(now) - now, torch.nan)
    return columns


def rows_to_tensors(rows: TokenRows) -> tuple[tuple[Tensor, ...], Callable[[tuple[Tensor, ...]], TokenRows]]:
    """(tensors, rebuild): all tensors of `rows`, each [N, ...], and the function that makes rows of a chunk of each.

    For `fused_sparse_loss`, which cuts its extras as it cuts the tokens. Hidden states stay behind: they serve whole-vocabulary terms only.
    """
    tensors: list[Tensor] = []

    def take(value: Tensor) -> int:
        tensors.append(value)
        return len(tensors) - 1

    plain = {name: take(getattr(rows, name)) for name in ("token", "sequence", "position", "loss_mask", "ids", "behaviour_logp")}
    old_logp = None if rows.old_logp is None else take(rows.old_logp)
    tables = {name: {key: take(value) for key, value in getattr(rows, name).items()} for name in ("advantage", "route", "fields")}
    parts = ("available", "sampled", "entropy", "logp", "tail_logp")
    signals = {name: {part: take(getattr(signal, part)) for part in parts} for name, signal in rows.signals.items()}

    def rebuild(chunk: tuple[Tensor, ...]) -> TokenRows:
        rebuilt: dict[str, SignalRows] = {}
        for name, places in signals.items():
            rebuilt[name] = replace(rows.signals[name], hidden=None, **{part: chunk[place] for part, place in places.items()})
        return replace(
            rows,
            **{name: chunk[place] for name, place in plain.items()},
            old_logp=None if old_logp is None else chunk[old_logp],
            signals=rebuilt,
            **{name: {key: chunk[place] for key, place in table.items()} for name, table in tables.items()},
        )

    return tuple(tensors), rebuild
