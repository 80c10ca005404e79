"""vLLM's two engines behind one set of coroutines: AsyncLLM (an engine process, can pause) and the offline LLM (in this process)."""

import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
import vllm
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from opd_rollout.vllm_types import ModelFiles, RunnerFacts, RunnerSettings

EXTENSION = "opd_rollout.vllm_transfer.WorkerExtension"


class Runner(Protocol):
    """One vLLM engine."""

    facts: RunnerFacts

    async def run(self, prompts: Sequence[TokensPrompt], params: Sequence[SamplingParams], lora: LoRARequest | None) -> list[RequestOutput]: ...

    async def call(self, method: str, *args: Any, **keywords: Any) -> Any:
        """A method that both engines have under the same name."""
        ...

    async def hold(self, *, keep: bool = True) -> None:
        """Nothing runs after this until `release`. keep: answers under way stop and go on there, under what is then the weights; else they end
        first."""
        ...

    async def release(self) -> None: ...


class OfflineRunner:
    """The LLM lives in one thread of this process; calls wait for each other."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._llm: LLM = self._thread.submit(lambda: LLM(disable_log_stats=True, **options)).result()
        self.facts = _facts(self._llm.llm_engine.vllm_config)

    async def run(self, prompts: Sequence[TokensPrompt], params: Sequence[SamplingParams], lora: LoRARequest | None) -> list[RequestOutput]:
        return await self._do(lambda: self._llm.generate(list(prompts), list(params), lora_request=lora, use_tqdm=False))

    async def call(self, method: str, *args: Any, **keywords: Any) -> Any:
        owner = self._llm if hasattr(self._llm, method) else self._llm.llm_engine  # add_lora
        return await self._do(lambda: getattr(owner, method)(*args, **keywords))

    async def hold(self, *, keep: bool = True) -> None:
        """Calls wait for each other anyway."""

    async def release(self) -> None: ...

    async def _do(self, action: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, action)


class AsyncRunner:
    """AsyncLLM; weights may change while answers are under way, between `hold` and `release`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(disable_log_stats=True, **options))
        self.facts, self._count = _facts(self._llm.vllm_config), 0

    async def run(self, prompts: Sequence[TokensPrompt], params: Sequence[SamplingParams], lora: LoRARequest | None) -> list[RequestOutput]:
        first, self._count = self._count, self._count + len(prompts)
        asked = enumerate(zip(prompts, params, strict=True))
        return list(await asyncio.gather(*(self._one(*pair, str(first + i), lora) for i, pair in asked)))

    async def _one(self, prompt: TokensPrompt, params: SamplingParams, name: str, lora: LoRARequest | None) -> RequestOutput:
        last = None
        async for output in self._llm.generate(prompt, params, name, lora_request=lora):
            last = output
        assert last is not None and last.finished, "vLLM ended a request without an answer"
        return last

    async def call(self, method: str, *args: Any, **keywords: Any) -> Any:
        return await getattr(self._llm, method)(*args, **keywords)

    async def hold(self, *, keep: bool = True) -> None:
        await self._llm.pause_generation(mode="keep" if keep else "wait", clear_cache=True)

    async def release(self) -> None:
        await self._llm.resume_generation()


def open_runner(model: ModelFiles, settings: RunnerSettings) -> Runner:
    """Start vLLM. Raises whatever vLLM raises for a model that it cannot load."""
    options: dict[str, Any] = {
        "model": model.folder, "skip_tokenizer_init": True, "dtype": settings.dtype, "max_model_len": settings.positions,
        "max_logprobs": settings.max_logprobs, "logprobs_mode": "processed_logprobs", "enable_prefix_caching": True, "seed": 0,
        "tensor_parallel_size": settings.tensor_parallel, "generation_config": "vllm", "trust_remote_code": False, **dict(settings.options),
    }  # fmt: skip
    if current_platform.is_cpu():
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": settings.kv_bytes}
    else:
        options |= {"gpu_memory_utilization": settings.memory_share, "enable_sleep_mode": settings.sleeps}
    if settings.adapter:
        rank = json.loads(settings.adapter)["r"]
        fitting = min(size for size in get_args(MaxLoRARanks) if size >= rank)
        options |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": fitting}
    if settings.transfer:
        options |= {"weight_transfer_config": WeightTransferConfig(backend=settings.transfer), "worker_extension_cls": EXTENSION}
    runner = {"async": AsyncRunner, "offline": OfflineRunner}[settings.mode]
    if model.folder:
        return runner(options)
    with tempfile.TemporaryDirectory(prefix="opd-model-") as folder:
        Path(folder, "config.json").write_text(model.config, encoding="utf-8")
        return runner({**options, "model": folder, "load_format": "dummy"})


def adapter_request(number: int, folder: Path, config: str, named: Sequence[tuple[str, torch.Tensor]]) -> LoRARequest:
    """Writes the factors as peft does, under the names of the adapted module, and names them for vLLM."""
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")
    save_file({f"base_model.model.{name.replace('.default.', '.')}": tensor.clone() for name, tensor in named}, folder / "adapter_model.safetensors")
    return LoRARequest(lora_name=str(number), lora_int_id=number, lora_path=str(folder))


def generation_params(seed: int, *, temperature: float, top_p: float, top_k: int, max_tokens: int, stop_ids: Sequence[int]) -> SamplingParams:
    """One sample: token ids only, the log-prob of each under the distribution that it was drawn from."""
    return SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed, logprobs=0, stop_token_ids=list(stop_ids),
        ignore_eos=True, detokenize=False, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def scoring_params(columns: int, fixed_ids: Any = None, start: int = 0) -> SamplingParams:
    """Log-probs of prompt tokens: `columns` most likely ids (-1: all), or the given ids from row `start` on."""
    given = {"prompt_logprobs": columns} if fixed_ids is None else {"prompt_logprob_token_ids": fixed_ids, "prompt_logprob_start": start}
    return SamplingParams(
        temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY, **given
    )


def _facts(config: Any) -> RunnerFacts:
    return RunnerFacts(
        vllm=vllm.__version__,
        device=current_platform.device_type,
        vocab_size=config.model_config.get_vocab_size(),
        fixed_ids=bool(config.use_v2_model_runner),
        pid=os.getpid(),
    )
