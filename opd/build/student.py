"""Models and tokenizers of a recipe: the student, its adapters, other models as teachers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from opd.build import pretrained, shapes
from opd.build.devices import compute_device
from opd.build.fused import check_fused, fuse
from opd.build.problems import Problems
from opd.config.recipe import Recipe
from opd.revising import PHRASE_TOKENS
from opd.run.named import RUNS, nearest_runs, read_status
from opd.source import parse_source
from opd.tasks import TASKS
from opd.tasks.tokenizer import character_tokenizer
from opd.text.bpe import train_byte_bpe


def student_path(recipe: Recipe) -> str:
    """Where the student's weights come from: `init` (a run's last or best model) or model.path; "" for a new model."""
    if not recipe.init and not recipe.model.path and recipe.model.init != "random" and not recipe.model.shape:
        raise ValueError(
            "model: neither a path nor a shape: give model.path (a Hugging Face folder or hub name, e.g. models/expr-base), init=runs/NAME to go on "
            "from a run, or for a new model model.shape={hidden_size: 128, num_hidden_layers: 4} or model.init=random"
        )
    if not recipe.init:
        return pretrained.find_model(recipe.model.path) if recipe.model.path else ""
    folder = next((place for place in (Path(recipe.init), RUNS / recipe.init) if (place / "status.json").is_file()), Path(recipe.init))
    if not (status := read_status(folder)):
        instead = "name a finished run (`opd show` lists them); a model folder is model.path's"
        raise ValueError(f"init: {folder} is no run folder (no status.json){nearest_runs(recipe.init)}; {instead}")
    if (state := status["state"]) != "finished":
        raise ValueError(f"init: run {folder} is {state}; finish it first (opd train with its recipe resumes it)")
    return pretrained.find_model(str(folder / "model"))


def stands_in(recipe: Recipe, path: str) -> bool:
    """Whether a model is only tried out, made from shipped sizes without asking the hub. Raises ValueError where no sizes are known."""
    if recipe.model.init != "random" or Path(path).is_dir():
        return False
    shapes.find_shape(path)
    return True


def served_paths(recipe: Recipe, choices: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    """Signal -> model of the teachers that vLLM serves; one without weights is made in this process instead, one read from a file not at all."""
    served = {name: path for name, (kind, path) in choices.items() if kind == "served" and name not in absent_teachers(recipe)}
    return {name: path for name, path in served.items() if not stands_in(recipe, pretrained.find_model(path))}


def absent_teachers(recipe: Recipe) -> set[str]:
    """Signals whose scores are all read from a file, because every answer comes from the data: their teachers are not loaded."""
    every = parse_source(recipe.rollout.source).kind == "dataset"
    return {name for name, signal in recipe.signals.items() if signal.scores and every}


def tokenizer_at(recipe: Recipe, path: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, or its stand-in."""
    return shapes.shape_tokenizer(path, recipe.model.scale) if stands_in(recipe, path) else pretrained.load_tokenizer(path)


def config_at(recipe: Recipe, path: str) -> Any:
    """A model's configuration as the recipe would build it."""
    if stands_in(recipe, path):
        return shapes.shape_config(path, recipe.model.scale)
    return shapes.scaled(pretrained.load_config(path), recipe.model.scale)


def student_config(recipe: Recipe, path: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The student's configuration: of its model, or of model.shape where it has no path."""
    return config_at(recipe, path) if path else shapes.scaled(pretrained.new_config(recipe.model.shape, tokenizer), recipe.model.scale)


def load_tokenizer(recipe: Recipe, problems: Problems) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a new model the task's characters, or a byte-level BPE trained on the data or on what the task writes."""
    path = student_path(recipe)
    if path:
        return tokenizer_at(recipe, path)
    if recipe.data.task and TASKS[recipe.data.task].characters:
        return character_tokenizer(problems.corpus()[0])
    return train_byte_bpe(problems.corpus(), recipe.model.vocabulary)


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The student in its dtype, where this process computes; random weights are drawn there from the recipe's seed."""
    path, m, device = student_path(recipe), recipe.model, compute_device()
    if m.liger and device.type == "cpu":
        check_fused("")  # before weights are made or loaded
    options: dict[str, Any] = {"dtype": getattr(torch, m.dtype), "attn_implementation": m.attention}
    if path and m.init == "pretrained":
        model = pretrained.load_model(path, **options).to(device)
    else:
        model = pretrained.new_model(student_config(recipe, path, tokenizer), recipe.seed, device=device, **options)
    if path and stands_in(recipe, path):
        model.generation_config = shapes.shape_generation(path, m.scale)
    elif not path:
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    pretrained.check_rows(model, len(tokenizer), path or "model.shape")
    if recipe.engine.kind == "vllm" and (experts := pretrained.num_experts(model.config)):
        raise ValueError(
            f"the student is a mixture of {experts} experts: vLLM and the learner may route a token differently, and routing replay is not "
            "supported; "
            "use engine=torch, or a dense model"
        )
    if m.liger:
        fuse(model)
    return model


def external_model(path: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, name: str, own_tokenizer: bool = False) -> torch.nn.Module:
    """Another model as teacher. Raises ValueError unless its tokenizer gives the student's ids (heads may be padded differently), or is kept."""
    found = pretrained.find_model(path)
    theirs = tokenizer_at(recipe, found)
    if own_tokenizer:
        tokenizer = theirs
    pretrained.check_same_tokens(tokenizer.get_vocab(), theirs.get_vocab(), path)
    options: dict[str, Any] = {"dtype": getattr(torch, recipe.model.dtype), "attn_implementation": recipe.model.attention}
    if stands_in(recipe, found):
        model = pretrained.new_model(config_at(recipe, found), recipe.seed + 1, device=compute_device(), **options)
    else:
        model = pretrained.load_model(found, **options).to(compute_device())
    pretrained.check_rows(model, len(tokenizer), f"signals.{name}: teacher {path!r}")
    return model


def served_positions(recipe: Recipe, config: Any) -> int:
    """Longest sequence of a vLLM engine, tokens; a view may be longer than a question."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return min(most, recipe.engine.positions or 2 * (recipe.data.max_prompt_tokens + recipe.sampling.max_tokens))


def room_for_prompts(recipe: Recipe, config: Any, whose: str, served: bool) -> int:
    """Tokens that a model leaves for a prompt; served: behind vLLM, whose sequences may be shorter than the model's.

    Raises ValueError where there are none.
    """
    max_tokens, positions = answer_tokens(recipe), getattr(config.get_text_config(), "max_position_embeddings", None)
    if served:
        positions = served_positions(recipe, config) - 1  # scoring draws one token more
    room = 1 << 30 if positions is None else positions - max_tokens
    if room <= 0:
        twice = ", attempt, phrase and revision" if recipe.rollout.revise else ""
        raise ValueError(
            f"sampling.max_tokens={recipe.sampling.max_tokens} leaves no room for a prompt: {whose} has {positions} positions{twice}; lower it"
        )
    return room


def answer_tokens(recipe: Recipe) -> int:
    """The longest answer: an attempt, or with `rollout.revise` two of them and the phrase between."""
    return 2 * recipe.sampling.max_tokens + PHRASE_TOKENS if recipe.rollout.revise else recipe.sampling.max_tokens


def smallest_room(recipe: Recipe, room: int, near: Mapping[str, Any], served: Mapping[str, str]) -> int:
    """Tokens for a prompt that the student, who leaves `room`, and every teacher can read. near: signal -> config; served: signal -> path."""
    configs = {**near, **{name: pretrained.load_config(pretrained.find_model(path)) for name, path in served.items()}}
    return min([room, *(room_for_prompts(recipe, config, f"signals.{name}", name in served) for name, config in configs.items())])


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short rows; never read, so any id serves."""
    return next((number for number in (tokenizer.pad_token_id, tokenizer.eos_token_id) if number is not None), 0)
