"""Scores of a fixed teacher kept in a file, so that training on stored answers needs no teacher: one SQLite file, a row a scored answer.

Legend: T completion tokens, K ids of a token.
"""

import hashlib
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from opd_rollout.types import ScoreRequest, TokenScores
from safetensors.torch import load, save

from opd.teacher.score import Weights, num_positions

FIELDS = ("sampled", "ids", "logp", "tail_logp", "entropy")


class ScoreStore:
    """Owns the file. teacher: names weights, tokenizer and temperature; scores of several teachers may share a file.

    Raises ValueError for a file that is something else, and, unless `create`, for one that is not there.
    """

    def __init__(self, file: Path, teacher: str, *, create: bool = False) -> None:
        if not create and not file.is_file():
            raise ValueError(f"{file} does not exist: write it with opd score RECIPE out={file}")
        self.file, self.teacher, self._lock = file, teacher, threading.Lock()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(file, timeout=60.0, isolation_level=None, check_same_thread=False)
            self._db.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, teacher TEXT, view TEXT, content BLOB) WITHOUT ROWID")
            self._db.execute("CREATE TABLE IF NOT EXISTS teachers (name TEXT PRIMARY KEY)")
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"{file} is no file of teacher scores ({error}); write one with opd score RECIPE out=FILE") from None

    def teachers(self) -> list[str]:
        """Whose scores the file holds."""
        return [name for (name,) in self._db.execute("SELECT name FROM teachers ORDER BY name")]

    def count(self) -> int:
        """Answers scored by this teacher."""
        return self._db.execute("SELECT count(*) FROM scores WHERE teacher = ?", (self.teacher,)).fetchone()[0]

    def find(self, request: ScoreRequest) -> TokenScores | None:
        """The scores as they were kept, or None."""
        with self._lock:
            row = self._db.execute("SELECT view, content FROM scores WHERE key = ?", (self._key(request),)).fetchone()
        if row is None:
            return None
        held = load(row[1])
        ids, temperature = held["ids"].long(), float(held["temperature"])
        return TokenScores(
            sampled=held["sampled"], ids=ids, logp=held["logp"], tail_logp=held["tail_logp"], entropy=held["entropy"], temperature=temperature,
            version=0, view_hash=row[0],
        )  # fmt: skip

    def keep(self, pairs: Sequence[tuple[ScoreRequest, TokenScores]]) -> None:
        """Add scores, in one transaction."""
        rows = [(self._key(request), self.teacher, scores.view_hash, _content(scores)) for request, scores in pairs]
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("INSERT OR IGNORE INTO teachers VALUES (?)", (self.teacher,))
            self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")

    def close(self) -> None:
        self._db.close()

    def _key(self, request: ScoreRequest) -> bytes:
        assert request.support_ids is None and not request.hidden and not request.draws, "only a teacher's own top-k can be stored"
        digest = hashlib.blake2b(self.teacher.encode(), digest_size=16)
        for ids in ((request.k,), request.context_ids, request.completion_ids):
            digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, dtype=np.int64).tobytes())
        return digest.digest()


class StoredScorer:
    """Reads the file; what it lacks the live teacher scores and the file keeps, or, without one, ValueError says so."""

    def __init__(self, store: ScoreStore, live: Weights | None) -> None:
        self._store, self._live, self.read = store, live, 0

    def scores(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """In the order of the requests; `read` is then how many of their tokens came from the file."""
        store, found = self._store, [self._store.find(request) for request in requests]
        missing = [n for n, scores in enumerate(found) if scores is None]
        self.read = sum(num_positions(request) for request, scores in zip(requests, found, strict=True) if scores is not None)
        if missing and self._live is None:
            known = store.teachers()
            other = "" if store.teacher in known else f" (it holds scores of: {'; '.join(known) or 'nobody'}; this run's teacher is {store.teacher})"
            raise ValueError(
                f"{store.file} lacks the scores of {len(missing)} of {len(requests)} answers{other}: run opd score with this recipe and "
                f"out={store.file}, or leave signals.NAME.scores out and score in training"
            )
        if missing and self._live is not None:
            fresh = self._live.scores([requests[n] for n in missing])
            store.keep([(requests[n], scores) for n, scores in zip(missing, fresh, strict=True)])
            for n, scores in zip(missing, fresh, strict=True):
                found[n] = scores
        return [scores for scores in found if scores is not None]


def stored_weights(store: ScoreStore, live: Weights | None) -> Weights:
    """A scorer with a file before it."""
    scorer = StoredScorer(store, live)
    return Weights(scores=scorer.scores, read=lambda: scorer.read)


def with_stores(weights: Mapping[str, Weights], stores: Mapping[str, ScoreStore]) -> dict[str, Weights]:
    """The scorers, those of a signal with a file behind it; a signal may have the file alone."""
    return {**weights, **{name: stored_weights(store, weights.get(name)) for name, store in stores.items()}}


def largest_difference(kept: TokenScores, live: TokenScores) -> float:
    """Largest |difference| of two scores' log-probs, in nats; infinite where they are about other ids.

    Ids are compared as sets of a token's ids: equal log-probs may stand in any order.
    """
    order_kept, order_live = kept.ids.sort(dim=-1), live.ids.cpu().sort(dim=-1)
    if kept.ids.shape != live.ids.shape or not torch.equal(order_kept.values, order_live.values):
        return float("inf")
    gaps = [(kept.sampled - live.sampled.cpu()).abs()]
    if kept.ids.numel():
        gaps.append((kept.logp.gather(-1, order_kept.indices) - live.logp.cpu().gather(-1, order_live.indices)).abs().flatten())
    return float(torch.cat(gaps).max()) if sum(map(len, gaps)) else 0.0


def _content(scores: TokenScores) -> bytes:
    tensors = {name: getattr(scores, name).detach().cpu().float().contiguous() for name in FIELDS if name != "ids"}
    return save({**tensors, "ids": scores.ids.cpu().int().contiguous(), "temperature": torch.tensor(scores.temperature)})
