"""Who draws the tokens of an answer: the student, the teacher, or both token by token (recipe key rollout.sampler)."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from opd_rollout import mixing

from opd.config.choices import Count, Share, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """The signal whose model draws with the student, and how the two distributions become one."""

    signal: str
    mix: mixing.Mix


def mixture(*, share: Share = 0.2, signal: str = "main") -> Sampler:
    """share * teacher + (1 - share) * student (MiniLLM, arXiv 2306.08543)."""
    return Sampler(signal=signal, mix=partial(mixing.mixture, share=share))


def interleave(*, k: Count = 25, signal: str = "main") -> Sampler:
    """The student's token where it is among the teacher's k likeliest, else the teacher's (SKD, arXiv 2410.11325)."""
    return Sampler(signal=signal, mix=partial(mixing.interleave, k=k))


def teacher(*, signal: str = "main") -> Sampler:
    """The teacher alone."""
    return Sampler(signal=signal, mix=mixing.teacher_only)


SAMPLERS = {"mixture": mixture, "interleave": interleave, "teacher": teacher}


def parse_sampler(choice: Any) -> Sampler | None:
    """None for `student`. Raises ValueError for anything that is neither that nor in SAMPLERS."""
    if choice == "student":
        return None
    return resolve(choice, SAMPLERS, "rollout.sampler (student, or one of these)")()
