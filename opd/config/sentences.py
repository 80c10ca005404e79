"""What pydantic finds in a file, as sentences of ours: the key, what is wrong, the nearest valid name."""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from opd.config.choices import nearest

_ONE_TURN = "opd trains single answers to a prompt: no turns, tools or environments yet; a prompt may hold earlier turns as {role, content}"
_TEXT = "opd trains text models: no images, audio or video"
_ROUTING = "routing replay of mixture-of-experts models is not supported: engine=torch runs the learner's own module, engine=vllm refuses such models"
UNSUPPORTED = {
    **dict.fromkeys(("turns", "max_turns", "tools", "environment", "env", "multi_turn", "agent"), _ONE_TURN),
    **dict.fromkeys(("images", "image", "vision", "audio", "video", "processor", "multimodal"), _TEXT),
    **dict.fromkeys(("routing_replay", "router_replay", "moe", "expert_parallel"), _ROUTING),
}
"""Keys that other projects have for what this one does not do -> the reason."""
_PENALTY = "the penalty to the initial model is a term of the objective, {reference_kl: k3, coef: 0.04}: see method=grpo_kl or method=rloo_kl"
ELSEWHERE = {**dict.fromkeys(("beta", "kl_coef", "kl_loss_coef", "kl_penalty", "use_kl_loss", "init_kl_coef"), _PENALTY)}
"""Keys of other projects for what is no single key here -> where it is."""
SYNONYMS = {
    **dict.fromkeys(("learning_rate", "actor_lr", "learning-rate"), "optimizer.lr"),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "gradient_clipping", "clip_grad"), "optimizer.clip"),
    **dict.fromkeys(("batch_size", "train_batch_size", "rollout_batch_size", "per_device_train_batch_size", "prompts_per_step"), "rollout.prompts"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "total_epochs", "max_steps", "num_steps", "iterations"), "steps"),
    **dict.fromkeys(("max_new_tokens", "max_completion_length", "max_response_length", "max_length", "max_gen_len"), "sampling.max_tokens"),
    **dict.fromkeys(("max_prompt_length", "prompt_length"), "data.max_prompt_tokens"),
    **dict.fromkeys(("num_generations", "group_size", "n_samples_per_prompt", "num_samples", "rollout_n", "n"), "group"),
    **dict.fromkeys(("model_name", "model_name_or_path", "pretrain", "base_model"), "model.path"),
    **dict.fromkeys(("dataset", "dataset_name", "train_files", "train_file", "dataset_path"), "data.path"),
    **dict.fromkeys(("lora_rank", "lora_r", "r"), "model.lora.rank"),
    **dict.fromkeys(("use_liger", "use_liger_kernel", "liger_kernel"), "model.liger"),
    **dict.fromkeys(("lora_alpha",), "model.lora.alpha"),
    **dict.fromkeys(("save_steps", "save_freq", "save_every"), "checkpoint.every"),
    **dict.fromkeys(("eval_steps", "test_freq", "eval_every"), "eval.every"),
    **dict.fromkeys(("output_dir", "run_name", "experiment_name", "save_path"), "name"),
    **dict.fromkeys(("profiler", "profile_steps", "torch_profiler", "tool_config"), "profile.steps"),
    **dict.fromkeys(("report_to", "use_wandb"), "track.wandb"),
    **dict.fromkeys(("num_gpus", "n_gpus", "gpus", "world_size"), "learner.ranks"),
    **dict.fromkeys(("tensor_parallel_size", "tp_size"), "engine.tensor_parallel"),
    **dict.fromkeys(("gpu_memory_utilization", "mem_fraction_static"), "engine.memory_share"),
}
"""Names of other projects -> the key here."""
KINDS = {
    "int_parsing": "must be a whole number", "int_type": "must be a whole number", "int_from_float": "must be a whole number",
    "float_parsing": "must be a number", "float_type": "must be a number", "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false", "bool_type": "must be true or false", "string_type": "must be a text",
    "list_type": "must be a list, e.g. [a, b]", "tuple_type": "must be a list, e.g. [a, b]", "dict_type": "must be a mapping, {{key: value}}",
    "greater_than": "must be above {gt}", "greater_than_equal": "must be at least {ge}", "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}", "multiple_of": "must be a multiple of {multiple_of}", "literal_error": "must be one of {expected}",
    "too_short": "must have at least {min_length}", "too_long": "must have at most {max_length}",
}  # fmt: skip
"""Pydantic's type of error -> our words, filled in from its context."""


def explain(error: ValidationError, model: type[BaseModel], origin: str) -> str:
    """All findings as one line; the valid keys of a place are listed once, after the first unknown key there."""
    lines, listed = [], set()
    for item in error.errors():
        loc = item["loc"]
        where = ".".join(str(part) for part in loc)
        reason = UNSUPPORTED.get(str(loc[-1])) or (ELSEWHERE.get(str(loc[-1])) if "objective" in model.model_fields else None) if loc else None
        if item["type"] == "extra_forbidden" and reason:
            lines.append(f"{where}: {reason}")
        elif item["type"] == "extra_forbidden":
            fields = list(getattr(_type_at(model, loc[:-1]), "model_fields", {}))
            valid = "" if loc[:-1] in listed else f"; valid: {', '.join(sorted(fields))}"
            listed.add(loc[:-1])
            lines.append(f"unknown key {where!r}{suggestion(loc, fields, model)}{valid}")
        elif item["type"] == "missing":
            lines.append(f"{where} is missing")
        elif not where:  # about several keys, which the sentence names itself
            lines.append(item["msg"].removeprefix("Value error, "))
        elif item.get("input", "") is None and ":" in str(loc[-1]):  # {key:value} is one key of YAML, without a value
            lines.append(f"{where}: a space is missing after the colon: write {str(loc[-1]).replace(':', ': ', 1)}")
        else:
            lines.append(f"{where}: {_wording(item, _type_at(model, loc))} (found {short(item.get('input'))})")
    return f"{origin}: " + "; ".join(dict.fromkeys(lines))


def suggestion(loc: Sequence[int | str], fields: Sequence[str], model: type[BaseModel]) -> str:
    """' (did you mean X?)': almost so in this place, another project's name for it, the last part of a dotted key, a close spelling; else ''."""
    prefix, last, known = ".".join(map(str, loc[:-1])), str(loc[-1]), dotted_keys(model)
    ends = [key for key in known if key.rpartition(".")[2] == last]
    if here := difflib.get_close_matches(last, fields, n=1, cutoff=0.9):
        found = [f"{prefix}.{here[0]}" if prefix else here[0]]
    elif SYNONYMS.get(last) in known:
        found = [SYNONYMS[last]]
    elif ends:
        found = ends[:3]
    else:
        close = nearest(last, {*fields, *(key.rpartition(".")[2] for key in known)})
        name = close.partition("'")[2].partition("'")[0]
        own = f"{prefix}.{name}" if prefix else name
        found = ([own] if name in fields else [key for key in known if key.rpartition(".")[2] == name][:3]) if name else []
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a tree of models, dotted, those of tables with free names left out."""
    found = []
    for name, field in model.model_fields.items():
        found.append(f"{prefix}{name}")
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and not isinstance(inner, types.GenericAlias) and issubclass(inner, BaseModel):
                found += dotted_keys(inner, f"{prefix}{name}.")
    return found


def _wording(item: Mapping[str, Any], model: Any) -> str:
    if item["type"] in KINDS:
        return KINDS[item["type"]].format(**item.get("ctx", {}))
    if item["type"] in ("model_type", "model_attributes_type"):
        examples = {name: field.default for name, field in getattr(model, "model_fields", {}).items() if isinstance(field.default, int | float | str)}
        name, value = next(((name, value) for name, value in examples.items() if value != ""), ("key", "value"))
        return f"must be a mapping of keys, e.g. {{{name}: {EXAMPLES.get(name, value)}}}"
    return str(item["msg"]).removeprefix("Value error, ")


EXAMPLES = {"rank": 8}


def _type_at(model: type[BaseModel], loc: Sequence[int | str]) -> Any:
    current: Any = model
    for part in loc:
        field = getattr(current, "model_fields", {}).get(part)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else getattr(current, "__args__", ())
        current = next((o for o in options if isinstance(o, type) and not isinstance(o, types.GenericAlias) and issubclass(o, BaseModel)), current)
    return current


def short(value: Any) -> str:
    """A value for a sentence, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
