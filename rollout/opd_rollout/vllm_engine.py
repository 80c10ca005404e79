"""The Engine over vLLM actors: order kept, work in chunks, the same seed when a chunk is issued again.

Legend: T completion tokens, K support size.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from opd_rollout.actor_states import Limits, Replica, ReplicaStatus
from opd_rollout.dispatch import ActorsLost, Pool
from opd_rollout.parity import LogprobGap, logprob_gap
from opd_rollout.sampling import check_sampling
from opd_rollout.scoring import view_hash
from opd_rollout.types import Completion, GenerateRequest, Sampling, ScoreRequest, TokenScores, WeightSource
from opd_rollout.vllm_actor import FOLDER_STAMP
from opd_rollout.vllm_types import Answers, ModelFiles, RunnerSettings, Scored, ScoreJob
from opd_rollout.weight_sync import Canary, Parcel, Transfer, check_manifest

LOG = logging.getLogger("opd.rollout")
NO_GAP = LogprobGap(mean=0.0, max=0.0, num_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """chunk: requests of a lease at most. load_seconds: deadline of one weight update. leads: this rank sends the weights. in_flight:
    new weights also reach answers under way (async runner); otherwise those end first. sleeps: actors share the learner's GPUs and sleep while
    nobody asks them; user: this rank's name among those that do, ATTEMPT/RANK. resends: nobody changes the learner's weights while answers are
    written, and this process can send them alone, so actors that come back empty get them at once.

    manifest: name -> shape of every weight that the model has; tied: the name of a head that is another weight.
    """

    vocab_size: int
    manifest: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: str = ""
    chunk: int = 64
    load_seconds: float = 300.0
    leads: bool = True
    in_flight: bool = False
    sleeps: bool = False
    resends: bool = False
    user: str = ""
    limits: Limits = field(default_factory=Limits)


class VllmEngine:
    """Engine (see opd_rollout.engine) over named actors; `canary`, where set, ends every weight update.

    `generate` may run in one thread while another calls `load_weights`: a request is for weights at least as new as those that it was sent
    for. Completions carry vLLM's own spans of weight versions, for weights may change while answers are under way (settings.in_flight).
    """

    def __init__(
        self,
        actors: Sequence[tuple[str, Any]],
        model: ModelFiles,
        runner: RunnerSettings,
        settings: EngineSettings,
        *,
        transfer: Transfer | None = None,
        check: Callable[[], None] | None = None,
        share: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        """Opens the model in every actor. share(value) -> the leading rank's value, once all ranks are there.

        Raises ValueError for a model that vLLM cannot load, ActorsLost where no actor comes up.
        """
        self._model, self._runner, self._settings, self._transfer, self._share = model, runner, settings, transfer, share
        self.canary: Canary | None = None
        self.route = ""  # which way weights come, in words
        self.version, self.last_gap, self.sync_seconds = 0, None, 0.0
        self._parcel = Parcel(stamp=FOLDER_STAMP if model.folder else "", version=0, written=None)
        self._weights: WeightSource | None = None
        self._pool = Pool([Replica(name=name, handle=handle) for name, handle in actors], settings.limits, self._revive, check, self._refill)
        self._pool.bring_up()
        self._loads = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """How many leases were issued, issued again, given out twice, and how many actors were brought up."""
        return self._pool.counts

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        """Completions in the order of the requests. Raises ValueError before any work for values or prompts that cannot be served."""
        check_sampling(sampling)
        self._check_prompts([(request.prompt_ids, sampling.max_tokens) for request in requests])
        chunks = self._chunks(len(requests))

        def send(handle: Any, lease: int) -> Any:
            some = requests[chunks[lease]]
            return handle.generate.remote([r.prompt_ids for r in some], [r.seed for r in some], sampling, self._parcel.stamp)

        answers = self._awake(chunks, send)
        return [completion for chunk in answers for completion in _completions(chunk, sampling)]

    def score(self, requests: Sequence[ScoreRequest], temperature: float) -> list[TokenScores]:
        """Scores in the order of the requests. Raises ValueError for what this engine cannot score, and for a missing score."""
        if temperature != 1 and self._runner.max_logprobs != -1:
            raise ValueError(f"vLLM scores at temperature 1, not {temperature}: use sampling.temperature=1, or a teacher in process (engine: torch)")
        if any(request.hidden for request in requests):
            raise ValueError("vLLM hands out no hidden states; use a teacher_topk or student_topk support, or a teacher in process")
        self._check_prompts([((*request.context_ids, *request.completion_ids), 1) for request in requests])
        self._check_columns(requests)
        jobs = [_job(request) for request in requests]
        chunks, vocab_size = self._chunks(len(jobs)), self._settings.vocab_size

        def send(handle: Any, lease: int) -> Any:
            return handle.score.remote(jobs[chunks[lease]], temperature, self._parcel.stamp, vocab_size)

        version = self.version
        scored = [one for chunk in self._awake(chunks, send) for one in chunk]
        return [_token_scores(*pair, temperature, version) for pair in zip(requests, scored, strict=True)]

    def load_weights(self, weights: WeightSource) -> None:
        """New weights into every actor, ended by the canary. All ranks call it; one sends.

        Raises ValueError, before a weight changes, for weights that are not the model's, and afterwards for actors that disagree with the
        learner even when restarted from the full export.
        """
        assert self._transfer is not None, "this engine's weights came with its folder"
        started = time.monotonic()
        if self._settings.sleeps:
            torch.cuda.empty_cache()
        check_manifest(self._settings.manifest, weights.metadata(), self._settings.tied)
        parcel = self._transfer.make(weights)
        if self._settings.leads and parcel.written:
            self._parcel = parcel
        self._transfer.deliver(self._pool, parcel, in_flight=self._settings.in_flight, seconds=self._settings.load_seconds)
        self._weights = weights
        self._share(None)  # from here on an actor that any rank brings up finds the whole file
        self._parcel, self.version = parcel, weights.version
        self._fly_canary()
        if self._settings.sleeps and self._settings.leads:
            self._pool.call("sleep", self._settings.user, seconds=self._settings.load_seconds)
        self._transfer.done()
        self._loads += 1
        self.sync_seconds = time.monotonic() - started

    def pause(self) -> None:
        """Nothing is generated until `resume`; answers under way are kept (async runner)."""
        self._pool.call("pause", seconds=self._settings.load_seconds)

    def resume(self) -> None:
        self._pool.call("resume", seconds=self._settings.load_seconds)

    def status(self) -> tuple[int, list[ReplicaStatus]]:
        """Requests that wait for an actor, and what every actor does."""
        return self._pool.status()

    def close(self) -> None:
        """Ends waits of other threads and removes files; the actors belong to whoever started them."""
        self._pool.close()
        if self._transfer is not None:
            self._transfer.close()

    def _revive(self, handle: Any) -> tuple[Any, bool]:
        """The call that brings an actor back, and whether it brings the weights too."""
        parcel = self._parcel
        if not parcel.lasting:
            return handle.open.remote(self._model, self._runner), False
        return handle.revive.remote(self._model, self._runner, parcel.written, parcel.version, parcel.stamp), True

    def _refill(self) -> None:
        """The learner's weights once more, into actors that all came back empty. Raises ActorsLost where they may not be sent now."""
        if self._transfer is None or self._weights is None or not self._settings.resends:
            raise ActorsLost(
                "every actor has died and came back without weights, of which this way keeps no copy, and they cannot be sent while several ranks "
                "or a learner ahead of its answers are at work: run the same command again to go on from the last checkpoint, or use "
                "engine.transfer=shared_memory, which keeps one"
            )
        LOG.warning("every actor came back without weights: version %d is sent again", self.version)
        parcel = self._transfer.make(self._weights)
        self._transfer.deliver(self._pool, parcel, in_flight=False, seconds=self._settings.load_seconds)
        self._parcel = parcel

    def _fly_canary(self) -> None:
        """Raises ValueError where an actor answers with another distribution than the learner's, also after a restart."""
        canary, ready = self.canary, [replica for replica in self._pool.replicas if replica.state == "ready"]
        if canary is None:
            return
        chosen = ready if self._loads == 0 or not ready else [ready[self._loads % len(ready)]]  # all at first, then in turn
        for index in range(self._share(len(chosen))):
            replica = chosen[index] if self._settings.leads else None
            gap = self._gap(replica, canary)
            if self._share(not gap.mean <= canary.limit_nats and self._parcel.lasting):
                if replica is not None:
                    self._pool.restart(replica, f"after the update it is {gap.mean:.3f} nats from the learner", "poisoned")
                    self._pool.bring_up()
                gap = self._gap(replica, canary)
            self.last_gap = gap
            if not gap.mean <= canary.limit_nats:
                raise ValueError(
                    f"actor {chosen[index].name} and the learner disagree by {gap.mean:.4f} nats on average (largest {gap.max:.4f}) after a weight "
                    f"update, more than engine.audit_nats={canary.limit_nats}{', also from a full export' if self._parcel.lasting else ''}: training "
                    "would be off-policy. Use float32, or raise the threshold knowingly"
                )
        self._share(None)

    def _gap(self, replica: Replica | None, canary: Canary) -> LogprobGap:
        """None: of an actor that the leading rank asks; this one only takes part in the learner's scores, where those are collective."""
        if replica is None:
            if canary.collective:
                canary.reference([])
            return NO_GAP
        seeds, prompts = [r.seed for r in canary.requests], [r.prompt_ids for r in canary.requests]

        def send(handle: Any, _: int) -> Any:
            return handle.generate.remote(prompts, seeds, canary.sampling, self._parcel.stamp)

        [answers] = self._pool.run([len(seeds)], send, at=replica)
        completions = _completions(answers, canary.sampling)
        asked = [ScoreRequest(context_ids=p, completion_ids=c.token_ids) for p, c in zip(prompts, completions, strict=True)]
        return logprob_gap(completions, canary.reference(asked))

    def _awake(self, chunks: Sequence[slice], send: Callable[[Any, int], Any]) -> list[Any]:
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        if not self._settings.sleeps:
            return self._pool.run(sizes, send)
        torch.cuda.empty_cache()  # what the learner's allocator keeps for later is the actors' now
        self._pool.call("wake", self._settings.user, seconds=self._settings.load_seconds)
        try:
            return self._pool.run(sizes, send)
        finally:
            self._pool.call("sleep", self._settings.user, seconds=self._settings.load_seconds)

    def _chunks(self, number: int) -> list[slice]:
        """Equal chunks, at least two leases an actor where there is enough work, `chunk` requests at most."""
        shares = len(self._pool.replicas) * self._settings.limits.depth
        size = max(1, min(self._settings.chunk, -(-number // shares)))
        return [slice(first, min(first + size, number)) for first in range(0, number, size)]

    def _check_prompts(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        limit, vocabulary = self._runner.positions, self._settings.vocab_size
        for index, (ids, more) in enumerate(sequences):
            if not ids:
                raise ValueError(f"request {index} has an empty prompt; it needs at least one token")
            if len(ids) + more > limit:
                raise ValueError(
                    f"request {index} has {len(ids)} tokens, and with {more} more exceeds the {limit} positions of the actors' engine; shorten "
                    "the prompt or its hint, lower sampling.max_tokens, or raise engine.positions within what the model allows"
                )
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise ValueError(f"request {index} holds a token id outside 0 to {vocabulary - 1}; use the model's own tokenizer")

    def _check_columns(self, requests: Sequence[ScoreRequest]) -> None:
        limit = self._runner.max_logprobs
        for request in requests:
            columns = request.k + (0 if request.support_ids is None else request.support_ids.shape[1])
            if request.k and request.support_ids is not None:
                raise ValueError(f"a request asks for support_ids and for k = {request.k}; choose one")
            if limit != -1 and columns > limit:
                raise ValueError(f"a request asks for {columns} log-probs a token, and the actors were opened for {limit}; lower the support's k")


def _job(request: ScoreRequest) -> ScoreJob:
    support = None if request.support_ids is None else request.support_ids.cpu().numpy().astype(np.int32)
    return ScoreJob(context_ids=request.context_ids, completion_ids=request.completion_ids, support_ids=support, k=request.k)


def _token_scores(request: ScoreRequest, scored: Scored, temperature: float, version: int) -> TokenScores:
    return TokenScores(
        sampled=torch.tensor(scored.sampled), ids=torch.tensor(scored.ids, dtype=torch.int64), logp=torch.tensor(scored.logp),
        tail_logp=torch.tensor(scored.tail_logp), entropy=torch.tensor(scored.entropy), temperature=temperature, version=version,
        view_hash=view_hash(request.context_ids),
    )  # fmt: skip


def _completions(answers: Answers, sampling: Sampling) -> list[Completion]:
    completions, start = [], 0
    for end, stopped, spans in zip(answers.ends.tolist(), answers.stopped.tolist(), answers.spans, strict=True):
        completions.append(
            Completion(
                token_ids=tuple(answers.token_ids[start:end].tolist()),
                logprobs=torch.tensor(answers.logprobs[start:end]),
                loss_mask=torch.ones(end - start, dtype=torch.bool),
                source="student",
                temperature=sampling.temperature,
                finish="stop" if stopped else "length",
                versions=spans,
            )
        )
        start = end
    return completions
