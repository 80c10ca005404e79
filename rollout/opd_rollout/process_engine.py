"""A TorchEngine in a process of its own, so that answers are drawn while the learner works.

Weights travel through shared memory: `load_weights` writes them beside those in use and returns; the child takes them at its next call, or,
with `in_flight`, before its next token. A child that dies or stalls is replaced and given the same requests, which have the same seeds.
"""

import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from opd_rollout.backbone import watch
from opd_rollout.engine import EngineLost
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import Completion, GenerateRequest, ModuleWeights, Sampling, ScoreRequest, TokenScores, WeightSource

POLL_SECONDS = 0.2
WRITES, VERSION, BEATS = range(3)  # of the shared counters


class GeneratorLost(EngineLost):
    """The generator's process died or stalled more often than it may be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSettings:
    """What the child needs besides the model; see TorchEngine. in_flight: new weights before the next token."""

    pad_id: int
    token_budget: int
    chunk_bytes: int | None = None
    vocab_size: int | None = None
    in_flight: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What both processes see. named: the newest weights. counters [3] int64: times written, their version, forward passes of the child."""

    model: nn.Module
    named: Mapping[str, Tensor]
    counters: Tensor


class ProcessEngine:
    """Engine (see opd_rollout.engine) over a TorchEngine in a child process; calls from several threads take turns.

    stall_seconds: a child that makes no forward pass for so long during a call is killed. restarts: in a row, before GeneratorLost.
    check: called while waiting; may raise to end the wait.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ChildSettings,
        *,
        stall_seconds: float = 300.0,
        restarts: int = 3,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Copies the model twice: what the child uses, and what comes next. Raises ValueError for a model that cannot be served."""
        TorchEngine(model, pad_id=settings.pad_id, token_budget=settings.token_budget, vocab_size=settings.vocab_size)
        self.model = copy.deepcopy(model).requires_grad_(False).eval().share_memory()
        named = {name: parameter.detach().clone().share_memory_() for name, parameter in self.model.named_parameters()}
        self._shared = _Shared(model=self.model, named=named, counters=torch.zeros(3, dtype=torch.int64).share_memory_())
        self._settings, self._stall_seconds, self._restarts, self._check = settings, stall_seconds, restarts, check
        self._turn, self._life = threading.Lock(), threading.RLock()
        self._asked, self._closed = 0, False
        self._start()

    @property
    def pid(self) -> int:
        """Of the child that serves now."""
        assert self._process.pid
        return self._process.pid

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        """Completions in the order of the requests. Raises what TorchEngine raises, and GeneratorLost."""
        return self._ask("generate", list(requests), sampling)

    def score(self, requests: Sequence[ScoreRequest], temperature: float) -> list[TokenScores]:
        """See opd_rollout.scoring.score_tokens."""
        return self._ask("score", list(requests), temperature)

    def load_weights(self, weights: WeightSource) -> None:
        """Writes the newest weights and returns; calls that begin afterwards use them. Raises ValueError for names or shapes that do not fit."""
        named, metadata = self._shared.named, weights.metadata()
        wrong = [n for n, shape in zip(metadata.names, metadata.shapes, strict=True) if n not in named or tuple(named[n].shape) != tuple(shape)]
        if wrong or len(metadata.names) != len(named):
            raise ValueError(f"the weights do not fit the engine's module: {wrong[:3] or 'some are missing'}; send every parameter once")
        gate = self._lock_weights()
        try:
            for bucket in weights.buckets():
                for name, tensor in bucket:
                    named[name].copy_(tensor)
            self._shared.counters[VERSION] = weights.version
            self._shared.counters[WRITES] += 1
        finally:
            gate.release()

    def close(self) -> None:
        """Ends the child; a call that waits in another thread raises GeneratorLost."""
        self._closed = True
        with self._life:
            self._end()

    def _lock_weights(self) -> Any:
        """The lock between writer and child, held. A child that dies while it holds it is replaced, and the lock with it."""
        deadline = time.monotonic() + self._stall_seconds
        while True:
            with self._life:
                gate = self._gate
            if gate.acquire(timeout=POLL_SECONDS):
                return gate
            self._revive()
            if time.monotonic() > deadline:
                raise GeneratorLost(f"the generator (pid {self.pid}) did not take its weights within {self._stall_seconds:g} s")

    def _ask(self, *message: Any) -> Any:
        with self._turn:
            for attempt in range(self._restarts + 1):
                try:
                    return self._exchange(message)
                except (EOFError, OSError, TypeError, ValueError) as lost:  # the last three: of a pipe that `close` shut in the midst of a look
                    if self._closed:
                        raise GeneratorLost("the engine is closed") from lost
                    if not isinstance(lost, EOFError | ConnectionError):
                        raise
                    reason, code = str(lost) or "its pipe closed", self._process.exitcode
                    if attempt < self._restarts:
                        self._revive(always=True)
            times = self._restarts + 1
            raise GeneratorLost(f"the generator was lost {times} times in a row ({reason}; exit status {code}); its last words stand above")

    def _exchange(self, message: tuple[Any, ...]) -> Any:
        self._asked += 1
        self._pipe.send_bytes(pickle.dumps((self._asked, *message)))
        beats, since = int(self._shared.counters[BEATS]), time.monotonic()
        while True:
            if self._pipe.poll(POLL_SECONDS):
                number, kind, answer = pickle.loads(self._pipe.recv_bytes())  # from our own child
                if number != self._asked:
                    continue  # of a call that was given up
                if kind == "answer":
                    return answer
                raise (ValueError if kind == "ValueError" else RuntimeError)(answer)
            self._check()
            if not self._process.is_alive() and not self._pipe.poll(0):
                raise EOFError("it died")
            if (now := int(self._shared.counters[BEATS])) != beats:
                beats, since = now, time.monotonic()
            if time.monotonic() - since > self._stall_seconds:
                raise EOFError(f"no forward pass for {self._stall_seconds:g} s")

    def _revive(self, always: bool = False) -> None:
        with self._life:
            if (always or not self._process.is_alive()) and not self._closed:
                self._end()
                self._start()

    def _start(self) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        lifeline, self._life_end = CONTEXT.Pipe(duplex=False)
        self._gate = CONTEXT.Lock()
        work = (theirs, lifeline, self._gate, self._shared, self._settings, torch.get_num_threads())
        self._process = CONTEXT.Process(target=_serve, args=work, name="opd-generator", daemon=True)
        self._process.start()
        theirs.close()
        lifeline.close()

    def _end(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._process.kill()
            self._process.join(10)
        self._pipe.close()
        self._life_end.close()


CONTEXT = multiprocessing.get_context("forkserver")  # a replacement need not import torch again
CONTEXT.set_forkserver_preload([__name__])


def _serve(pipe: Any, lifeline: Any, gate: Any, shared: _Shared, settings: ChildSettings, num_threads: int) -> None:
    """The child: answers calls in turn until the pipe closes; ends at once when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(num_threads)
    engine = TorchEngine(
        shared.model,
        pad_id=settings.pad_id,
        token_budget=settings.token_budget,
        chunk_bytes=settings.chunk_bytes,
        vocab_size=settings.vocab_size,
    )
    taken = -1

    def take_weights() -> None:
        nonlocal taken
        if int(shared.counters[WRITES]) == taken:
            return
        with gate:
            engine.load_weights(ModuleWeights(version=int(shared.counters[VERSION]), named=tuple(shared.named.items())))
            taken = int(shared.counters[WRITES])

    def before_forward() -> None:
        shared.counters[BEATS] += 1
        if settings.in_flight:
            take_weights()

    watch(shared.model, before_forward)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, name, *arguments = pickle.loads(pipe.recv_bytes())  # from our own parent
            try:
                take_weights()
                answer = ("answer", [_compact(record) for record in getattr(engine, name)(*arguments)])
            except Exception as error:  # told to the parent, which raises it
                answer = (type(error).__name__, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
            pipe.send_bytes(pickle.dumps((number, *answer)))


def _end_with(lifeline: Any) -> None:
    with contextlib.suppress(OSError):
        lifeline.poll(None)
    os._exit(1)


def _compact(record: Any) -> Any:
    """The record with tensors of its own: a slice would be sent with everything it was cut from."""
    tensors = {field.name: value.clone() for field in fields(record) if isinstance(value := getattr(record, field.name), Tensor)}
    return replace(record, **tensors)
