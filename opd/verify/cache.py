"""Verdicts that were given before, in one SQLite file: the same verifier of the same version, gold answer and answer are not judged twice."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from opd.types import Prompt, Verdict, Verifier
from opd.verify.adapt import Asked, Batched, judge_all


class VerdictCache:
    """Owns the file; several processes may share it. version: names the verifier with everything that decides its verdicts.

    reads: what of an answer's text the verifier looks at (a math answer, say), so that texts which agree there share a verdict. Errors are not
    kept. Raises ValueError for a file that is something else.
    """

    def __init__(self, file: Path, version: str, reads: Callable[[str], str] = str) -> None:
        self._version, self._reads, self._lock = version, reads, threading.Lock()
        self.hits, self.misses = 0, 0
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(file, timeout=60.0, isolation_level=None, check_same_thread=False)
            self._db.execute("CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, verdict TEXT NOT NULL) WITHOUT ROWID")
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"data.verdict_cache: {file} is no verdict cache ({error}); name a new file, e.g. verdicts.sqlite") from None

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Verdict]:
        """The verdicts among these keys that are known."""
        found = {}
        with self._lock:
            for key in dict.fromkeys(keys):
                if row := self._db.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone():
                    found[key] = Verdict(**json.loads(row[0]))
        return found

    def keep(self, verdicts: dict[bytes, Verdict]) -> None:
        """Add verdicts, in one transaction."""
        rows = [(key, json.dumps(_content(verdict))) for key, verdict in verdicts.items() if verdict.status != "error"]
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", rows)
            self._db.execute("COMMIT")

    def key(self, prompt: Prompt, text: str) -> bytes:
        """Names verifier, version, question, gold answer, and what is read of the answer."""
        parts = [self._version, repr(prompt.messages), repr(sorted(prompt.hints.items())), repr(prompt.answer), prompt.domain, self._reads(text)]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()

    def close(self) -> None:
        self._db.close()


def cached(verify: Verifier, cache: VerdictCache) -> Verifier:
    """The verifier, asked only about what the cache does not hold, each such answer once."""

    def many(asked: Asked) -> list[Verdict]:
        keys = [cache.key(prompt, text) for prompt, text in asked]
        known = cache.find(keys)
        new: dict[bytes, tuple[Prompt, str]] = {}
        for key, pair in zip(keys, asked, strict=True):
            if key not in known:
                new.setdefault(key, pair)
        cache.misses += len(new)
        cache.hits += len(asked) - len(new)
        given = dict(zip(new, judge_all(verify, list(new.values())), strict=True)) if new else {}
        if given:
            cache.keep(given)
        return [known[key] if key in known else given[key] for key in keys]

    return Batched(many)


def _content(verdict: Verdict) -> dict[str, object]:
    return {
        "status": verdict.status, "reward": verdict.reward, "correct": verdict.correct, "feedback": verdict.feedback, "parts": dict(verdict.parts)
    }
