"""Who answers: a model in this process, or one behind a server."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from opd_rollout.engine import Engine
from opd_rollout.server_engine import ServerEngine, ServerSettings
from opd_rollout.torch_engine import TorchEngine
from transformers import PreTrainedTokenizerBase

from opd.build import pretrained
from opd.build.devices import chunk_bytes_of
from opd.build.student import load_model, pad_id, student_path
from opd.config.recipe import Recipe
from opd.text import chat


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """An engine, its tokenizer, the ids that end an answer, and its longest sequence in tokens (None: not known). name: tells it from others."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    stop_ids: tuple[int, ...]
    positions: int | None


def open_speaker(recipe: Recipe, server: str) -> Speaker:
    """The recipe's student, on a GPU where there is one; with `server` only its tokenizer is loaded here. Raises ValueError with the fix."""
    path = student_path(recipe)
    tokenizer = pretrained.load_tokenizer(path)
    stop_ids = chat.stop_ids(tokenizer, pretrained.generation_config(path))
    if server:
        engine = ServerEngine(ServerSettings(url=server), recipe.model.path)
        return Speaker(name=f"{engine.model} at {server}", tokenizer=tokenizer, engine=engine, stop_ids=stop_ids, positions=engine.positions)
    model = load_model(recipe, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    e = recipe.engine
    engine = TorchEngine(
        model, pad_id=pad_id(tokenizer), token_budget=e.token_budget, chunk_bytes=chunk_bytes_of(recipe), vocab_size=len(tokenizer)
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Speaker(name=f"{path} {pretrained.fingerprint([path])}", tokenizer=tokenizer, engine=engine, stop_ids=stop_ids, positions=positions)


def published_config(recipe: Recipe) -> dict[str, Any]:
    """What the model's generation_config.json says; {} without one."""
    found = pretrained.generation_config(student_path(recipe))
    return {} if found is None else found.to_dict()


def name_of(model_or_run: str) -> str:
    """The last part of a path or hub name."""
    return Path(model_or_run).name
