"""Layouts of 8, 64 and 512 GPUs, computed, not measured: arithmetic of memory, bandwidth and compute, then opd.timing.simulate for the schedule.

python -m opd.timing.scaling        # writes the tables of docs/scaling.md
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from opd.timing.simulate import Layout, Prediction, StepCosts, predict

PAGE = Path(__file__).parents[2] / "docs/scaling.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """From the model's config.json: parameters, layers, key-value heads, head dimension, hidden size, vocabulary. gpus: of one engine replica."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    gpus: int

    @property
    def weight_bytes(self) -> float:
        """In bfloat16."""
        return 2 * self.parameters

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One GPU (NVIDIA H100 SXM data sheet) and its network card; `used` shares of the peaks are assumptions."""

    flops: float = 989e12
    bandwidth: float = 3.35e12
    memory: float = 80e9
    network: float = 50e9
    flops_used: float = 0.4
    prefill_used: float = 0.5
    bandwidth_used: float = 0.6
    memory_used: float = 0.9
    network_used: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Answers a step, their mean and longest length, the prompt, and what the teacher reads before the answer; tokens."""

    answers: int
    mean: int = 4096
    longest: int = 16384
    prompt: int = 512
    view: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """rollout, learner: GPUs of each; both are all of them where the roles take turns. offloaded: the optimiser's state is on the host."""

    gpus: int
    rollout: int
    learner: int
    offloaded: bool
    layout: Layout
    costs: StepCosts
    found: Prediction


STUDENTS = (
    Student(name="8B", parameters=8.19e9, layers=36, kv_heads=8, head_dim=128, hidden=4096, vocabulary=151936, gpus=1),
    Student(name="32B", parameters=32.8e9, layers=64, kv_heads=8, head_dim=128, hidden=5120, vocabulary=151936, gpus=4),
)
ANSWERS_A_GPU = 32
STATE_BYTES = 16  # a parameter: bfloat16 weight and gradient, fp32 master and two moments (ZeRO 3 splits them over the learner's GPUs)
OFFLOADED_BYTES = 4  # of them that stay on the GPU where the optimiser's state is on the host
HOST_UPDATES = 2e9  # parameters a second that the processors of eight GPUs update
ACTIVATIONS = 16e9  # bytes a learner GPU keeps for activations, head chunks and gathered layers
STEPS = 50


def learner_fits(student: Student, gpus: int, machine: Machine, state_bytes: int) -> bool:
    return state_bytes * student.parameters / gpus + ACTIVATIONS <= machine.memory_used * machine.memory


def decode_seconds(student: Student, batch: float, context: float, machine: Machine) -> float:
    """One token for each of `batch` answers on one replica: reading weights and cache, or the arithmetic, whichever takes longer."""
    read = student.weight_bytes + batch * context * student.cache_bytes
    bandwidth = student.gpus * machine.bandwidth * machine.bandwidth_used
    return max(read / bandwidth, 2 * student.parameters * batch / (student.gpus * machine.flops * machine.flops_used))


def step_costs(student: Student, work: Workload, rollout_gpus: int, learner_gpus: int, machine: Machine) -> StepCosts:
    """Seconds of a step's tasks. rollout_shared is what one replica would need; rollout_fixed the longest answer's tail, decoded alone."""
    replicas = rollout_gpus // student.gpus
    room = machine.memory_used * machine.memory * student.gpus - student.weight_bytes
    slots = max(1.0, min(room / (student.cache_bytes * (work.prompt + work.mean)), work.answers / replicas))
    token = decode_seconds(student, slots, work.prompt + work.mean / 2, machine) / slots
    prefill = 2 * student.parameters * work.prompt / (student.gpus * machine.flops * machine.prefill_used)
    tail = (work.longest - work.mean) * decode_seconds(student, 1, work.longest, machine)
    rate = learner_gpus * machine.flops * machine.flops_used / (2 * student.parameters)  # tokens a second of one forward pass
    tokens = work.answers * (work.prompt + work.mean)
    return StepCosts(
        rollout_shared=work.answers * (work.mean * token + prefill),
        rollout_fixed=tail,
        teacher=work.answers * (work.view + work.mean) / rate,
        learn=(4 + 1) * tokens / rate,  # forward, recomputation, backward (two), and the pass for old log-probs
        sync=sync_seconds(student, machine),
    )


def sync_seconds(student: Student, machine: Machine) -> float:
    """Gather on the learner, then a ring broadcast to all replicas, one after the other: independent of how many replicas listen."""
    return 2 * student.weight_bytes / (machine.network * machine.network_used)


def plan(student: Student, gpus: int, machine: Machine, staleness: int = 1) -> Plan:
    """The split of the GPUs with the shortest predicted step, in turns (staleness 0) included; the optimiser on the host where nothing else fits."""
    work, found = Workload(answers=ANSWERS_A_GPU * gpus), []
    for offloaded in (False, True):
        for rollout, learner, ahead in splits(gpus, student.gpus, staleness):
            if not learner_fits(student, learner, machine, OFFLOADED_BYTES if offloaded else STATE_BYTES):
                continue
            costs = step_costs(student, work, rollout, learner, machine)
            if offloaded:
                costs = replace(costs, learn=costs.learn + student.parameters / (HOST_UPDATES * learner / 8))
            layout = Layout(replicas=rollout // student.gpus, max_staleness=ahead)
            simulated = predict([costs] * STEPS, layout)
            found.append(Plan(gpus=gpus, rollout=rollout, learner=learner, offloaded=offloaded, layout=layout, costs=costs, found=simulated))
        if found:
            return min(found, key=lambda one: one.found.step)
    raise ValueError(f"a {student.name} student does not fit {gpus} GPUs, even with its optimiser on the host")


def splits(gpus: int, unit: int, staleness: int) -> Iterator[tuple[int, int, int]]:
    """(rollout GPUs, learner GPUs, staleness): in turns on all, then every split in sixteenths that leaves whole replicas."""
    yield gpus, gpus, 0
    if staleness:
        grain = max(unit, gpus // 16)
        yield from ((rollout, gpus - rollout, staleness) for rollout in range(grain, gpus, grain) if rollout % unit == 0)


def layout_table(machine: Machine = Machine()) -> str:  # noqa: B008 - frozen
    lines = [
        "| student | GPUs | rollout | learner | staleness | answers a step | rollout s | teacher s | learn s | sync s | step s "
        "| idle: rollout, learner | tokens/s a GPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for student in STUDENTS:
        for gpus in (8, 64, 512):
            p, work = plan(student, gpus, machine), Workload(answers=ANSWERS_A_GPU * gpus)
            c, turns = p.costs, p.layout.max_staleness == 0
            rollout = c.rollout_fixed + c.rollout_shared / p.layout.replicas
            learner = f"{p.learner} (optimiser on the host)" if p.offloaded else str(p.learner)
            where = f"{p.rollout // student.gpus} x {student.gpus}" + (" (in turns)" if turns else "")
            idle = "in turns" if turns else f"{100 * p.found.idle['actors']:.0f} %, {100 * p.found.idle['learner']:.0f} %"
            rate = work.answers * work.mean / p.found.step / gpus
            lines.append(
                f"| {student.name} | {gpus} | {where} | {learner} | {p.layout.max_staleness} | {work.answers} | {rollout:.0f} | {c.teacher:.0f} "
                f"| {c.learn:.0f} | {c.sync:.1f} | {p.found.step:.0f} | {idle} | {rate:.0f} |"
            )
    return "\n".join(lines)


def sync_table(machine: Machine = Machine()) -> str:  # noqa: B008 - frozen
    lines = ["| student | bytes in bf16 | gather and broadcast, s | LoRA rank 16, all linear: bytes | s |", "|---|---|---|---|---|"]
    for student in STUDENTS:
        adapter = 0.005 * student.weight_bytes
        wire = machine.network * machine.network_used
        lines.append(
            f"| {student.name} | {student.weight_bytes / 1e9:.1f} GB | {sync_seconds(student, machine):.2f} "
            f"| {adapter / 1e6:.0f} MB | {2 * adapter / wire:.4f} |"
        )
    return "\n".join(lines)


def payload_table(machine: Machine = Machine()) -> str:  # noqa: B008 - frozen
    """Bytes that an external teacher sends for one token, and for a step of 512 GPUs, by what is sent."""
    tokens = ANSWERS_A_GPU * 512 * Workload(answers=1).mean
    rows = [("sampled token alone", 4), ("top 64: id and log-prob, K x (4 + 4)", 64 * 8), ("top 256: id and log-prob", 256 * 8)]
    rows += [(f"final hidden state in bf16, {s.name}", 2 * s.hidden) for s in STUDENTS]
    rows += [("all logits in bf16", 2 * STUDENTS[0].vocabulary)]
    lines = ["| what is sent | bytes a token | a step of 16,384 answers | s over one network card |", "|---|---|---|---|"]
    for what, size in rows:
        total = size * tokens
        lines.append(f"| {what} | {size:,} | {total / 1e9:,.1f} GB | {total / (machine.network * machine.network_used):,.1f} |")
    return "\n".join(lines)


TABLES = {"layouts": layout_table, "sync": sync_table, "payloads": payload_table}


def with_tables(page: str) -> str:
    """The page with every table made anew between its markers."""
    for name, made in TABLES.items():
        assert page.count(f"<!-- {name} -->") == 1, f"the page has no place for the table {name}"
        start, end = f"<!-- {name} -->", "<!-- end -->"
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n\n{made()}\n\n{end}{rest.partition(end)[2]}"
    return page


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
