"""Samples to micro-batches: which sequences go together, and the rows that a loss reads.

Legend: B sequences, T completion tokens of one sequence, N of a micro-batch, K ids a row, k of one signal, D hidden size.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from opd_kernels import PAD_LOGP
from opd_rollout.layout import PASS_TOKENS, TokenLayout, lay_out, split_by_budget
from opd_rollout.types import TokenScores
from torch import Tensor

from opd.types import MicroBatch, Sample, SignalRows, TokenRows

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """One signal's columns of TokenRows.ids, and an empty tensor like its hidden states (None: not asked for)."""

    columns: slice
    width: int
    hidden: Tensor | None  # [0, D]


def pack(
    samples: Sequence[Sample], *, signals: Iterable[str], token_budget: int, packed: bool, temperature: float, pad_id: int
) -> list[MicroBatch]:
    """Micro-batches of whole sequences within a token budget (padding included), alike in structure; see split_by_budget.

    signals: names that the loss will look up. Column 0 of `ids` is the sampled token; each signal with more than that gets columns of
    its own. A sample without a signal's view gets pads there; one with an empty completion has nothing to learn from and is left out.
    Raises ValueError for scores at another temperature and for scores that do not fit their completion.
    """
    for sample in samples:
        _check(sample, temperature)
    columns = _signal_columns(samples, signals)
    places = [place for place, sample in enumerate(samples) if sample.judged.completion.token_ids]
    samples = [samples[place] for place in places]
    lengths = [len(sample.judged.prompt_ids) + len(sample.judged.completion.token_ids) for sample in samples]
    batches = []
    for members in split_by_budget(lengths, token_budget, pass_tokens=None if packed else PASS_TOKENS):
        chosen = [samples[index] for index in members]
        sequences = [(sample.judged.prompt_ids, sample.judged.completion.token_ids) for sample in chosen]
        layout = lay_out(sequences, pad_id=pad_id, packed=packed)
        rows = _rows(chosen, layout, columns)
        batches.append(MicroBatch(layout=layout, rows=rows, temperature=temperature, members=tuple(places[index] for index in members)))
    return batches


def pad_to(batches: Sequence[MicroBatch], count: int, *, temperature: float, pad_id: int, packed: bool) -> list[MicroBatch]:
    """The batches and as many empty ones (one token, no rows) as make `count`: every rank runs the same number."""
    layout = lay_out([((pad_id,), ())], pad_id=pad_id, packed=packed)
    empty = MicroBatch(layout=layout, rows=_rows([], layout, {}), temperature=temperature)
    return [*batches, *[empty] * (count - len(batches))]


def num_rows(batch: MicroBatch) -> int:
    """Completion tokens of a micro-batch, masked ones included."""
    return batch.rows.token.shape[0]


def to_device(record: Record, device: torch.device) -> Record:
    """The same record with every tensor on `device`."""
    return _moved(record, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
    return value


def _check(sample: Sample, temperature: float) -> None:
    length = len(sample.judged.completion.token_ids)
    where = f"prompt {sample.judged.prompt.id!r}, sample {sample.judged.member}"
    for name, scores in sample.scores.items():
        if scores.temperature != temperature:
            raise ValueError(
                f"{where}: signal {name!r} was scored at temperature {scores.temperature}, but the student learns at {temperature}; "
                "use one temperature for a run"
            )
        if scores.sampled.shape[0] != length or scores.ids.shape[0] != length:
            raise ValueError(f"{where}: signal {name!r} scored {scores.sampled.shape[0]} tokens of a completion of {length}")
    for name, advantage in sample.advantage.items():
        if advantage.shape != (length,):
            raise ValueError(f"{where}: the advantage of {name!r} has shape {list(advantage.shape)}, the completion {length} tokens")


def _signal_columns(samples: Iterable[Sample], signals: Iterable[str]) -> dict[str, _Columns]:
    widest: dict[str, TokenScores | None] = dict.fromkeys(signals)
    for sample in samples:
        for name, scores in sample.scores.items():
            best = widest.get(name)
            if best is None or scores.ids.shape[1] > best.ids.shape[1]:
                widest[name] = scores
    columns, start = {}, 1
    for name, scores in widest.items():
        width = 1 if scores is None else scores.ids.shape[1]
        own = slice(0, 1) if width == 1 else slice(start, start + width)
        start += width if width > 1 else 0
        hidden = None if scores is None or scores.hidden is None else scores.hidden[:0]
        columns[name] = _Columns(columns=own, width=width, hidden=hidden)
    return columns


def _rows(samples: Sequence[Sample], layout: TokenLayout, signals: Mapping[str, _Columns]) -> TokenRows:
    completions = [sample.judged.completion for sample in samples]
    prepared = [sample.prepared for sample in samples if sample.prepared is not None]
    old_logp = _joined([one.old_logp for one in prepared]) if samples and len(prepared) == len(samples) else None
    lengths = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.int64)
    by_signal = {name: _signal_rows(name, columns, samples) for name, columns in signals.items()}
    own_ids = [_joined([_ids(sample, name, columns) for sample in samples]) for name, columns in signals.items() if columns.width > 1]
    return TokenRows(
        token=layout.token,
        sequence=layout.sequence,
        position=layout.position,
        loss_mask=_joined([completion.loss_mask for completion in completions], torch.bool),
        ids=torch.cat([layout.token.unsqueeze(1), *own_ids], dim=1),
        behaviour_logp=_joined([completion.logprobs for completion in completions]),
        old_logp=old_logp,
        signals=by_signal,
        advantage={name: _joined([sample.advantage[name] for sample in samples]) for name in _names(s.advantage for s in samples)},
        route={
            name: torch.tensor([sample.route[name] for sample in samples]).repeat_interleave(lengths)
            for name in _names(sample.route for sample in samples)
        },
        fields={name: _joined([sample.fields[name] for sample in samples]) for name in _names(s.fields for s in samples)},
    )


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _joined(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([tensor.cpu() for tensor in tensors]) if tensors else torch.zeros(0, dtype=dtype)


def _signal_rows(name: str, signal: _Columns, samples: Sequence[Sample]) -> SignalRows:
    parts = [_scores_or_pads(sample, name, signal) for sample in samples]
    available = [torch.full((len(s.judged.completion.token_ids),), name in s.scores) for s in samples]
    return SignalRows(
        available=_joined(available, torch.bool),
        sampled=_joined([part["sampled"] for part in parts]),
        entropy=_joined([part["entropy"] for part in parts]),
        columns=signal.columns,
        logp=_joined([part["logp"] for part in parts]),
        tail_logp=_joined([part["tail_logp"] for part in parts]),
        hidden=None if signal.hidden is None else torch.cat([part["hidden"] for part in parts]),
    )


def _scores_or_pads(sample: Sample, name: str, signal: _Columns) -> dict[str, Tensor]:
    """The sample's scores, widened to the signal's columns; pads where the sample has no view."""
    scores, length = sample.scores.get(name), len(sample.judged.completion.token_ids)
    if scores is None:
        pads = torch.full((length,), PAD_LOGP)
        parts = {"sampled": pads, "tail_logp": pads, "entropy": torch.zeros(length), "logp": torch.full((length, signal.width), PAD_LOGP)}
        return parts if signal.hidden is None else parts | {"hidden": signal.hidden.new_zeros((length, signal.hidden.shape[1]))}
    parts = {"sampled": scores.sampled, "tail_logp": scores.tail_logp, "entropy": scores.entropy}
    parts["logp"] = _widened(scores.logp, signal.width, PAD_LOGP)
    return parts if scores.hidden is None else parts | {"hidden": scores.hidden}


def _ids(sample: Sample, name: str, signal: _Columns) -> Tensor:
    scores = sample.scores.get(name)
    if scores is None:
        return torch.full((len(sample.judged.completion.token_ids), signal.width), -1)
    return _widened(scores.ids, signal.width, -1)


def _widened(values: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
