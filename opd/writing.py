"""Texts that an engine writes about answers before the views are made: annotations, critiques, summaries.

A writer is a request in words, put to the student itself in a conversation of its own. What it writes becomes a note of the answer, which a
view may show; it may also point at segments of the answer, whose tokens are then marked, for weights.

Nothing here depends on wall-clock time: texts are greedy, so they follow from the student's weights and what is asked.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from opd_rollout.engine import Engine
from opd_rollout.types import GenerateRequest, Sampling
from torch import Tensor

from opd.text.token_bytes import byte_spans
from opd.types import Judged, Message, Meter
from opd.views import segments

SLOTS = ("question", "solution", "answer", "attempt", "feedback", "segments")
_SLOT = re.compile(r"\{(" + "|".join(SLOTS) + r")\}")
_NUMBER = re.compile(r"\d+")
_OF_THE_ANSWER = ("attempt", "feedback", "segments")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """One request: `ask` with slots of SLOTS, `role` the system message.

    about: which answers. max_tokens a text. points: the first line names segments by number, the rest is the note; at most `coverage` of an
    answer's tokens are marked. until: no more from this step on, 0 for never. budget: tokens a step at most, 0 for no limit.
    """

    ask: str
    role: str = ""
    about: Literal["all", "correct", "wrong"] = "all"
    max_tokens: int = 64
    points: bool = False
    coverage: float = 0.25
    until: int = 0
    budget: int = 0

    @property
    def once(self) -> bool:
        """Whether the text is about the question alone, and so written once for all its answers in the run."""
        return not any(f"{{{slot}}}" in self.ask for slot in _OF_THE_ANSWER)


class Source(Protocol):
    """The part of opd.loop.RolloutSource that is passed on."""

    def collect(self, step: int, metrics: Mapping[str, float]) -> list[Judged]: ...

    def meters(self) -> Mapping[str, Meter]: ...

    def totals(self) -> Mapping[str, int]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What writers work with. render: messages -> ids. decode: ids -> text. pieces: ids -> bytes a token. room: longest request, tokens."""

    engine: Engine
    render: Callable[[Sequence[Message]], tuple[int, ...]]
    decode: Callable[[Sequence[int]], str]
    pieces: Callable[[Sequence[int]], list[bytes]]
    room: int
    stop_ids: tuple[int, ...]


class AnnotatedSource:
    """A source whose answers come with notes and marks (opd.loop.RolloutSource)."""

    def __init__(self, source: Source, writers: Mapping[str, Writer], desk: Desk) -> None:
        self.source, self._writers, self._desk = source, dict(writers), desk
        self._kept: dict[str, dict[str, str]] = {name: {} for name in writers}  # prompt id -> text, of writers about the question alone
        self._meters: dict[str, Meter] = {}

    def collect(self, step: int, metrics: Mapping[str, float] | None = None) -> list[Judged]:
        """The source's answers, written about by every writer in turn. Within a step equal requests are written once."""
        judged, tokens = self.source.collect(step, metrics or {}), 0
        self._meters = {}
        for name, writer in self._writers.items():
            if writer.until and step >= writer.until:
                continue
            judged, written = self._written(name, writer, judged)
            tokens += written
        before = self.source.meters().get("tokens/student", Meter(sum=0.0, count=1.0))
        self._meters["tokens/written"] = Meter(sum=float(tokens), count=1.0)
        self._meters["tokens/student"] = Meter(sum=before.sum + tokens, count=before.count)
        return judged

    def meters(self) -> Mapping[str, Meter]:
        """The source's, and: tokens written (they count among the student's), shares of answers with a note, marked, or left out."""
        return {**self.source.meters(), **self._meters}

    def totals(self) -> Mapping[str, int]:
        return self.source.totals()

    def state(self) -> dict[str, Any]:
        return {**self.source.state(), "written": {name: dict(kept) for name, kept in self._kept.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.source.load_state(state)
        for name, kept in state.get("written", {}).items():
            self._kept[name] = dict(kept)

    def _written(self, name: str, writer: Writer, judged: Sequence[Judged]) -> tuple[list[Judged], int]:
        chosen = [index for index, answer in enumerate(judged) if _is_about(writer, answer)]
        requests, too_long = {}, 0
        for index in chosen:
            if not (writer.once and judged[index].prompt.id in self._kept[name]):
                ids = self._desk.render(request(writer, judged[index]))
                too_long += len(ids) > self._desk.room
                if len(ids) <= self._desk.room:
                    requests[index] = ids
        unique = list(dict.fromkeys(requests.values()))
        allowed = unique if not writer.budget else unique[: writer.budget // writer.max_tokens]
        sampling = Sampling(temperature=0.0, max_tokens=writer.max_tokens, stop_ids=self._desk.stop_ids)
        found = self._desk.engine.generate([GenerateRequest(prompt_ids=ids, seed=0) for ids in allowed], sampling) if allowed else []
        texts = {ids: self._desk.decode(completion.token_ids) for ids, completion in zip(allowed, found, strict=True)}
        out, noted, marked = list(judged), 0, 0
        for index in chosen:
            answer, text = judged[index], texts.get(requests.get(index, ()))
            if writer.once:
                if text is not None:
                    self._kept[name].setdefault(answer.prompt.id, text)
                text = self._kept[name].get(answer.prompt.id)
            if text is not None:
                out[index] = annotated(answer, name, writer, text, self._desk.pieces)
                noted += bool(out[index].notes[name].strip())
                marked += bool(name in out[index].marks and out[index].marks[name].any())
        whole = float(len(judged))
        self._meters[f"writers/{name}_noted"] = Meter(sum=float(noted), count=whole)
        self._meters[f"writers/{name}_left_out"] = Meter(sum=float(too_long + len(unique) - len(allowed)), count=whole)
        if writer.points:
            self._meters[f"writers/{name}_marked"] = Meter(sum=float(marked), count=whole)
        return out, sum(len(completion.token_ids) for completion in found)


def _is_about(writer: Writer, answer: Judged) -> bool:
    if writer.about == "all":
        return True
    return answer.verdict.status == "score" and answer.verdict.correct == (writer.about == "correct")


def request(writer: Writer, answer: Judged) -> tuple[Message, ...]:
    """The conversation in which a writer is asked about an answer."""
    prompt = answer.prompt
    question = next((m["content"] for m in reversed(prompt.messages) if m["role"] == "user"), "")
    parts = [part for part in segments(answer.text) if part.strip()]
    slots = {
        "question": question,
        "solution": prompt.hints.get("solution", ""),
        "answer": prompt.hints.get("answer") or prompt.answer or "",
        "attempt": answer.text,
        "feedback": answer.verdict.feedback if answer.verdict.status == "score" else "",
        "segments": "\n".join(f"[{number}] {part.strip()}" for number, part in enumerate(parts, 1)),
    }
    asked: Message = {"role": "user", "content": _SLOT.sub(lambda slot: slots[slot.group(1)], writer.ask)}
    return ({"role": "system", "content": writer.role}, asked) if writer.role else (asked,)


def annotated(answer: Judged, name: str, writer: Writer, text: str, pieces: Callable[[Sequence[int]], list[bytes]]) -> Judged:
    """The answer with what was written about it: a note, and marks where the writer points."""
    if not writer.points:
        return replace(answer, notes={**answer.notes, name: text.strip()})
    first, _, rest = text.strip().partition("\n")
    mask = marked_tokens(answer, [int(number) for number in _NUMBER.findall(first)], pieces(answer.completion.token_ids), writer.coverage)
    return replace(answer, notes={**answer.notes, name: (rest or first).strip()}, marks={**answer.marks, name: mask})


def marked_tokens(answer: Judged, numbers: Sequence[int], pieces: Sequence[bytes], coverage: float) -> Tensor:
    """The tokens [T] bool of these segments (numbered from 1), the first ones up to `coverage` of the answer's loss tokens."""
    chosen, start, number = [], 0, 0
    for part in segments(answer.text):
        end = start + len(part.encode())
        number += bool(part.strip())
        if part.strip() and number in numbers:
            chosen.append((start, end))
        start = end
    inside = [any(a < e and s < b for a, b in chosen) for s, e in byte_spans(pieces)]
    mask = torch.tensor(inside, dtype=torch.bool) & answer.completion.loss_mask.cpu()
    return mask & (mask.cumsum(0) <= int(coverage * int(answer.completion.loss_mask.sum())))


def check_writer(name: str, ask: str) -> None:
    """Raises ValueError for a request without any slot, or with one that does not exist."""
    slots = set(re.findall(r"\{(\w+)\}", ask))
    unknown = sorted(slots - set(SLOTS))
    if unknown or not slots:
        problem = f"has the unknown slot {{{unknown[0]}}}" if unknown else "says nothing of the answer or its question"
        raise ValueError(f"writers.{name}.ask {problem}; slots: {', '.join('{' + slot + '}' for slot in SLOTS)}")
