"""`opd check RECIPE`: findings and plan of a recipe, as text. No GPU and no weights; seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opd.config.load import parse_overrides, refuse_method
from opd.config.recipe import Recipe
from opd.config.stages import read_stages
from opd.preflight.checks import CHECKS, disk, error, run_folder
from opd.preflight.facts import Finding, gather
from opd.preflight.outlines import outlined
from opd.preflight.plan import Plan, find_device, make_plan


def check(reference: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> bool:
    """Prints what is wrong with a recipe (every stage of it) and what it will need; true when nothing would stop it.

    The override device=h100 plans for that card instead of this machine's CPU. Raises ValueError for a recipe that cannot be read at all.
    """
    changes = parse_overrides(overrides)
    device = str(changes.pop("device", ""))
    clean = True
    refuse_method(reference, changes)
    stages = read_stages(reference, changes)
    to_come = {f"runs/{stage.name}" for stage in stages}
    for recipe in stages:
        starts_later = recipe.init in to_come  # from a stage that this file trains first: the same architecture
        found, plan = examine(recipe, device, starts_later=starts_later)
        print(render(recipe, found, plan, recipe.name or Path(reference).stem), end="")
        clean &= is_clean(found)
    return clean


def is_clean(found: Sequence[Finding]) -> bool:
    """Whether nothing would stop the run."""
    return not any(finding.severity == "error" for finding in found)


def examine(recipe: Recipe, device: str = "", *, starts_later: bool = False) -> tuple[list[Finding], Plan | None]:
    """All findings, gravest first, and the plan where the model's configuration could be read, for `device` or else the recipe's own target.

    starts_later: its `init` is still to be trained, and has the architecture of model.path.
    """
    found = list(run_folder(recipe))
    if starts_later:
        recipe = recipe.model_copy(update={"init": ""})
    if device:
        recipe = recipe.model_copy(update={"target": recipe.target.model_copy(update={"device": "" if device == "cpu" else device})})
    with outlined(recipe) as (judged, to_come, names):
        facts, of_parts = gather(judged)
        found += [*to_come, *(_named(finding, names) for finding in (*of_parts, *(one for look in CHECKS for one in look(facts))))]
    plan = None
    if facts.config is not None and facts.objective is not None:
        plan = make_plan(facts, find_device(recipe.target.device, getattr(torch, recipe.model.dtype)))
        found += disk(facts, plan.disk, plan.checkpoint)
        if plan.bytes > plan.device.memory:
            found.append(error(_too_much(plan)))
        found += [
            error(f"{role}: weights of {_size(parts['weights'])} exceed engine.memory_share={recipe.engine.memory_share:g} of {plan.device.name}")
            for role, (_, parts) in plan.apart.items()
            if parts["weights"] > recipe.engine.memory_share * plan.device.memory
        ]
        found += [
            error(
                f"{role}: beside its weights {_size(parts['cache'])} of a GPU are left for the cache (engine.memory_share="
                f"{recipe.engine.memory_share:g}), and one sequence of the longest prompt and sampling.max_tokens takes "
                f"{_size(plan.sequence[role])}: lower sampling.max_tokens, or take a larger GPU"
            )
            for role, (_, parts) in plan.apart.items()
            if 0 < parts["cache"] < plan.sequence[role]
        ]
    order = ("error", "warning", "note")
    return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.severity)), plan


def _named(finding: Finding, names: Mapping[str, str]) -> Finding:
    """The finding with the names that the recipe gives to folders."""
    sentence = finding.sentence
    for folder, name in names.items():
        sentence = sentence.replace(folder, name)
    return replace(finding, sentence=sentence)


def _too_much(plan: Plan) -> str:
    role, parts = max(plan.memory.items(), key=lambda item: sum(item[1].values()))
    part = max(parts, key=lambda name: parts[name])
    return (
        f"the plan needs {_size(plan.bytes)}, {plan.device.name} has {_size(plan.device.memory)}; the largest part is {role}: {part} "
        f"({_size(parts[part])}): {REMEDIES.get(part, 'take a smaller model')}"
    )


REMEDIES = {
    "activations": "lower learner.token_budget, or model.gradient_checkpointing=true",
    "optimizer": "train LoRA adapters (model.lora={rank: 32}), more ranks with learner.zero_stage=2, or learner.offload=true",
    "gradients": "train LoRA adapters (model.lora={rank: 32}), or more ranks with learner.zero_stage=2",
    "weights": "model.dtype=bfloat16, LoRA (its frozen teacher is no second copy), or more ranks with learner.zero_stage=3",
    "cache": "lower engine.token_budget",
    "vLLM": "lower engine.memory_share",
    "average": "teacher=frozen keeps no average, or LoRA",
    "hand-over": "a support of top-k instead of full, or fewer answers a step",
}


def render(recipe: Recipe, found: Sequence[Finding], plan: Plan | None, name: str) -> str:
    """The findings, then tables of memory and time."""
    lines = [f"{name}: " + (_count(found) or "nothing to complain of")]
    lines += [f"  {finding.severity:8}{finding.sentence}" for finding in found]
    if plan is None:
        return "\n".join([*lines, "  no plan: the model's configuration or the objective could not be read", ""])
    lines.append(f"  memory on {plan.device.name}: {_size(plan.bytes)} of {_size(plan.device.memory)} (roles take turns: not the sum of the rows)")
    for role, parts in plan.memory.items():
        shown = ", ".join(f"{part} {_size(size)}" for part, size in parts.items() if size)
        lines.append(f"    {role:14}{_size(sum(parts.values())):>10}   {shown}")
    plain, recomputed = map(_size, plan.activations)
    lines.append(f"    activations of the learner: {plain}, with model.gradient_checkpointing {recomputed}")
    if plan.host:
        lines.append(f"    on the host   {_size(plan.host):>10}   a rank: the optimizer (learner.offload)")
    for role, (count, parts) in plan.apart.items():
        shown = ", ".join(f"{part} {_size(size)}" for part, size in parts.items() if size)
        lines.append(f"    {role:14}{_size(sum(parts.values())):>10}   on {count} GPU{'s' if count > 1 else ''} of its own: {shown}")
    if plan.gpus > 1:
        lines.append(f"  devices: {plan.ranks} learner rank{'s' if plan.ranks > 1 else ''} with the rows above each, {plan.gpus} in all")
    total = sum(plan.seconds.values())
    phases = ", ".join(f"{phase} {in_time(seconds)}" for phase, seconds in plan.seconds.items() if seconds)
    steps = [f"{in_time(total)} a step ({phases}); {in_time(3600 * plan.hours)} for {plan.steps} steps"] if plan.steps else []
    evaluations = [f"{in_time(plan.evaluation)} for evaluations"] if plan.evaluation else []
    lines.append(f"  time: about {' and '.join(steps + evaluations) or 'nothing'}")
    if plan.money:
        devices = recipe.prices.devices or plan.gpus
        lines.append(f"  money: about {plan.money:.3g} {recipe.prices.currency} for {devices} device{'s' * (devices > 1)} by `prices`")
    lines.append(f"  disk: {_size(plan.checkpoint)} a checkpoint, {_size(plan.disk)} at most with the model")
    lines.append(f"  assumed: {'; '.join(plan.assumed)}")
    return "\n".join(lines) + "\n"


def _count(found: Sequence[Finding]) -> str:
    counts = {severity: sum(finding.severity == severity for finding in found) for severity in ("error", "warning", "note")}
    return ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in counts.items() if count)


def in_time(seconds: float) -> str:
    """Two digits, in the unit that suits."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{_digits(1000 * seconds)} ms"


def _digits(number: float) -> str:
    return f"{number:.2g}" if number < 99.5 else f"{number:.0f}"


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
