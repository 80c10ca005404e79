"""Prompts of data that is larger than memory: records are read as they are needed, judged one by one, and shuffled within a buffer.

Each pass over the data reads it in order; what is drawn next is one of the buffer's prompts, chosen by (seed, pass, number of the draw) alone. So a
checkpoint needs record numbers, no texts: a resume reads the buffer's records again and goes on with the same prompts.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from opd.data.records import Records
from opd.types import Meter, Prompt

Judge = Callable[[str, Mapping[str, Any]], tuple[tuple[str, str] | None, Prompt | None]]


class LazyStream:
    """An endless stream of prompts (opd.source.Stream).

    read(n): (place, record) pairs from record n on. judge(place, record): ((kind, sentence) of what is wrong, or None; the prompt). Records of a kind
    in `repair` are left out and counted. first: records that are not for training. Raises ValueError for any other bad record, when it is read.
    """

    def __init__(self, read: Callable[[int], Records], judge: Judge, *, buffer: int, seed: int, repair: frozenset[str], first: int = 0) -> None:
        self._read, self._judge, self._size, self._seed, self._repair, self._first = read, judge, buffer, seed, repair, first
        self._filters: dict[str, Callable[[Prompt], bool]] = {}
        self._passed, self._drawn, self._cursor = 0, 0, 0  # whole passes; draws of this pass; draws of all
        self._buffer: list[tuple[int, Prompt]] = []
        self._left_out: dict[str, int] = dict.fromkeys(sorted(repair), 0)
        self._open(first)

    def only(self, kind: str, keep: Callable[[Prompt], bool]) -> None:
        """Leave out prompts for which `keep` is false, and count them as `kind`. For before the first draw."""
        assert not self._cursor, "a filter that comes later would not have seen all"
        self._filters[kind] = keep
        self._left_out.setdefault(kind, 0)

    def take(self, number: int) -> list[Prompt]:
        """The next prompts."""
        return [self._next() for _ in range(number)]

    def meters(self) -> dict[str, Meter]:
        """Whole passes over the data, and how many records were left out so far, for what."""
        counts = {f"data/left_out/{kind}": count for kind, count in self._left_out.items()} | {"data/passes": self._passed}
        return {name: Meter(sum=float(count), count=1.0) for name, count in counts.items()}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; `buffer` has the numbers of its records, in its order."""
        return {
            "cursor": self._cursor, "passed": self._passed, "drawn": self._drawn, "read": self._number,
            "buffer": [number for number, _ in self._buffer], "left_out": dict(self._left_out),
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on after `state`. Raises ValueError where the data is not what it was."""
        self._cursor, self._passed, self._drawn = state["cursor"], state["passed"], state["drawn"]
        self._left_out |= state["left_out"]
        numbers = state["buffer"]
        self._open(min(numbers, default=state["read"]))
        found, wanted = {}, set(numbers)
        while self._number < state["read"] and (record := next(self._records, None)) is not None:
            if self._number in wanted:
                found[self._number] = self._judge(*record)[1]
            self._number += 1
        if wanted - set(found):
            raise ValueError(f"the data has fewer records than when the checkpoint was written ({self._number} of {state['read']}): put it back")
        self._buffer = [(number, found[number]) for number in numbers]

    def _open(self, number: int) -> None:
        self._number, self._records, self._ended = number, self._read(number), False

    def _next(self) -> Prompt:
        self._fill()
        if not self._buffer:
            if not self._drawn:
                counted = ", ".join(f"{count} {kind}" for kind, count in self._left_out.items() if count) or "there is none"
                raise ValueError(f"the data holds no record to train on ({counted}); loosen data.repair and the filters, or hold out fewer records")
            self._passed, self._drawn = self._passed + 1, 0
            self._open(self._first)
            self._fill()
        name = f"{self._seed}/{self._passed}/{self._drawn}".encode()
        index = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") % len(self._buffer)
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        self._drawn, self._cursor = self._drawn + 1, self._cursor + 1
        return self._buffer.pop()[1]

    def _fill(self) -> None:
        while len(self._buffer) < self._size and not self._ended:
            record = next(self._records, None)
            if record is None:
                self._ended = True
                return
            number, self._number = self._number, self._number + 1
            problem, prompt = self._judge(*record)
            kind = problem[0] if problem else next((kind for kind, keep in self._filters.items() if not keep(prompt)), "")
            if problem and kind not in self._repair:
                raise ValueError(f"{record[0]}: {problem[1]}")
            if kind:
                self._left_out[kind] += 1
            else:
                self._buffer.append((number, prompt))


def first_prompts(records: Records, judge: Judge, repair: frozenset[str], number: int) -> tuple[list[Prompt], int]:
    """(the first prompts, how many records they took). Raises ValueError for a bad record of a kind that is not in `repair`."""
    prompts: list[Prompt] = []
    read = 0
    for place, record in records if number else ():
        read += 1
        problem, prompt = judge(place, record)
        if problem and problem[0] not in repair:
            raise ValueError(f"{place}: {problem[1]}")
        prompts += [] if problem or prompt is None else [prompt]
        if len(prompts) == number:
            break
    return prompts, read
