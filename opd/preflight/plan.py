"""What a run will need: memory by role, seconds a step by phase, disk. Arithmetic over opd.preflight.memory; nothing is loaded."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch

from opd.build.devices import chunk_bytes_from, free_bytes
from opd.build.student import absent_teachers
from opd.build.system import learner_kind, objective_of
from opd.build.views import OTHERS
from opd.config.choices import nearest
from opd.config.recipe import Recipe
from opd.objective import Objective
from opd.preflight.facts import Facts
from opd.preflight.memory import ModelFacts, engine_memory, learner_memory, model_facts, teacher_memory
from opd.source import parse_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """flops: dense bf16 multiply-adds counted twice, a second; bandwidth: bytes a second; memory: bytes. As the maker states them."""

    name: str
    flops: float
    bandwidth: float
    memory: int


WHILE_WORKING = ("activations", "head", "cache", "logits", "vLLM")
"""Parts of a role's memory that it gives back when its phase ends."""

DEVICES = {
    "a100": Device(name="A100 80 GB", flops=312e12, bandwidth=2.0e12, memory=80 * 10**9),
    "h100": Device(name="H100 SXM 80 GB", flops=989e12, bandwidth=3.35e12, memory=80 * 10**9),
    "h200": Device(name="H200 141 GB", flops=989e12, bandwidth=4.8e12, memory=141 * 10**9),
    "l40s": Device(name="L40S 48 GB", flops=362e12, bandwidth=0.864e12, memory=48 * 10**9),
}
TRAINING_SHARE, SCORING_SHARE, DECODING_SHARE = 0.4, 0.5, 0.6
"""Assumed shares of a GPU's stated arithmetic (training, scoring) and bandwidth (decoding) that a run reaches."""
LAYER_SECONDS = 4e-4
"""Assumed least time of a layer for one token when a GPU runs the Hugging Face module as it is: starting its kernels takes longer than they run."""
CPU_SHARE = 0.35
"""Share of a large product's speed that small models reach on a CPU, from runs of the embedded recipes."""
CPU_LAYER_SECONDS = 1.5e-3
"""The same least time on one core of a CPU, from runs of the embedded recipes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """memory: role -> part -> bytes on the fullest process or device, if every answer reaches sampling.max_tokens. seconds: phase -> a step.

    apart: the same of roles on GPUs of their own (vLLM actors), each of so many GPUs. ranks: learner processes, each on a device that holds `memory`.
    price: of a GPU and hour, 0 unknown. checkpoint: bytes of one. assumed: in words.
    """

    device: Device
    memory: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]
    steps: int
    checkpoint: int
    answer_tokens: float
    ranks: int = 1
    apart: Mapping[str, tuple[int, Mapping[str, int]]] = field(default_factory=dict)
    price: float = 0.0
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
    def money(self) -> float:
        """Of all GPUs for all steps; 0 where no price is known."""
        return self.price * self.gpus * self.hours

    @property
    def hours(self) -> float:
        return self.steps * sum(self.seconds.values()) / 3600


def find_device(name: str, dtype: torch.dtype) -> Device:
    """A GPU by name, or this machine's CPU, whose speed is measured for a moment. Raises ValueError with the nearest name."""
    if name in DEVICES:
        return DEVICES[name]
    if name not in ("", "cpu"):
        raise ValueError(f"device={name}: no figures for it{nearest(name, DEVICES)}; known: cpu, {', '.join(DEVICES)}")
    a = torch.ones(768, 768, dtype=dtype)
    started, taken = time.perf_counter(), []
    while time.perf_counter() - started < 0.2 or len(taken) < 3:
        before = time.perf_counter()
        a @ a
        taken.append(time.perf_counter() - before)
    flops = 2 * 768**3 / min(taken)  # the fastest one, which other work on the machine has not slowed down
    return Device(name="this CPU", flops=flops, bandwidth=2e10, memory=_machine_memory())


def make_plan(facts: Facts, device: Device) -> Plan:
    """The plan of a recipe whose parts could all be read: roles in the learner's processes share its device, vLLM's have their own."""
    r, dtype = facts.recipe, getattr(torch, facts.recipe.model.dtype)
    objective = facts.objective or objective_of(r)
    student = model_facts(facts.config, dtype, lora_rank=r.model.lora.rank if r.model.lora else 0)
    ranks = r.learner.ranks * r.launch.nodes
    answers, prompt = -(-r.rollout.prompts * r.group // ranks), mean(facts.prompt_lengths or (r.data.max_prompt_tokens,))
    answer = min(float(r.sampling.max_tokens), mean(facts.solution_lengths) + 1 if facts.solution_lengths else r.sampling.max_tokens)
    longest = max(facts.prompt_lengths or (r.data.max_prompt_tokens,)) + r.sampling.max_tokens
    deepspeed = learner_kind(r) == "deepspeed"
    on_cpu = device.name == "this CPU"
    teachers = {name: model_facts(config, dtype) for name, config in facts.teachers.items()}
    teachers |= {name: student for name, (kind, _) in facts.weights.items() if kind not in OTHERS}
    micro = min(r.learner.token_budget, answers * longest)
    memory = {
        "libraries": {"this process": _resident() if on_cpu else 2 * 10**9},
        "learner": learner_memory(
            student, ranks=ranks, zero_stage=r.learner.zero_stage if deepspeed else 0, checkpointing=r.model.gradient_checkpointing,
            average=any(kind == "ema" for kind, _ in facts.weights.values()), micro_tokens=micro, chunk_bytes=_chunk_bytes(r, device),
        ),
        "engine": engine_memory(
            student, rows=min(answers, max(1, r.engine.token_budget // longest)), tokens=longest,
            own_weights=deepspeed and r.learner.zero_stage == 3 or r.engine.kind == "process",
        ),
    }  # fmt: skip
    asked = {name: needs for name, needs in objective.needs.signals.items() if name not in absent_teachers(r)}
    apart = _apart(r, device, student, {name: teachers[name] for name in asked if facts.weights.get(name, ("",))[0] == "served" and name in teachers})
    if r.engine.kind == "vllm" and not on_cpu:
        del memory["engine"]
        if r.engine.placement == "colocated":
            memory["engine"] = {"vLLM": round(r.engine.memory_share * device.memory)}  # weights too go to the host while it sleeps
    near = {name: needs for name, needs in asked.items() if f"teacher {name}" not in apart}
    for name, needs in near.items():
        kind = facts.weights.get(name, ("frozen", None))[0]
        memory[f"teacher {name}"] = teacher_memory(
            teachers.get(name, student), own_weights=kind in OTHERS or (kind == "frozen" and r.model.lora is None),
            micro_tokens=min(r.learner.token_budget, answers * longest), num_tokens=round(answers * answer), hidden=needs.hidden, chunk_bytes=0,
        )  # fmt: skip
    scored = [teachers.get(name, student) for name in near] + [teachers[name] for name in asked if name not in near] * ranks
    decoded = min(r.sampling.max_tokens, max(facts.solution_lengths) + 1) if on_cpu and facts.solution_lengths else answer
    seconds = _of_recipe(r, objective, _seconds(student, scored, device, answers, prompt, answer, decoded, r.group, r.model.gradient_checkpointing))
    state = 8 + (4 if student.item < 4 else 0)
    return Plan(
        device=device,
        memory=memory,
        seconds=seconds,
        steps=r.steps,
        checkpoint=student.parameters * student.item + student.trainable * (state + student.item),
        answer_tokens=answer,
        ranks=ranks,
        apart=apart,
        price=r.prices.device_hour,
        assumed=(
            f"answers of {answer:.0f} tokens ({'as the reference solutions' if facts.solution_lengths else 'sampling.max_tokens'})",
            f"{CPU_SHARE:.0%} of this CPU's speed, {1000 * CPU_LAYER_SECONDS:g} ms a layer and token at least, a CPU without other work" if on_cpu
            else f"{TRAINING_SHARE:.0%} of the stated arithmetic in training, {SCORING_SHARE:.0%} in scoring, {DECODING_SHARE:.0%} of the bandwidth, "
            f"{1000 * LAYER_SECONDS:g} ms a layer and token at least",
        ),
    )  # fmt: skip


def _apart(r: Recipe, device: Device, student: ModelFacts, served: Mapping[str, ModelFacts]) -> dict[str, tuple[int, Mapping[str, int]]]:
    """Role -> (GPUs, bytes by part on each) of vLLM's actors, which fill engine.memory_share of a GPU; none are planned on a CPU."""
    if device.name == "this CPU":
        return {}
    e, room = r.engine, round(r.engine.memory_share * device.memory)
    models = {f"teacher {name}": (1, model) for name, model in served.items()}
    if e.kind == "vllm" and e.placement == "separate":
        models["engine"] = (e.replicas * e.tensor_parallel, student)
    split = {role: model.parameters * model.item // (e.tensor_parallel if role == "engine" else 1) for role, (_, model) in models.items()}
    return {role: (count, {"weights": split[role], "cache": max(0, room - split[role])}) for role, (count, _) in models.items()}


def _of_recipe(r: Recipe, objective: Objective, seconds: Mapping[str, float]) -> dict[str, float]:
    """The seconds with a pass over the answers before learning where the objective asks for one, and without rollouts where none are made."""
    prepare = {"prepare": seconds["learn"] / (4 if r.model.gradient_checkpointing else 3)} if _prepares(r, objective) else {}
    return {**seconds, **prepare, **({"rollout": 0.0} if _only_data(r) else {})}


def _prepares(r: Recipe, objective: Objective) -> bool:
    """Whether the student reads its own answers once before it learns from them."""
    needs, updates = objective.needs, r.updates.minibatches * r.updates.epochs
    return bool(needs.student_topk or needs.entropy or needs.own_logp or (needs.old_logp and updates > 1))


def _only_data(r: Recipe) -> bool:
    """Whether every answer comes from the data: nothing is generated."""
    mixture = parse_source(r.rollout.source)
    return mixture.student == 0 and not mixture.view and mixture.schedule is None


def _seconds(
    student: ModelFacts,
    scored: Sequence[ModelFacts],
    device: Device,
    answers: int,
    prompt: float,
    answer: float,
    decoded: float,
    group: int,
    checkpointing: bool,
) -> dict[str, float]:
    """Seconds a step by phase: 2 operations a parameter and token forward, 4 backward, 2 more where the forward is repeated.

    decoded: tokens that are generated one after the other, those of the longest answer.
    """
    on_cpu = device.name == "this CPU"
    training, scoring = (CPU_SHARE, CPU_SHARE) if on_cpu else (TRAINING_SHARE, SCORING_SHARE)
    prefill = 2 * student.parameters * (answers / group) * prompt / (device.flops * scoring)
    a_token = max(
        2 * student.parameters * answers / (device.flops * scoring), student.parameters * student.item / (device.bandwidth * DECODING_SHARE)
    )
    a_token = max(a_token, student.layers * (CPU_LAYER_SECONDS if on_cpu else LAYER_SECONDS))
    tokens = answers * (prompt + answer)
    return {
        "rollout": prefill + decoded * a_token,
        "teacher": sum(2 * model.parameters * tokens / (device.flops * scoring) for model in scored),
        "learn": (8 if checkpointing else 6) * student.parameters * tokens / (device.flops * training),
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _chunk_bytes(recipe: Recipe, device: Device) -> int:
    """What a run on the device will choose, there being nothing else on a GPU."""
    if recipe.learner.chunk_bytes != "auto":
        return recipe.learner.chunk_bytes
    on_cpu = device.name == "this CPU"
    return chunk_bytes_from(free_bytes(torch.device("cpu")) if on_cpu else device.memory, "cpu" if on_cpu else "cuda")


def _machine_memory() -> int:
    return int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")).split()[1]) * 1024
