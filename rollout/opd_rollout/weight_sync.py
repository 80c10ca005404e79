"""The learner's weights to the actors' vLLM: what is sent is checked first.

One shared-memory file a version, copied into once; it stays until the next version is in place, so that a restarted actor finds a full
export. Between GPUs of several machines: opd_rollout.vllm_nccl.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opd_rollout.dispatch import Pool
from opd_rollout.shared_memory import Written, remove, remove_stale, write
from opd_rollout.types import GenerateRequest, Sampling, ScoreRequest, TokenScores, WeightMetadata, WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """Answers that a freshly loaded actor gives and the learner scores: `limit_nats` bounds the mean |difference|.

    collective: `reference` is a call of all ranks together.
    """

    requests: tuple[GenerateRequest, ...]
    sampling: Sampling
    reference: Callable[[Sequence[ScoreRequest]], list[TokenScores]]
    limit_nats: float
    collective: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """One version on its way: `stamp` is unique, `version` is what answers carry; `written` None where no file is kept.

    lasting: an actor that is restarted can still have it.
    """

    stamp: str
    version: int
    written: Written | None
    lasting: bool = True


class Transfer(Protocol):
    """How versions reach the actors. Every rank has one and calls it together with the others; the leading one sends."""

    def make(self, weights: WeightSource) -> Parcel:
        """What will be sent, in the form in which an actor that is restarted meanwhile could load it, where there is such a form."""
        ...

    def deliver(self, pool: Pool, parcel: Parcel, *, in_flight: bool, seconds: float) -> None:
        """Into every ready actor, by the leading rank. Raises ActorsLost where none has it."""
        ...

    def done(self) -> None:
        """The newest version is in place everywhere."""
        ...

    def close(self) -> None: ...


class SharedMemoryParcels:
    """Writes each version into a file of its own under `folder`; the one before goes when `done` is called.

    Files that dead runs left there are removed first.
    """

    def __init__(self, folder: Path, attempt: str = "", *, leads: bool = True) -> None:
        """attempt: a word that the ranks of one start of the learner share and that no other start has."""
        self._folder, self._attempt, self._leads, self._serial = folder, attempt or secrets.token_hex(6), leads, 0
        self._kept: list[tuple[Path, int]] = []
        if leads:
            remove_stale(folder, "opd-*.weights")

    def make(self, weights: WeightSource) -> Parcel:
        """Copies the weights (all ranks iterate them, one writes). Raises ValueError for too little room."""
        self._serial += 1
        stamp = f"{self._attempt}-{self._serial}"
        path = self._folder / f"opd-{stamp}.weights"
        metadata = weights.metadata()
        if self._leads:
            written, lock = write(path, metadata, weights.buckets())
            self._kept.append((path, lock))
        else:
            for _ in weights.buckets():
                pass
            written = Written(path=str(path), metadata=metadata)
        return Parcel(stamp=stamp, version=weights.version, written=written)

    def deliver(self, pool: Pool, parcel: Parcel, *, in_flight: bool, seconds: float) -> None:
        """Every actor loads the file; one that is restarted meanwhile does so too."""
        if self._leads:
            pool.call("load", parcel.written, parcel.version, parcel.stamp, in_flight, seconds=seconds)
            if not any(replica.state == "ready" for replica in pool.replicas):
                pool.bring_up()

    def done(self) -> None:
        """The newest version is in place: older files may go."""
        for path, lock in self._kept[:-1]:
            remove(path, lock)
        del self._kept[:-1]

    def close(self) -> None:
        """Removes every file."""
        for path, lock in self._kept:
            remove(path, lock)
        self._kept.clear()


def check_manifest(expected: Mapping[str, tuple[int, ...]], sent: WeightMetadata, tied: str = "") -> None:
    """Raises ValueError, before an update begins, unless every weight that the engine expects is sent once, in its shape.

    vLLM fuses weights: a part of a fused one sent alone would give garbage without an error. tied: the head that may stay away.
    """
    twice = sorted({name for name in sent.names if sent.names.count(name) > 1}) if len(set(sent.names)) < len(sent.names) else []
    unknown = sorted(set(sent.names) - set(expected))
    missing = sorted(set(expected) - set(sent.names) - {tied})
    wrong = [
        f"{name} {list(shape)} instead of {list(expected[name])}"
        for name, shape in zip(sent.names, sent.shapes, strict=True)
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    if unknown or missing or wrong or twice:
        raise ValueError(
            f"the weights do not fit the actors' model: unknown {unknown[:3]}, missing {missing[:3]}, shapes {wrong[:3]}, twice {twice[:3]}; "
            "send every parameter once, under its Hugging Face name"
        )
