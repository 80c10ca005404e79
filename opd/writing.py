"""Texts that engines write about answers before the views are made: annotations, critiques, summaries, debates.

A writer is a request in words, put to the student itself, or to teachers, in a conversation of its own. What is written becomes a note of the
answer, which a view may show; it may also point at segments of the answer, whose tokens are then marked, for weights. Several teachers debate:
each is asked in every round, from the second on with all that was said before, and the note is the transcript.

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

from opd.text.confidence import stated_confidence
from opd.text.token_bytes import byte_spans
from opd.types import Judged, Message, Meter
from opd.views import segments

SLOTS = ("question", "solution", "answer", "attempt", "feedback", "segments", "transcript", "speaker")
_SLOT = re.compile(r"\{(" + "|".join(SLOTS) + r")\}")
_NUMBER = re.compile(r"\d+")
_OF_THE_ANSWER = ("attempt", "feedback", "segments")
STUDENT = "student"
"""Who writes where a writer names nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """One request: `ask` with slots of SLOTS, `role` the system message, in which {speaker} may stand.

    by: signals whose weights write, none for the student. rounds: of a debate; `reply` is asked from the second on and reads {transcript}.
    about: which answers. max_tokens a text. points: the first line names segments by number, the rest is the note; at most `coverage` of an
    answer's tokens are marked. until: no more from this step on, 0 for never. budget: tokens a step at most, 0 for no limit.
    """

    ask: str
    role: str = ""
    by: Sequence[str] = ()
    rounds: int = 1
    reply: str = ""
    about: Literal["all", "correct", "wrong"] = "all"
    max_tokens: int = 64
    points: bool = False
    coverage: float = 0.25
    until: int = 0
    budget: int = 0

    @property
    def once(self) -> bool:
        """Whether the text is about the question alone, and so written once for all its answers in the run."""
        return not any(f"{{{slot}}}" in self.ask + self.reply for slot in _OF_THE_ANSWER)

    @property
    def speakers(self) -> Sequence[str]:
        return self.by or (STUDENT,)

    @property
    def longest(self) -> int:
        """Tokens of a note, at most."""
        return self.max_tokens * len(self.speakers) * self.rounds


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

    def __init__(self, source: Source, writers: Mapping[str, Writer], desk: Desk, teachers: Mapping[str, Desk] | None = None) -> None:
        """desk: the student's. teachers: signal -> its desk, of everyone whom a writer names."""
        self.source, self._writers = source, dict(writers)
        self._desks = {STUDENT: desk, **(teachers or {})}
        self._kept: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in writers}  # prompt id -> turns, of writers about the question alone
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
            # a checkpoint from before debates holds the one text that a writer wrote
            self._kept[name] = {prompt: (turns,) if isinstance(turns, str) else tuple(turns) for prompt, turns in kept.items()}

    def _written(self, name: str, writer: Writer, judged: Sequence[Judged]) -> tuple[list[Judged], int]:
        """The answers with this writer's notes, and how many tokens those took."""
        chosen = [index for index, answer in enumerate(judged) if _is_about(writer, answer)]
        kept, pieces = self._kept[name], self._desks[STUDENT].pieces
        found, tokens = self._spoken(writer, {i: judged[i] for i in chosen if not (writer.once and judged[i].prompt.id in kept)})
        out, counts = list(judged), {"noted": 0, "left_out": 0, "marked": 0, "confident": 0}
        for index in chosen:
            answer, turns = judged[index], found.get(index)
            if writer.once:
                if turns is not None:
                    kept.setdefault(answer.prompt.id, turns)
                turns = kept.get(answer.prompt.id)
            counts["left_out"] += turns is None
            if turns is not None:
                out[index] = debated(answer, name, writer, turns) if writer.by else annotated(answer, name, writer, turns[0], pieces)
                counts["noted"] += bool(out[index].notes[name].strip())
                counts["marked"] += bool(name in out[index].marks and out[index].marks[name].any())
                counts["confident"] += all(stated_confidence(turn) is not None for turn in turns[-len(writer.speakers) :])
        shown = ["noted", "left_out"] + ["marked"] * writer.points + ["confident"] * (len(writer.by) > 1)
        self._meters |= {f"writers/{name}_{what}": Meter(sum=float(counts[what]), count=float(len(judged))) for what in shown}
        return out, tokens

    def _spoken(self, writer: Writer, answers: Mapping[int, Judged]) -> tuple[dict[int, tuple[str, ...]], int]:
        """Index -> all turns, in the order of rounds and speakers, where none had to be left out; and the tokens of all. Nobody hears
        what is said in the same round."""
        turns: dict[int, tuple[str, ...]] = dict.fromkeys(answers, ())
        if writer.budget:
            first = self._requests(writer, writer.speakers[0], answers, turns)
            allowed = set(list(dict.fromkeys(first.values()))[: writer.budget // writer.longest])
            turns = {index: () for index, ids in first.items() if ids in allowed}
        tokens = 0
        for _round in range(writer.rounds):
            said: list[dict[int, str]] = []
            for speaker in writer.speakers:
                texts, spent = self._asked(writer, speaker, self._requests(writer, speaker, answers, turns))
                said.append(texts)
                tokens += spent
            turns = {index: (*before, *(one[index] for one in said)) for index, before in turns.items() if all(index in one for one in said)}
        return turns, tokens

    def _requests(
        self, writer: Writer, speaker: str, answers: Mapping[int, Judged], turns: Mapping[int, tuple[str, ...]]
    ) -> dict[int, tuple[int, ...]]:
        """Index -> ids of what the speaker is asked next, without those that are too long for it."""
        desk = self._desks[speaker]
        found = {index: desk.render(request(writer, answers[index], speaker, heard)) for index, heard in turns.items()}
        return {index: ids for index, ids in found.items() if len(ids) <= desk.room}

    def _asked(self, writer: Writer, speaker: str, requests: Mapping[int, tuple[int, ...]]) -> tuple[dict[int, str], int]:
        """Index -> text, equal requests written once; and the tokens written."""
        desk, unique = self._desks[speaker], list(dict.fromkeys(requests.values()))
        sampling = Sampling(temperature=0.0, max_tokens=writer.max_tokens, stop_ids=desk.stop_ids)
        found = desk.engine.generate([GenerateRequest(prompt_ids=ids, seed=0) for ids in unique], sampling) if unique else []
        texts = {ids: desk.decode(completion.token_ids) for ids, completion in zip(unique, found, strict=True)}
        return {index: texts[ids] for index, ids in requests.items()}, sum(len(completion.token_ids) for completion in found)


def _is_about(writer: Writer, answer: Judged) -> bool:
    if writer.about == "all":
        return True
    return answer.verdict.status == "score" and answer.verdict.correct == (writer.about == "correct")


def request(writer: Writer, answer: Judged, speaker: str = STUDENT, heard: Sequence[str] = ()) -> tuple[Message, ...]:
    """The conversation in which a speaker is asked about an answer, after the turns that were heard."""
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
        "transcript": transcript(writer.speakers, heard),
        "speaker": speaker,
    }
    asked: Message = {"role": "user", "content": _SLOT.sub(lambda slot: slots[slot.group(1)], writer.reply if heard else writer.ask)}
    return ({"role": "system", "content": writer.role.replace("{speaker}", speaker)}, asked) if writer.role else (asked,)


def transcript(speakers: Sequence[str], turns: Sequence[str]) -> str:
    """All turns, each after who spoke and in which round; one speaker's only turn as it is."""
    if len(turns) == len(speakers) == 1:
        return turns[0].strip()
    named = ((speakers[n % len(speakers)], n // len(speakers) + 1, turn.strip()) for n, turn in enumerate(turns))
    return "\n\n".join(f"[{speaker}, round {number}]\n{turn}" for speaker, number, turn in named if turn)


def debated(answer: Judged, name: str, writer: Writer, turns: Sequence[str]) -> Judged:
    """The answer with what teachers wrote: the transcript as the note `name`, each one's last turn as the note `name/speaker`."""
    last = {f"{name}/{speaker}": turn.strip() for speaker, turn in zip(writer.by, turns[-len(writer.by) :], strict=True)}
    return replace(answer, notes={**answer.notes, name: transcript(writer.by, turns), **last})


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


def check_writer(name: str, writer: Writer) -> None:
    """Raises ValueError for a request without any slot, or with one that does not exist, and for a debate in which nobody hears anybody."""
    known = ", ".join("{" + slot + "}" for slot in SLOTS)
    for key, text in (("ask", writer.ask), ("reply", writer.reply)):
        slots = set(re.findall(r"\{(\w+)\}", text))
        unknown = sorted(slots - set(SLOTS))
        if unknown or (text and not slots - {"speaker"}):
            problem = f"has the unknown slot {{{unknown[0]}}}" if unknown else "says nothing of the answer or its question"
            raise ValueError(f"writers.{name}.{key} {problem}; slots: {known}")
    if not writer.ask:
        raise ValueError(f"writers.{name}.ask is empty; write a request with slots: {known}")
    if twice := sorted({speaker for speaker in writer.by if list(writer.by).count(speaker) > 1}):
        raise ValueError(f"writers.{name}.by names {twice[0]!r} twice; who speaks is told by name, so declare a second signal with the same weights")
    if "{transcript}" in writer.ask:
        raise ValueError(f"writers.{name}.ask reads {{transcript}}, and nothing has been said in the first round; put it into writers.{name}.reply")
    if writer.rounds > 1 and len(writer.by) < 2:
        raise ValueError(f"writers.{name}.rounds is {writer.rounds}, and a debate needs two speakers: by: [first, second] (signals), or rounds: 1")
    if writer.rounds > 1 and "{transcript}" not in writer.reply:
        raise ValueError(
            f"writers.{name}: in the {writer.rounds} rounds nobody would hear the others; give the request of the later ones, with what was said: "
            'reply: "{question}\\n\\n{transcript}\\n\\nYou are {speaker}. Answer again." or rounds: 1'
        )
    if writer.rounds == 1 and writer.reply:
        raise ValueError(f"writers.{name}.reply is asked from the second round on, and there is one: set writers.{name}.rounds=2, or leave reply out")
    if writer.points and writer.by:
        raise ValueError(f"writers.{name}.points marks what the student points at; leave out by: {list(writer.by)}, or points")
    if writer.budget and writer.budget < writer.longest:
        raise ValueError(
            f"writers.{name}.budget is {writer.budget} tokens a step, and one note may take {writer.longest} (max_tokens x speakers x rounds): "
            f"nothing would ever be written. Use writers.{name}.budget={writer.longest} or more, or 0 for no limit"
        )
