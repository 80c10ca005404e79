"""The model behind a judge: in this process, or behind a server."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from opd_rollout.sampling import request_seed
from opd_rollout.server_engine import ServerEngine, ServerSettings
from opd_rollout.torch_engine import TorchEngine
from opd_rollout.types import GenerateRequest, Sampling

from opd.build import pretrained
from opd.text import chat
from opd.types import Message
from opd.verify.judge_model import Ask

TOKEN_BUDGET = 32768


def open_judge(model: str, server: str, max_tokens: int) -> Ask:
    """A function from conversations to greedy replies; None for a conversation that does not fit beside the reply.

    Weights are loaded at the first question. Raises ValueError for a model or server that cannot be used.
    """
    if not model:
        raise ValueError("data.verifier.judge needs model=FOLDER or a hub name (with server=http://HOST:PORT/v1 it names the tokenizer)")
    path = pretrained.find_model(model)
    tokenizer = pretrained.load_tokenizer(path)
    stop_ids = chat.stop_ids(tokenizer, pretrained.generation_config(path))
    engine = ServerEngine(ServerSettings(url=server), model) if server else None
    positions = engine.positions if engine else getattr(pretrained.load_config(path).get_text_config(), "max_position_embeddings", None)
    room = (1 << 30) if positions is None else positions - max_tokens
    if room < 1:
        raise ValueError(f"data.verifier.judge.max_tokens is {max_tokens}, but the judge has {positions} positions for question and reply: lower it")
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, stop_ids=stop_ids)

    @cache
    def opened() -> TorchEngine | ServerEngine:
        if engine:
            return engine
        module = pretrained.load_model(path, dtype="auto").to("cuda" if torch.cuda.is_available() else "cpu")
        return TorchEngine(module, pad_id=tokenizer.pad_token_id or stop_ids[0], token_budget=TOKEN_BUDGET, vocab_size=len(tokenizer))

    def ask(conversations: Sequence[tuple[Message, ...]]) -> list[str | None]:
        rendered = [chat.render(tokenizer, messages) for messages in conversations]
        fitting = [n for n, ids in enumerate(rendered) if len(ids) <= room]
        requests = [GenerateRequest(prompt_ids=rendered[n], seed=request_seed(0, "judge", n, 0)) for n in fitting]
        replies = dict(zip(fitting, opened().generate(requests, sampling) if requests else [], strict=True))
        return [chat.decode(tokenizer, replies[n].token_ids) if n in replies else None for n in range(len(rendered))]

    return ask


def judge_fingerprint(choice: Any) -> str:
    """Names the weights of every judge in a verifier's choice that lies in a folder here."""
    if not isinstance(choice, dict):
        return ""
    models = [given["model"] for name, given in choice.items() if name == "judge" and isinstance(given, dict) and isinstance(given.get("model"), str)]
    mine = pretrained.fingerprint([pretrained.find_model(model) for model in models]) if models else ""
    return mine + "".join(judge_fingerprint(given) for given in choice.values())
