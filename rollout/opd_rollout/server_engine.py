"""An engine over a running OpenAI-compatible server that takes and returns token ids (vLLM from 0.10.2 on): it answers and does no more."""

import http.client
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch

from opd_rollout.sampling import check_sampling
from opd_rollout.types import Completion, GenerateRequest, Sampling, ScoreRequest, TokenScores, WeightSource

RETRIED = (429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """url: up to and with /v1. deadline_seconds: for one answer; concurrency: requests on their way at once; attempts: for one answer."""

    url: str
    deadline_seconds: float = 3600.0
    concurrency: int = 64
    attempts: int = 3


class ServerEngine:
    """Engine (see opd_rollout.engine) whose model lives in another process, reached over HTTP without a proxy.

    model: the name it is served under; positions: its longest sequence, None where the server does not say. An API key is read from
    OPENAI_API_KEY. Raises ValueError when nothing answers there, or not as a server of models does.
    """

    def __init__(self, settings: ServerSettings, model: str = "") -> None:
        parts = urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server is {settings.url!r}; write server=http://127.0.0.1:8000/v1")
        self._settings, self._parts = settings, parts
        listed = self._listed()
        names = [entry["id"] for entry in listed]
        self.model = model if model in names else names[0]
        self.positions: int | None = next(entry for entry in listed if entry["id"] == self.model).get("max_model_len")

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        """Completions in the order of the requests, log-probs NaN. Raises ValueError for what the server refuses, RuntimeError where it fails."""
        check_sampling(sampling)
        with ThreadPoolExecutor(max_workers=min(self._settings.concurrency, max(1, len(requests)))) as pool:
            pending = [pool.submit(self._answer, request, sampling) for request in requests]
            try:
                return [answer.result() for answer in pending]
            except BaseException:
                for answer in pending:
                    answer.cancel()
                raise

    def score(self, requests: Sequence[ScoreRequest], temperature: float) -> list[TokenScores]:
        """Raises ValueError: a server answers only."""
        raise ValueError("a server engine answers and does not score; score with a torch engine")

    def load_weights(self, weights: WeightSource) -> None:
        """Raises ValueError: the server keeps its own weights."""
        raise ValueError("a server engine keeps the server's weights; start the server with the new ones")

    def close(self) -> None:
        """Connections end with their requests; the server goes on."""

    def _answer(self, request: GenerateRequest, sampling: Sampling) -> Completion:
        reply = self._post(
            "/completions",
            {
                "model": self.model, "prompt": list(request.prompt_ids), "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
                "top_p": sampling.top_p, "top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "seed": request.seed,
                "stop_token_ids": list(sampling.stop_ids), "return_token_ids": True, "skip_special_tokens": False,
            },
        )  # fmt: skip
        choice = reply["choices"][0]
        ids = choice.get("token_ids")
        if ids is None:
            raise ValueError(f"the server at {self._settings.url} returns no token ids: use vLLM 0.10.2 or newer")
        return Completion(
            token_ids=tuple(ids),
            logprobs=torch.full((len(ids),), float("nan")),
            loss_mask=torch.ones(len(ids), dtype=torch.bool),
            source="student",
            temperature=sampling.temperature,
            finish="length" if choice.get("finish_reason") == "length" else "stop",
            versions=((0, 0, len(ids)),),
        )

    def _listed(self) -> list[dict[str, Any]]:
        try:
            status, body = self._exchange("GET", "/models", None, 10.0)
            listed = json.loads(body)["data"] if status == 200 else []
        except OSError as error:
            raise ValueError(
                f"nothing answers at {self._settings.url} ({error}): start the server first, e.g. vllm serve MODEL --host 127.0.0.1 --port "
                f"{self._parts.port or 8000}"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError, http.client.HTTPException):
            listed = []
        if not listed:
            raise ValueError(f"{self._settings.url} is no server of models: GET /models gave no list; the address ends in /v1")
        return listed

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        ends, problem = time.monotonic() + self._settings.deadline_seconds, ""
        for attempt in range(self._settings.attempts):
            left = ends - time.monotonic()
            if left <= 0:
                break
            try:
                status, body = self._exchange("POST", path, json.dumps(content).encode(), left)
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    return json.loads(body)
                problem = f"status {status}: {body[:500].decode(errors='replace')}"
                if status not in RETRIED:
                    raise ValueError(f"the server at {self._settings.url} refuses a request ({problem})")
            time.sleep(min(2.0**attempt, max(0.0, ends - time.monotonic())))
        raise RuntimeError(f"the server at {self._settings.url} gave no answer in {self._settings.attempts} attempts ({problem})")

    def _exchange(self, method: str, path: str, body: bytes | None, seconds: float) -> tuple[int, bytes]:
        secure = self._parts.scheme == "https"
        kind: Callable[..., http.client.HTTPConnection] = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._parts.hostname, self._parts.port, timeout=seconds)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
