"""What a run will need: memory by role, seconds by phase, disk, money. Arithmetic over opd.preflight.memory and .speed; nothing is loaded."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch

from opd.build.devices import chunk_bytes_from, free_bytes
from opd.build.served import tensor_parallel
from opd.build.student import absent_teachers, answer_tokens
from opd.build.system import learner_kind, objective_of
from opd.build.views import OTHERS
from opd.config.recipe import Recipe
from opd.config.spending import Prices
from opd.objective import Objective
from opd.preflight.facts import Facts
from opd.preflight.memory import ModelFacts, engine_memory, learner_memory, model_facts, sync_buffers, teacher_memory
from opd.preflight.speed import (
    CPU,
    CPU_LAYER_SECONDS,
    CPU_SHARE,
    DECODING_SHARE,
    LAYER_SECONDS,
    Device,
    Load,
    find_device,
    learning_seconds,
    rollout_seconds,
    scoring_seconds,
    share,
)  # fmt: skip
from opd.source import parse_source

__all__ = ["Device", "Plan", "find_device", "make_plan"]
WHILE_WORKING = ("activations", "head", "cache", "logits", "vLLM")
"""Parts of a role's memory that it gives back when its phase ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """memory: role -> part -> bytes on the fullest process or device, if every answer reaches sampling.max_tokens. seconds: phase -> a step.

    apart: the same of roles on GPUs of their own (vLLM actors), each of so many GPUs. ranks: learner processes, each on a device that holds `memory`.
    steps: until the first stop rule. evaluation: seconds of all evaluations. activations: bytes without and with gradient checkpointing.
    host: bytes that a rank keeps off its GPU. sequence: bytes of the longest sequence in an actor's cache, by role. teacher_tokens: of the run.
    checkpoint, disk: bytes of one, and of the run folder at its largest. assumed: in words.
    """

    device: Device
    memory: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]
    steps: int
    checkpoint: int
    answer_tokens: float
    disk: int = 0
    ranks: int = 1
    apart: Mapping[str, tuple[int, Mapping[str, int]]] = field(default_factory=dict)
    sequence: Mapping[str, int] = field(default_factory=dict)
    activations: tuple[int, int] = (0, 0)
    host: int = 0
    evaluation: float = 0.0
    prices: Prices = field(default_factory=Prices)
    teacher_tokens: float = 0.0
    assumed: Sequence[str] = ()

    @property
    def bytes(self) -> int:
        """The peak: what stays, and the most that any one role needs while it works, since roles of one process take turns."""
        working = [sum(size for part, size in parts.items() if part in WHILE_WORKING) for parts in self.memory.values()]
        return sum(sum(parts.values()) for parts in self.memory.values()) - sum(working) + max(working)

    @property
    def gpus(self) -> int:
        return self.ranks + sum(count for count, _ in self.apart.values())

    @property
    def hours(self) -> float:
        """Of all steps; evaluation not counted."""
        return self.steps * sum(self.seconds.values()) / 3600

    @property
    def money(self) -> float:
        """Of steps and evaluations by `prices`; 0 where nothing is priced."""
        p, hours = self.prices, self.hours + self.evaluation / 3600
        each = p.device_hour + p.kilowatt_hour * p.watts / 1000
        return each * (p.devices or self.gpus) * hours + p.teacher_million * self.teacher_tokens / 1e6


def make_plan(facts: Facts, device: Device) -> Plan:
    """The plan of a recipe whose parts could all be read: roles in the learner's processes share its device, vLLM's have their own."""
    r, dtype = facts.recipe, getattr(torch, facts.recipe.model.dtype)
    objective = facts.objective or objective_of(r)
    lora = {"lora_rank": r.model.lora.rank, "targets": r.model.lora.targets} if r.model.lora else {}
    student = model_facts(facts.config, dtype, **lora)
    ranks, on_cpu = r.learner.ranks * r.launch.nodes, device.name == CPU
    longest = max(facts.prompt_lengths or (r.data.max_prompt_tokens,)) + answer_tokens(r)
    load = _load(facts, ranks, on_cpu)
    teachers = {name: model_facts(config, dtype) for name, config in facts.teachers.items()}
    teachers |= {name: student for name, (kind, _) in facts.weights.items() if kind not in OTHERS}
    asked = {name: needs for name, needs in objective.needs.signals.items() if name not in absent_teachers(r)}
    served = {name: teachers[name] for name in asked if facts.weights.get(name, ("",))[0] == "served" and name in teachers}
    actors = _actors(r, device, student, served)
    apart = _apart(r, device, actors)
    near = {name: needs for name, needs in asked.items() if f"teacher {name}" not in apart}
    micro = min(r.learner.token_budget, load.answers * longest)
    memory, activations, host = _learner(r, facts, student, device, micro)
    memory |= _engine(r, student, device, rows=min(load.answers, max(1, r.engine.token_budget // longest)), longest=longest)
    for name, needs in near.items():
        kind = facts.weights.get(name, ("frozen", None))[0]
        own = kind in OTHERS or (kind == "frozen" and r.model.lora is None)
        memory[f"teacher {name}"] = teacher_memory(
            teachers.get(name, student), own_weights=own, micro_tokens=min(_scored_at_once(r, own), load.answers * longest),
            num_tokens=round(load.answers * load.answer), hidden=needs.hidden, chunk_bytes=0,
        )  # fmt: skip
    speak = _speaker(r, student, device, longest)
    whole = replace(load, answers=load.answers * ranks)
    hint = {name: mean(facts.text_lengths) if facts.text_lengths and r.signals[name].view != "plain" else 0.0 for name in asked}
    learn = learning_seconds(student, device, load, budget=micro, checkpointing=r.model.gradient_checkpointing)
    seconds = {
        "rollout": 0.0 if _only_data(r) else speak(load),
        "teacher": sum(
            scoring_seconds(teachers.get(name, student), device, load if name in near else whole, hint=hint[name],
                            budget=_scored_at_once(r, True), compiled=name not in near,
                            gpus=actors[f"teacher {name}"][1] if f"teacher {name}" in actors else 1) for name in asked
        ),
        "learn": learn * r.updates.epochs,
    } | ({"prepare": learn / (4 if r.model.gradient_checkpointing else 3)} if _prepares(r, objective) else {})  # fmt: skip
    scored = sum(load.prompt + hint[name] + load.answer for name in asked)
    steps = _steps(r, seconds, whole, scored, ranks + sum(count for count, _ in apart.values()))
    checkpoint = student.parameters * student.item + student.trainable * (16 if _averages(facts) else 12)
    kept = r.checkpoint.keep + r.checkpoint.best + 1  # one more while the newest is written
    return Plan(
        device=device, memory=memory, seconds=seconds, steps=steps, checkpoint=checkpoint, answer_tokens=load.answer, ranks=ranks, apart=apart,
        disk=kept * checkpoint + student.parameters * student.item, activations=activations, host=host, prices=r.prices,
        sequence={role: longest * model.cache_per_token // shards for role, (_, shards, model) in actors.items()},
        evaluation=_evaluation(r, steps, load, ranks, speak),
        teacher_tokens=steps * whole.answers * scored,
        assumed=_assumed(r, facts, student, device, load),
    )  # fmt: skip


def _load(facts: Facts, ranks: int, on_cpu: bool) -> Load:
    r = facts.recipe
    answer = min(float(r.sampling.max_tokens), mean(facts.text_lengths) + 1 if facts.text_lengths else r.sampling.max_tokens)
    decoded = min(r.sampling.max_tokens, max(facts.text_lengths) + 1) if on_cpu and facts.text_lengths else answer
    return Load(
        answers=-(-r.rollout.prompts * r.group // ranks), group=r.group, prompt=mean(facts.prompt_lengths or (r.data.max_prompt_tokens,)),
        answer=answer, decoded=decoded,
    )  # fmt: skip


def _learner(r: Recipe, facts: Facts, student: ModelFacts, device: Device, micro: int) -> tuple[dict[str, dict[str, int]], tuple[int, int], int]:
    """(the libraries' and the learner's memory, its activations without and with checkpointing, bytes of a rank on the host)."""
    deepspeed, on_cpu = learner_kind(r) == "deepspeed", device.name == CPU
    stage = r.learner.zero_stage if deepspeed else 0
    options = {
        "ranks": r.learner.ranks * r.launch.nodes, "zero_stage": stage, "micro_tokens": micro, "chunk_bytes": _chunk_bytes(r, device),
        "average": _averages(facts),
    }  # fmt: skip
    plain, recomputed = (learner_memory(student, checkpointing=checkpointing, **options) for checkpointing in (False, True))
    chosen = dict(recomputed if r.model.gradient_checkpointing else plain)
    host = chosen["optimizer"] if r.learner.offload and not on_cpu else 0
    chosen["optimizer"] -= host
    if deepspeed:
        colocated = r.engine.kind == "vllm" and r.engine.placement == "colocated" and not on_cpu
        transfer = "" if r.engine.kind != "vllm" else "ipc" if r.engine.transfer == "auto" and colocated else r.engine.transfer
        chosen["sync buffers"] = sync_buffers(student, zero_stage=stage, transfer=transfer)
    libraries = {"this process": _resident() if on_cpu else 2 * 10**9}
    return {"libraries": libraries, "learner": chosen}, (plain["activations"], recomputed["activations"]), host


def _averages(facts: Facts) -> bool:
    return any(kind == "ema" for kind, _ in facts.weights.values())


def _engine(r: Recipe, student: ModelFacts, device: Device, *, rows: int, longest: int) -> dict[str, dict[str, int]]:
    """The memory of what answers, where it is on the learner's device."""
    if r.engine.kind == "vllm" and device.name != CPU:
        if r.engine.placement != "colocated":
            return {}
        return {"engine": {"vLLM": round(r.engine.memory_share * device.memory)}}  # weights too go to the host while it sleeps
    own_weights = (learner_kind(r) == "deepspeed" and r.learner.zero_stage == 3) or r.engine.kind == "process"
    return {"engine": engine_memory(student, rows=rows, tokens=longest, own_weights=own_weights)}


def _actors(r: Recipe, device: Device, student: ModelFacts, served: Mapping[str, ModelFacts]) -> dict[str, tuple[int, int, ModelFacts]]:
    """Role -> (GPUs, GPUs that share one model, model) of vLLM's actors that have GPUs of their own; none are planned on a CPU."""
    if device.name == CPU:
        return {}
    found = {f"teacher {name}": (tensor_parallel(r, name), tensor_parallel(r, name), model) for name, model in served.items()}
    if r.engine.kind == "vllm" and r.engine.placement == "separate":
        found["engine"] = (r.engine.num_gpus, r.engine.tensor_parallel, student)
    return found


def _apart(r: Recipe, device: Device, actors: Mapping[str, tuple[int, int, ModelFacts]]) -> dict[str, tuple[int, Mapping[str, int]]]:
    """Role -> (GPUs, bytes by part on each) of these actors, which fill engine.memory_share of a GPU."""
    room, split = round(r.engine.memory_share * device.memory), {role: m.parameters * m.item // shards for role, (_, shards, m) in actors.items()}
    return {role: (count, {"weights": split[role], "cache": max(0, room - split[role])}) for role, (count, _, _) in actors.items()}


def _speaker(r: Recipe, student: ModelFacts, device: Device, longest: int) -> Callable[[Load], float]:
    """Seconds that a load of one rank takes to answer, by the recipe's engine."""
    if r.engine.kind != "vllm" or device.name == CPU:
        rows = max(1, r.engine.token_budget // longest)
        return lambda load: rollout_seconds(student, device, load, rows=rows)
    e, ranks = r.engine, r.learner.ranks * r.launch.nodes
    room = e.memory_share * device.memory - student.parameters * student.item / e.tensor_parallel
    rows = max(1, int(room * e.tensor_parallel // max(1, longest * student.cache_per_token)))

    def speak(load: Load) -> float:
        shared = replace(load, answers=-(-load.answers * ranks // e.replicas))
        return rollout_seconds(student, device, shared, rows=rows, compiled=True, gpus=e.tensor_parallel)

    return speak


def _steps(r: Recipe, seconds: Mapping[str, float], whole: Load, scored: float, devices: int) -> int:
    """Steps until the first stop rule, of those that can be foreseen. scored: teachers' tokens an answer."""
    learned = whole.answers * (whole.prompt + whole.answer) * r.updates.epochs
    a_step = {
        "generated_tokens": 0.0 if _only_data(r) else whole.answers * whole.answer, "teacher_tokens": whole.answers * scored,
        "learner_tokens": learned, "scored_tokens": whole.answers * scored + learned, "seconds": sum(seconds.values()),
        "device_seconds": (r.prices.devices or devices) * sum(seconds.values()),
    }  # fmt: skip
    limits = r.budget.limits()
    return min([r.steps, *(math.ceil(limits[name] / spent) for name, spent in a_step.items() if name in limits and spent)])


def _evaluation(r: Recipe, steps: int, load: Load, ranks: int, speak: Callable[[Load], float]) -> float:
    """Seconds of all evaluations: on dev before, during and after training, on test at every temperature."""
    ev = r.eval

    def of(problems: int, samples: int) -> float:
        return speak(replace(load, answers=-(-problems * samples // ranks), group=samples)) if problems else 0.0

    times = (steps // ev.every + bool(steps % ev.every) if ev.every else 1) + ev.before
    return times * of(ev.num_problems, ev.samples) + sum(of(ev.final_problems, ev.final_samples if t else 1) for t in ev.temperatures)


def _assumed(r: Recipe, facts: Facts, student: ModelFacts, device: Device, load: Load) -> tuple[str, ...]:
    asked = f"answers of {load.answer:.0f} tokens ({'as the texts of the data' if facts.text_lengths else 'sampling.max_tokens'})" + (
        ", none discarded by the filter" if r.rollout.filter != "none" else ""
    )
    if device.name == CPU:
        return asked, f"{CPU_SHARE:.0%} of this CPU's speed, {1000 * CPU_LAYER_SECONDS:g} ms a layer and token at least, a CPU without other work"
    return (
        asked,
        f"{share(device, student.hidden):.0%} of the stated arithmetic at the student's width, {DECODING_SHARE:.0%} of the bandwidth, "
        + (f"{1000 * LAYER_SECONDS:g} ms a layer and pass at least" if r.engine.kind != "vllm" else "vLLM's passes without such a least time")
        + ": fitted to Qwen3-0.6B's shape on one H200, extrapolated from there",
    )


def _scored_at_once(r: Recipe, own: bool) -> int:
    """Tokens of a teacher's pass; one with weights of its own keeps nothing to learn from and reads twice as many."""
    return r.learner.token_budget * (2 if own else 1)


def _prepares(r: Recipe, objective: Objective) -> bool:
    """Whether the student reads its own answers once before it learns from them."""
    needs, updates = objective.needs, r.updates.minibatches * r.updates.epochs
    return bool(needs.student_topk or needs.entropy or needs.own_logp or (needs.old_logp and updates > 1))


def _only_data(r: Recipe) -> bool:
    """Whether every answer comes from the data: nothing is generated."""
    mixture = parse_source(r.rollout.source)
    return mixture.student == 0 and not mixture.view and mixture.schedule is None


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _chunk_bytes(recipe: Recipe, device: Device) -> int:
    """What a run on the device will choose, there being nothing else on a GPU."""
    if recipe.learner.chunk_bytes != "auto":
        return recipe.learner.chunk_bytes
    on_cpu = device.name == CPU
    return chunk_bytes_from(free_bytes(torch.device("cpu")) if on_cpu else device.memory, "cpu" if on_cpu else "cuda")
