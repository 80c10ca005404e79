"""What a run has spent, as values: tokens by who handled them, seconds, devices; and what that comes to in energy and money.

Everything here is of training; evaluation has a counter of its own, because arms that are examined alike would pay alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

ROLE_PHASES: Mapping[str, tuple[str, ...]] = {
    "student": ("rollout",),
    "teacher": ("views", "teacher"),
    "learner": ("prepare", "join", "learn"),
    "sync": ("sync",),
}
AHEAD = "rollout/ahead"  # how long answers took that were written beside the steps; the phase called rollout is then what was waited for them


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Money a device-hour, a million teacher tokens and a kWh; watts that a device draws (configured, not measured). 0: not known."""

    currency: str = "USD"
    device_hour: float = 0.0
    teacher_million: float = 0.0
    watts: float = 0.0
    kilowatt_hour: float = 0.0

    @property
    def priced(self) -> bool:
        return bool(self.device_hour or self.teacher_million or self.kilowatt_hour)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Counters of a run up to some step. student: tokens of answers; auxiliary: of texts that writers wrote; evaluation: of dev evaluations.

    seconds: of training. roles: busy seconds by role, see ROLE_PHASES.
    """

    student: float = 0.0
    auxiliary: float = 0.0
    teacher: float = 0.0
    learner: float = 0.0
    evaluation: float = 0.0
    seconds: float = 0.0
    devices: int = 1
    roles: Mapping[str, float]

    @property
    def device_seconds(self) -> float:
        return self.seconds * self.devices


def from_totals(totals: Mapping[str, float], roles: Mapping[str, float], devices: int) -> Spent:
    """From the cumulative counters of a line of metrics.jsonl; those that it lacks are 0. roles: busy seconds by role."""
    auxiliary = totals.get("tokens/written", 0.0)
    return Spent(
        student=totals.get("tokens/student", 0.0) - auxiliary,
        auxiliary=auxiliary,
        teacher=totals.get("tokens/teacher", 0.0),
        learner=totals.get("tokens/learner", 0.0),
        evaluation=totals.get("tokens/evaluation", 0.0),
        seconds=totals.get("seconds/total", 0.0),
        devices=devices,
        roles=roles,
    )


def kilowatt_hours(device_seconds: float, rates: Rates) -> float:
    """From the configured draw of a device: device-seconds x watts."""
    return device_seconds * rates.watts / 3.6e6


def money(device_seconds: float, teacher_tokens: float, rates: Rates) -> float:
    """In rates.currency: devices by the hour, a teacher by the token, energy by the kWh."""
    by_device = device_seconds / 3600 * rates.device_hour
    return by_device + teacher_tokens / 1e6 * rates.teacher_million + kilowatt_hours(device_seconds, rates) * rates.kilowatt_hour


QUANTITIES: Mapping[str, tuple[str, Callable[[Spent, Rates], float]]] = {
    "generated_tokens": ("generated tokens", lambda spent, _: spent.student + spent.auxiliary),
    "auxiliary_tokens": ("auxiliary tokens", lambda spent, _: spent.auxiliary),
    "teacher_tokens": ("teacher tokens", lambda spent, _: spent.teacher),
    "learner_tokens": ("learner tokens", lambda spent, _: spent.learner),
    "scored_tokens": ("learner and teacher tokens", lambda spent, _: spent.teacher + spent.learner),
    "evaluation_tokens": ("evaluation tokens", lambda spent, _: spent.evaluation),
    "seconds": ("seconds", lambda spent, _: spent.seconds),
    "device_seconds": ("device-seconds", lambda spent, _: spent.device_seconds),
    "energy": ("kWh", lambda spent, rates: kilowatt_hours(spent.device_seconds, rates)),
    "money": ("", lambda spent, rates: money(spent.device_seconds, spent.teacher, rates)),
    **{f"{role}_seconds": (f"seconds of the {role}", lambda spent, _, role=role: spent.roles.get(role, 0.0)) for role in ROLE_PHASES},
}
"""What a stop rule may limit: its unit, and how it is computed."""


def used_up(limits: Mapping[str, float], spent: Spent, rates: Rates) -> str:
    """Which limit (see QUANTITIES) is reached, as a sentence, or ""."""
    for name, limit in limits.items():
        unit, value = QUANTITIES[name]
        if value(spent, rates) >= limit:
            shown = f"{limit:.0f}" if limit == int(limit) else f"{limit:g}"
            return f"budget of {shown} {unit or rates.currency} used"
    return ""


def role_seconds(phases: Mapping[str, float]) -> dict[str, float]:
    """Busy seconds of each role in a step, from the seconds of its phases."""
    found = {role: sum(phases.get(phase, 0.0) for phase in names) for role, names in ROLE_PHASES.items()}
    return {**found, "student": phases.get(AHEAD, found["student"])}
