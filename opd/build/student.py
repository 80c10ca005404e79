"""Models and tokenizers of a recipe: the student, its adapters, other models as teachers."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from opd.build import pretrained
from opd.build.problems import Problems
from opd.config.recipe import Recipe
from opd.tasks.tokenizer import character_tokenizer
from opd.text.bpe import train_byte_bpe


def student_path(recipe: Recipe) -> str:
    """Where the student's weights come from: `init` (a run's last or best model) or model.path; "" for a new model."""
    if not recipe.init:
        return pretrained.find_model(recipe.model.path) if recipe.model.path else ""
    folder = Path(recipe.init)
    status = folder / "status.json"
    if not status.is_file():
        raise ValueError(f"init: {folder} is no run folder (no status.json)")
    if (state := json.loads(status.read_text())["state"]) != "finished":
        raise ValueError(f"init: run {folder} is {state}; finish it first (opd train with its recipe resumes it)")
    return pretrained.find_model(str(folder / "model"))


def load_tokenizer(recipe: Recipe, problems: Problems) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a new model a character tokenizer (embedded task) or a byte-level BPE trained on the data."""
    path = student_path(recipe)
    if path:
        return pretrained.load_tokenizer(path)
    if recipe.data.task:
        return character_tokenizer(problems.corpus()[0])
    return train_byte_bpe(problems.corpus(), recipe.model.vocabulary)


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The student in its dtype; random weights are drawn from the recipe's seed."""
    path, m = student_path(recipe), recipe.model
    options: dict[str, Any] = {"dtype": getattr(torch, m.dtype), "attn_implementation": m.attention}
    if path and m.init == "pretrained":
        model = pretrained.load_model(path, **options)
    else:
        config = pretrained.load_config(path) if path else pretrained.new_config(m.shape, tokenizer)
        model = pretrained.new_model(config, recipe.seed, **options)
    if not path:
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    pretrained.check_rows(model, len(tokenizer), path or "model.shape")
    return model


def external_model(path: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, name: str, own_tokenizer: bool = False) -> torch.nn.Module:
    """Another model as teacher. Raises ValueError unless its tokenizer gives the student's ids (heads may be padded differently), or is kept."""
    found = pretrained.find_model(path)
    theirs = pretrained.load_tokenizer(found)
    if own_tokenizer:
        tokenizer = theirs
    pretrained.check_same_tokens(tokenizer.get_vocab(), theirs.get_vocab(), path)
    model = pretrained.load_model(found, dtype=getattr(torch, recipe.model.dtype), attn_implementation=recipe.model.attention)
    pretrained.check_rows(model, len(tokenizer), f"signals.{name}: teacher {path!r}")
    return model


def room_for_prompts(model: torch.nn.Module, max_tokens: int, whose: str) -> int:
    """Tokens that a model leaves for a prompt. Raises ValueError where there are none."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = 1 << 30 if positions is None else positions - max_tokens
    if room <= 0:
        raise ValueError(f"sampling.max_tokens={max_tokens} leaves no room for a prompt: {whose} has {positions} positions; lower it")
    return room


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short rows; never read, so any id serves."""
    return next((number for number in (tokenizer.pad_token_id, tokenizer.eos_token_id) if number is not None), 0)
