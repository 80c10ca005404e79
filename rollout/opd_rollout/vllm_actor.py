"""The Ray actor around one vLLM engine. vLLM is imported when the actor opens its model, so that whoever names this class stays light."""

import asyncio
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import ray

from opd_rollout.shared_memory import Written, read
from opd_rollout.types import Sampling
from opd_rollout.vllm_scores import from_fixed_ids, from_rows, from_vocabulary
from opd_rollout.vllm_types import Answers, ModelFiles, Place, RunnerFacts, RunnerSettings, Scored, ScoreJob

EXIT_ENGINE_DEAD = 70
FOLDER_STAMP = "folder"  # of weights that came with the model's folder


class OtherWeights(RuntimeError):
    """The weights in place are not those that were asked for."""


class VllmActor:
    """Empty until `open`; after a crash Ray starts it empty again and the engine's side opens it anew.

    `stamp` names the weights in place, "" where they are not known to be whole: before the first arrived, and after a failure in mid-update.
    `version` is the number that answers carry; a stamp is never used twice, a version may be (a run that went back to a checkpoint).
    """

    def __init__(self) -> None:
        self._runner: Any = None
        self._opened: tuple[ModelFiles, RunnerSettings] | None = None
        self._stamp, self._version, self._num_adapters = "", 0, 0
        self._changing = asyncio.Lock()
        self._updating, self._asleep = False, False
        self._users: set[str] = set()  # ranks of the learner that need it awake, as ATTEMPT/RANK
        self._adapters: deque[tuple[Any, tempfile.TemporaryDirectory[str]]] = deque(maxlen=2)  # the one before serves answers under way

    async def open(self, model: ModelFiles, settings: RunnerSettings) -> RunnerFacts:
        """Start vLLM, once; the same call again does nothing. Raises ValueError for a model that vLLM cannot load."""
        if self._updating:
            os._exit(EXIT_ENGINE_DEAD)  # the learner that began an update is gone, and workers may wait for it for ever
        async with self._changing:
            if self._opened == (model, settings):
                return self._runner.facts
            if self._opened is not None:
                os._exit(EXIT_ENGINE_DEAD)  # another model: a fresh process, for vLLM cannot be opened twice in one
            try:
                self._runner = import_module("opd_rollout.vllm_runner").open_runner(model, settings)
            except Exception as error:
                raise ValueError(f"vLLM cannot load {model.folder or 'the student'}: {_first_line(error)}") from error
            self._opened, self._stamp = (model, settings), FOLDER_STAMP if model.folder else ""
            return self._runner.facts

    async def revive(self, model: ModelFiles, settings: RunnerSettings, written: Written | None, version: int, stamp: str) -> RunnerFacts:
        """Whatever is missing until weights `stamp` are in place: start vLLM, load the file."""
        facts = await self.open(model, settings)
        if written is not None:
            if not self._serves(stamp) and not os.path.exists(written.path):
                raise OtherWeights(f"newer weights than {stamp} have arrived meanwhile: ask again, with those")
            await self.load(written, version, stamp)
        return facts

    async def stamp(self) -> str:
        """Of the weights in place."""
        return self._stamp

    async def place(self, path: str) -> Place:
        """Where this actor is, and whether it sees `path`."""
        gpus = tuple(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
        return Place(address=ray.util.get_node_ip_address(), sees=os.path.exists(path), is_open=self._runner is not None, gpus=gpus)

    async def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    async def generate(self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling, stamp: str) -> Answers:
        """One completion a prompt. Raises OtherWeights unless those of `stamp`, or newer ones of the same start of the learner, are in place.

        The caller then brings them.
        """
        await self._check(stamp)
        runner = import_module("opd_rollout.vllm_runner")
        params = [
            runner.generation_params(
                seed, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, max_tokens=sampling.max_tokens,
                stop_ids=sampling.stop_ids,
            )
            for seed in seeds
        ]  # fmt: skip
        salt, version = self._stamp, self._version
        outputs = await self._run([{"prompt_token_ids": list(prompt), "cache_salt": salt} for prompt in prompts], params)
        return _pack([output.outputs[0] for output in outputs], version, sampling)

    async def score(self, jobs: Sequence[ScoreJob], temperature: float, stamp: str, vocab_size: int) -> list[Scored]:
        """Log-probs of given completions; see opd_rollout.vllm_scores for what is exact when. Raises ValueError for a missing score."""
        await self._check(stamp)
        assert self._opened is not None
        settings, runner = self._opened[1], import_module("opd_rollout.vllm_runner")
        whole = settings.max_logprobs == -1
        fixed = not whole and self._runner.facts.fixed_ids
        params = []
        for job in jobs:
            start = len(job.context_ids) - 1
            if fixed and not job.k:
                token = np.asarray(job.completion_ids, dtype=np.int32)[:, None]
                ids = token if job.support_ids is None else np.concatenate([token, job.support_ids.astype(np.int32)], axis=1)
                params.append(runner.scoring_params(0, ids, start))
            else:
                params.append(runner.scoring_params(-1 if whole else job.k or settings.max_logprobs * (job.support_ids is not None)))
        outputs = await self._run([{"prompt_token_ids": [*job.context_ids, *job.completion_ids]} for job in jobs], params)
        return [self._scored(job, output, temperature, whole, vocab_size) for job, output in zip(jobs, outputs, strict=True)]

    async def _check(self, stamp: str) -> None:
        async with self._changing:  # an update that is under way ends first
            pass
        if not self._serves(stamp):
            raise OtherWeights(f"weights {self._stamp or 'of no version'} are in place, not {stamp}")

    def _serves(self, stamp: str) -> bool:
        """Whether the weights in place are those of `stamp` or, sent by the same start of the learner (stamp: WORD-NUMBER), newer."""
        (word, _, number), (wanted, _, least) = self._stamp.rpartition("-"), stamp.rpartition("-")
        return self._stamp == stamp or (word == wanted != "" and int(number) >= int(least))

    def _scored(self, job: ScoreJob, output: Any, temperature: float, whole: bool, vocab_size: int) -> Scored:
        if output.prompt_token_id_logprobs is not None:
            return from_fixed_ids(job, np.asarray(output.prompt_token_id_logprobs))
        flat = output.prompt_logprobs
        first = len(job.context_ids)
        if flat is None or len(flat) != first + len(job.completion_ids):
            raise ValueError("the teacher's engine returned no prompt log-probs; a score is missing")
        start, end = flat.start_indices[first], flat.end_indices[-1]
        ids = np.asarray(flat.token_ids[start:end]).reshape(len(job.completion_ids), -1)
        logp = np.asarray(flat.logprobs[start:end], dtype=np.float64).reshape(ids.shape)
        if not whole:
            return from_rows(job, ids, logp)
        dense = np.full((len(ids), max(int(ids.max()) + 1, vocab_size)), -np.inf)
        np.put_along_axis(dense, ids, logp, axis=1)
        return from_vocabulary(job, dense[:, :vocab_size], temperature)

    async def load(self, written: Written, version: int, stamp: str, in_flight: bool = False) -> None:
        """Put weights of `version` in place of the old ones, from a file; nothing where they, or newer ones, are. LoRA factors, where the engine
        takes those, serve requests from now on.

        Answers under way end first or, with `in_flight` and an async engine, go on under the new ones. A failure leaves no version: the caller
        restarts this actor.
        """
        m = written.metadata
        info = {"path": written.path, "names": list(m.names), "shapes": [list(shape) for shape in m.shapes], "dtypes": list(m.dtypes)}
        async with self._changing:
            if self._serves(stamp):
                return
            assert self._opened is not None
            await self._wake("weights")  # the cache's memory comes last: the update needs some of its own
            if adapter := self._opened[1].adapter:
                await self._adopt(adapter, written)
                self._version, self._stamp = version, stamp
            else:
                await self.begin(in_flight)
                await self.transfer("update_weights", {"update_info": info})
                await self.end(version, stamp)
            await self._wake("kv_cache")
            self._asleep = False

    async def _wake(self, part: str) -> None:
        if self._asleep:
            await self._runner.call("wake_up", [part])

    async def _adopt(self, config: str, written: Written) -> None:
        folder, self._num_adapters = tempfile.TemporaryDirectory(prefix="opd-adapter-"), self._num_adapters + 1
        runner = import_module("opd_rollout.vllm_runner")
        request = runner.adapter_request(self._num_adapters, Path(folder.name), config, read(written))
        await self._runner.call("add_lora", request)
        self._adapters.append((request, folder))

    async def begin_update(self, in_flight: bool = False) -> None:
        """As `begin`, for an update that comes in several calls: until `end_update` nobody else touches the weights, and requests wait."""
        await self._changing.acquire()
        self._updating = True
        await self._wake("weights")
        await self.begin(in_flight)

    async def end_update(self, version: int, stamp: str) -> None:
        await self.end(version, stamp)
        await self._wake("kv_cache")
        self._updating = self._asleep = False
        self._changing.release()

    async def begin(self, in_flight: bool = False) -> None:
        """Hold generation and open an update."""
        self._stamp = ""
        await self._runner.hold(keep=in_flight)
        await self._runner.call("start_weight_update")

    async def transfer(self, method: str, info: dict[str, Any]) -> None:
        """init_weight_transfer_engine or update_weights, with vLLM's own request as a mapping."""
        kinds = {"update_weights": "WeightTransferUpdateRequest", "init_weight_transfer_engine": "WeightTransferInitRequest"}
        request = getattr(import_module("vllm.distributed.weight_transfer.base"), kinds[method])(**info)
        await self._runner.call(method, request)

    async def end(self, version: int, stamp: str) -> None:
        """Close the update: no cached key or value of the old weights stays, answers under way go on."""
        await self._runner.call("finish_weight_update", str(version))
        await self._runner.call("reset_prefix_cache")
        await self._runner.release()
        self._version, self._stamp = version, stamp

    async def pause(self) -> None:
        """Nothing runs until `resume`; answers under way are kept (async engine)."""
        await self._runner.hold()

    async def resume(self) -> None:
        await self._runner.release()

    async def sleep(self, user: str) -> None:
        """`user` needs it no more: once no other rank does, the GPU's memory goes to the learner and the weights wait on the host."""
        async with self._changing:
            self._users.discard(user)
            if not self._users and not self._asleep:
                await self._runner.call("sleep", level=1)
                self._asleep = True

    async def wake(self, user: str) -> None:
        """Be ready for `user`, ATTEMPT/RANK: a rank of the learner. Ranks of an attempt that has ended are forgotten."""
        async with self._changing:
            attempt = user.rpartition("/")[0]
            self._users = {one for one in self._users if one.rpartition("/")[0] == attempt} | {user}
            if self._asleep:
                await self._runner.call("wake_up")
                self._asleep = False

    async def _run(self, prompts: Sequence[Any], params: Sequence[Any]) -> list[Any]:
        try:
            return await self._runner.run(prompts, params, self._adapters[-1][0] if self._adapters else None)
        except Exception as error:
            if type(error).__name__ in ("EngineDeadError", "EngineGenerateError"):
                os._exit(EXIT_ENGINE_DEAD)  # the engine process is gone: a dead actor is noticed at once and started anew
            raise


def _pack(answers: Sequence[Any], version: int, sampling: Sampling) -> Answers:
    if any(answer.finish_reason == "abort" for answer in answers):
        raise RuntimeError("the actor fell asleep in mid-answer")  # it is started anew, and the same requests are given out again
    lengths = [len(answer.token_ids) for answer in answers]
    spans = []
    for answer, length in zip(answers, lengths, strict=True):
        found = answer.weight_versions or []
        labelled = tuple((_number(span.version, version), span.start, span.end) for span in found if span.end > span.start)
        spans.append(labelled or ((version, 0, length),))
    logprobs = [np.asarray(answer.logprobs.logprobs[:: _columns(answer)], dtype=np.float32) for answer in answers]
    if sampling.temperature == 0:
        logprobs = [np.zeros_like(values) for values in logprobs]  # nothing else could be drawn
    packed = np.concatenate(logprobs) if logprobs else np.zeros(0, np.float32)
    if not np.isfinite(packed).all():
        raise ValueError("the model's logits are NaN or infinite, so its weights are; go back to a checkpoint from before that")
    return Answers(
        token_ids=np.concatenate([np.asarray(answer.token_ids, dtype=np.int32) for answer in answers]),
        logprobs=packed,
        ends=np.cumsum(lengths),
        stopped=np.asarray([answer.finish_reason == "stop" for answer in answers]),
        spans=spans,
    )


def _columns(answer: Any) -> int:
    """Entries that vLLM returned for a token: the sampled one comes first."""
    return max(len(answer.logprobs.logprobs) // max(len(answer.token_ids), 1), 1)


def _number(label: str, version: int) -> int:
    """vLLM labels weights that no update brought "default"."""
    return int(label) if label.isdigit() else version


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]
