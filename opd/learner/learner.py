"""The learner: one class for every way of applying updates; what differs between those is behind `Updater`.

Legend: N completion tokens of a micro-batch, D hidden size, V vocabulary.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from opd_kernels import HeadView
from opd_rollout.layout import split_by_budget
from opd_rollout.scoring import score_tokens
from opd_rollout.types import ModuleWeights, ScoreRequest, TokenScores, WeightSource
from torch import Tensor

from opd.learner.adapters import adapted_layers, adapters_off, merged_tensors, save_adapters
from opd.learner.ema import Shadow
from opd.learner.loss import LossInputs, loss_request
from opd.learner.memory import OutOfMemory, free_memory, halved, is_out_of_memory
from opd.learner.packing import num_rows, pack, pad_to, to_device
from opd.learner.policy import Policy
from opd.learner.schedule import learning_rate
from opd.learner.types import LearnerSettings, Observer, OptimizerSettings, Updater, Weights
from opd.learner.weights import FACTOR, GatheredWeights
from opd.objective.compose import denominators
from opd.objective.meters import meters
from opd.objective.terms import Needs, Objective
from opd.types import Judged, Meter, MicroBatch, Prepared, Sample, StepReport

logger = logging.getLogger("opd.learner")

EVERYTHING = 1 << 60  # a token budget that splits nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """What one optimiser step did; skipped: why no update was applied, or ""."""

    meters: Mapping[str, Meter]
    skipped: str


class PolicyLearner:
    """Implements opd.learner.types.Learner over an Updater. Made by `torch_learner` and `deepspeed_learner`.

    token_budget starts at the settings' and is halved when memory runs out. rate_scale multiplies the learning rate; who sets it keeps it.
    """

    def __init__(self, policy: Policy, updater: Updater, optimizer: OptimizerSettings, settings: LearnerSettings) -> None:
        self.policy, self.settings = policy, settings
        self.version, self.rate_scale = 0, 1.0
        self.observer: Observer | None = None
        self.token_budget = settings.token_budget
        self._updater, self._optimizer = updater, optimizer
        self._updates = 0
        self._trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        self._shadow = None if settings.ema_rate is None else Shadow(updater.pieces(), settings.ema_rate)
        self._seconds: dict[str, float] = {}

    def prepare(self, judged: Sequence[Judged], needs: Needs) -> list[Prepared | None]:
        """One pass of the student as it is now over its own answers, or None for each where nothing needs it.

        Old log-probs alone are left out with one update a batch: the weights of the update are then those of the rollout, unless answers are
        older or were sampled in another context.
        """
        several = self.settings.minibatches * self.settings.epochs > 1
        where = self._updater.gather((any(one.completion.source == "view" for one in judged), any(self._is_older(one) for one in judged)))
        elsewhere, older = any(view for view, _ in where), any(old for _, old in where)
        compared = (needs.old_logp and several) or ((needs.old_logp or needs.drawn_logp) and older)
        if not (needs.student_topk or needs.entropy or needs.own_logp or compared or elsewhere):
            return [None] * len(judged)
        requests = [
            ScoreRequest(context_ids=one.prompt_ids, completion_ids=one.completion.token_ids, k=needs.student_topk) for one in judged
        ]
        with_topk = needs.student_topk > 0
        return [
            Prepared(
                old_logp=scores.sampled,
                entropy=scores.entropy,
                topk_ids=scores.ids if with_topk else None,
                topk_logp=scores.logp if with_topk else None,
            )
            for scores in self._score(requests, self.version)
        ]

    def _is_older(self, one: Judged) -> bool:
        """Whether other weights than the present ones drew some of its tokens."""
        return one.completion.source == "replay" or any(drawn != self.version for drawn, _, _ in one.completion.versions)

    def teacher_pass(self, requests: Sequence[ScoreRequest], weights: Weights) -> list[TokenScores]:
        """Scores under the student's own weights: as they are, without their adapters (version 0 for ever), or averaged over time.

        Raises ValueError where the learner keeps no such weights.
        """
        if weights == "live":
            return self._score(requests, self.version)
        if weights == "adapter_off":
            with adapters_off(self.policy.model):
                return self._score(requests, 0)
        with self._average().swapped_in(self.policy, self._updater):
            return self._score(requests, self.version)

    def head(self, weights: Weights) -> HeadView:
        """The head that belongs to `teacher_pass(..., weights)`, good until the next call of `step` is over."""
        head = self.policy.head
        frozen = not any(parameter.requires_grad for parameter in head.parameters())
        copied = weights == "live" and not frozen and (self.settings.minibatches * self.settings.epochs > 1 or self._updater.sharded)

        def tensor(parameter: Tensor | None) -> Tensor | None:
            if parameter is None:
                return None
            if weights == "ema" and not frozen:
                name = names[id(parameter)]
                return self._updater.joined(name, self._average().tensors[name]).to(parameter.dtype)
            return parameter.detach().clone() if copied else parameter.detach()

        names = {id(parameter): name for name, parameter in self.policy.named_parameters()}
        with self._updater.whole_weights():
            weight = tensor(head.weight)
            assert weight is not None
            return HeadView(
                weight=weight, bias=tensor(head.bias), softcap=head.softcap, logit_scale=head.logit_scale, vocab_size=head.vocab_size
            )

    def step(self, samples: Sequence[Sample], objective: Objective, heads: Mapping[str, HeadView]) -> StepReport:
        """Learns from one batch of rollouts: minibatches x epochs optimiser steps, then one tick of the average.

        heads: the heads of the signals with hidden states. Meters are sums over the ranks. An update whose loss or gradient is not finite
        on any rank is refused on all (`skipped` says so). When memory runs out the token budget is halved and the minibatch replayed.
        Raises ValueError for samples that do not fit together, and where memory does not suffice for a single sequence.
        """
        self._seconds = dict.fromkeys(("pack", "gradient", "update"), 0.0)
        found: dict[str, Meter] = {}
        reasons = []
        count = self.settings.minibatches
        if self.observer is not None:
            self.observer.begin(len(samples))
        for _ in range(self.settings.epochs):
            for part in range(count):
                first = part * len(samples) // count
                update = self._update(first, samples[first : (part + 1) * len(samples) // count], objective, heads)
                add_meters(found, update.meters)
                reasons += [update.skipped] if update.skipped else []
        due = (self.version + 1) % self.settings.ema_every == 0
        if self._shadow is not None and due and len(reasons) < count * self.settings.epochs:
            self._shadow.tick(self._updater.pieces())
        self.version += 1
        found["updates/skipped"] = Meter(sum=float(len(reasons)), count=1.0)
        found["learner/token_budget"] = Meter(sum=float(self.token_budget), count=1.0)
        found |= {name: Meter(sum=value, count=1.0) for name, value in objective.scheduled.items()}
        found |= {f"seconds/learn/{phase}": Meter(sum=value, count=1.0) for phase, value in self._seconds.items()}
        return StepReport(step=self.version - 1, version=self.version, meters=found, skipped="; ".join(sorted(set(reasons))))

    def weights(self, version: int) -> WeightSource:
        """The student's weights for an engine, under Hugging Face names (see LearnerSettings.merge_adapters)."""
        model, alone = self.policy.model, self.settings.adapters_alone
        merged = self.settings.merge_adapters and not alone and bool(adapted_layers(model))
        own = [(name, parameter) for name, parameter in model.named_parameters() if not alone or FACTOR in name]
        if self._updater.sharded and not merged:
            return GatheredWeights(own, self._updater, version)
        with self._updater.whole_weights():
            named = merged_tensors(model) if merged else [(name, parameter.detach()) for name, parameter in own]
            if self._updater.sharded:
                named = [(name, tensor.clone()) for name, tensor in named]
        return ModuleWeights(version=version, named=tuple(named))

    @property
    def whole(self) -> bool:
        """Whether `state` can be had."""
        return self._updater.whole

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on besides the frozen weights, as plain values and tensors (not copies).

        Raises ValueError for a learner whose optimiser is in pieces.
        """
        average = None if self._shadow is None else self._shadow.tensors
        return {"version": self.version, "updates": self._updates, "token_budget": self.token_budget, "ema": average, **self._updater.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, which may be another learner's. Raises ValueError where the learner cannot."""
        self._updater.load_state(state)
        if self._shadow is not None and state["ema"] is not None:
            self._shadow.tensors = {name: tensor.clone() for name, tensor in state["ema"].items()}
        self.version, self._updates, self.token_budget = state["version"], state["updates"], state["token_budget"]

    def save(self, folder: Path) -> None:
        """Everything that a resume needs to go on bitwise. Collective; the folder is complete on return."""
        folder.mkdir(parents=True, exist_ok=True)
        self._updater.save(folder, {} if self._shadow is None else {"ema": self._shadow.tensors})
        if self._updater.rank == 0:
            torch.save({"version": self.version, "updates": self._updates, "token_budget": self.token_budget}, folder / "learner.pt")
        torch.save(_random_state(), folder / f"random-{self._updater.rank}.pt")
        self._updater.gather(None)  # a barrier

    def load(self, folder: Path) -> None:
        """Goes on from `save`, of however many ranks. Raises ValueError for a checkpoint of other settings (average, kind of learner)."""
        state = torch.load(folder / "learner.pt", weights_only=True)
        extra = self._updater.load(folder)
        if ("ema" in extra) != (self._shadow is not None):
            raise ValueError(f"{folder}: checkpoint and recipe disagree on whether an EMA teacher is kept; resume with the same recipe")
        if self._shadow is not None:
            self._shadow.tensors = extra["ema"]
        self.version, self._updates = state["version"], state["updates"]
        self.token_budget = min(self.token_budget, state["token_budget"])  # halved before, or lowered by the recipe since
        own = folder / f"random-{self._updater.rank}.pt"
        if own.is_file():  # else written by fewer ranks: this one keeps the state that it started with
            _set_random_state(torch.load(own, weights_only=True))

    def export(self, folder: Path) -> None:
        """A plain Hugging Face folder: safetensors of settings.shard_bytes at most and config; adapters merged, and alone in `adapter/`.

        Collective; rank 0 writes.
        """
        model = self.policy.model
        with self._updater.whole_weights():
            if self._updater.rank == 0:
                named = dict(merged_tensors(model)) if adapted_layers(model) else dict(model.state_dict())
                model.save_pretrained(folder, state_dict=named, max_shard_size=self.settings.shard_bytes)
                if adapted_layers(model):
                    save_adapters(model, folder / "adapter")
        self._updater.gather(None)

    def close(self) -> None:
        """Gives optimiser state and engine back; the model stays usable."""
        self._updater.close()
        self._shadow = None

    def _average(self) -> Shadow:
        if self._shadow is None:
            raise ValueError("this learner keeps no average of its weights; set the learner's ema_rate")
        return self._shadow

    def _score(self, requests: Sequence[ScoreRequest], version: int) -> list[TokenScores]:
        settings, lengths = self.settings, [len(one.context_ids) + len(one.completion_ids) for one in requests]
        options: dict[str, Any] = {"temperature": settings.temperature, "chunk_bytes": settings.chunk_bytes, "packed": settings.packed}
        options["version"] = version
        if not self._updater.sharded:
            return score_tokens(self.policy.model, self.policy.head, requests, token_budget=self.token_budget, **options)
        batches = split_by_budget(lengths, self.token_budget)  # every forward is collective, so all ranks run the same number
        spare = ScoreRequest(context_ids=(settings.pad_id,), completion_ids=(settings.pad_id,))
        scores: dict[int, TokenScores] = {}
        for index in range(max(self._updater.gather(len(batches)))):
            members = batches[index] if index < len(batches) else []
            chosen = [requests[member] for member in members] or [spare]
            found = score_tokens(self.policy.model, self.policy.head, chosen, token_budget=EVERYTHING, **options)
            scores.update(zip(members, found, strict=False))
        return [scores[index] for index in range(len(requests))]

    def _update(self, first: int, samples: Sequence[Sample], objective: Objective, heads: Mapping[str, HeadView]) -> _Update:
        """One optimiser step on these samples, which begin at `first` of the step's; replays them in smaller micro-batches when memory runs out."""
        replays, updater = 0, self._updater
        while True:
            started = time.perf_counter()
            batches = self._pack(samples, objective)
            shared = denominators(objective, [batch for batch in batches if num_rows(batch)], updater.all_reduce)
            inputs = LossInputs(objective=objective, denominators=shared, heads=heads, chunk_bytes=self.settings.chunk_bytes)
            packed = time.perf_counter()
            found = self._gradient(first, batches, inputs)
            done = time.perf_counter()
            self._seconds["pack"] += packed - started
            self._seconds["gradient"] += done - packed
            if found is not None:
                break
            updater.discard()
            replays += 1
            self.token_budget = halved(self.token_budget, samples)
            logger.warning("out of memory: micro-batches of at most %d tokens from now on; the minibatch is replayed", self.token_budget)
        lr = self.rate_scale * learning_rate(self._optimizer, self._updates)
        applied, norm = updater.apply(lr)
        self._updates += 1
        self._seconds["update"] += time.perf_counter() - done
        total = self._summed(found)
        total["learning_rate"] = Meter(sum=lr, count=1.0)
        total["learner/replays"] = Meter(sum=float(replays), count=1.0)
        if applied:
            total["gradient_norm"] = Meter(sum=norm, count=1.0)
        return _Update(meters=total, skipped="" if applied else "the loss or its gradient is not finite")

    def _pack(self, samples: Sequence[Sample], objective: Objective) -> list[MicroBatch]:
        """This rank's micro-batches on its device, as many as on every other rank."""
        settings = self.settings
        options: dict[str, Any] = {"packed": settings.packed, "temperature": settings.temperature, "pad_id": settings.pad_id}
        batches = pack(samples, signals=objective.needs.signals, token_budget=self.token_budget, **options)
        count = max(1, *self._updater.gather(len(batches)))
        device = self.policy.head.weight.device
        return [to_device(batch, device) for batch in pad_to(batches, count, **options)]

    def _gradient(self, first: int, batches: Sequence[MicroBatch], inputs: LossInputs) -> dict[str, Meter] | None:
        """Adds up the gradients of all micro-batches; None when memory ran out on any rank."""
        updater, found, exhausted = self._updater, {}, False
        self.policy.train()
        try:
            for batch in batches:
                loss, columns = updater.module(batch.layout, loss_request(batch, inputs))
                updater.backward(loss)
                if num_rows(batch):
                    add_meters(found, meters(columns, batch.rows, inputs.denominators))
                    if self.observer is not None:
                        self.observer.take(first, batch, columns)
                add_meters(found, {"tokens/learner": Meter(sum=float(num_tokens(batch)), count=1.0), "padding/learner": padding(batch)})
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if not updater.replayable:
                raise OutOfMemory(
                    f"out of memory with micro-batches of {self.token_budget} tokens, and gradients cannot be thrown away at ZeRO 2 and 3: "
                    f"resume with learner.token_budget={self.token_budget // 2}, or use ZeRO 0 or 1"
                ) from error
            exhausted = True
        finally:
            self.policy.eval()
        if any(updater.gather(exhausted)):
            free_memory()
            return None
        return found

    def _summed(self, own: Mapping[str, Meter]) -> dict[str, Meter]:
        total: dict[str, Meter] = {}
        for found in self._updater.gather(own):
            add_meters(total, found)
        return total


def add_meters(total: dict[str, Meter], more: Mapping[str, Meter]) -> None:
    """Adds sums and counts by name, in place."""
    for name, meter in more.items():
        before = total.get(name, Meter(sum=0.0, count=0.0))
        total[name] = Meter(sum=before.sum + meter.sum, count=before.count + meter.count)


def num_tokens(batch: MicroBatch) -> int:
    """Tokens of a micro-batch, context included, padding not; 0 for one that only keeps the ranks in step."""
    mask = batch.layout.attention_mask
    if not num_rows(batch):
        return 0
    return batch.layout.input_ids.numel() if mask is None else int(mask.sum())


def padding(batch: MicroBatch) -> Meter:
    """Pads among the tokens that a micro-batch computes."""
    computed = batch.layout.input_ids.numel() if num_rows(batch) else 0
    return Meter(sum=float(computed - num_tokens(batch)), count=float(computed))


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
