"""The records that flow through one training step, from a prompt to the learner's micro-batch.

Legend: P prompts, G samples a prompt, B = P x G sequences, T completion length, N completion tokens of a micro-batch, K support size.
Every per-token array is indexed by completion token: entry n is about predicting completion token n.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from opd_rollout.layout import TokenLayout
from opd_rollout.types import Completion, TokenScores
from torch import Tensor

Message = Mapping[str, str]  # {"role": "user", "content": "..."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question for the student; `hints` are texts that only a teacher's view may show (solution, facts, answer ...)."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    hints: Mapping[str, str] = field(default_factory=dict)
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A verifier's judgement. "abstain" and "error" leave baselines and denominators; `reward` and `correct` then mean nothing.

    parts: named components of the reward (for curves), e.g. {"answer": 1.0, "steps": 0.8}. feedback: text for feedback views.
    """

    status: Literal["score", "abstain", "error"] = "score"
    reward: float = 0.0
    correct: bool = False
    feedback: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


Verifier = Callable[[Prompt, str], Verdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One completion, its text and verdict; `group` numbers the prompt within the step, `member` the sample within its group.

    notes: what writers wrote about it, by name. marks: tokens that a writer pointed at [T] bool, by name.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completion: Completion
    text: str
    verdict: Verdict
    group: int
    member: int
    notes: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a teacher reads before the student's tokens: `messages` with the hint already in its place.

    kind: the hint's name. question: index of the message that holds the question. hint: the privileged text, the only part truncation may shorten.
    opening: text that already stands in the assistant's turn, before the student's tokens.
    """

    messages: tuple[Message, ...]
    kind: str
    hint: str = ""
    question: int = -1
    opening: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What one no-grad pass of the student at rollout weights found for one answer; None where no term asked.

    old_logp [T], entropy [T] nats; topk_ids [T, K] int64, topk_logp [T, K].
    """

    old_logp: Tensor
    entropy: Tensor
    topk_ids: Tensor | None = None
    topk_logp: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Everything the learner may know about one answer. All tensors are detached and indexed by completion token.

    scores: signal name -> TokenScores, absent where the sample has no view. advantage: term name -> [T]. route: term name -> factor.
    fields: named per-token statistics made before the step. context: the signal whose view the student itself reads here (and which then
    stands in judged.prompt_ids), "" for its own prompt.
    """

    judged: Judged
    scores: Mapping[str, TokenScores]
    advantage: Mapping[str, Tensor]
    route: Mapping[str, float]
    prepared: Prepared | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    context: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRows:
    """One signal's scores over the N tokens of a micro-batch.

    available [N] bool: false where the sample has no view (the other entries are then pads). sampled [N], entropy [N] nats.
    columns: this signal's slice of TokenRows.ids. logp [N, k]: the teacher's true log-probs at those ids; tail_logp [N] beyond them.
    hidden [N, D] for support "full", else None.
    """

    available: Tensor
    sampled: Tensor
    entropy: Tensor
    columns: slice
    logp: Tensor
    tail_logp: Tensor
    hidden: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """All that a loss reads, a row a completion token.

    token, sequence (index within the micro-batch), position (index within the completion) [N] int64; loss_mask [N] bool.
    ids [N, K] int64: column 0 is the sampled token, then every signal's columns; -1 pads.
    behaviour_logp [N] (NaN where no policy sampled); old_logp [N] or None. advantage, route: term name -> [N]. fields: name -> [N].
    """

    token: Tensor
    sequence: Tensor
    position: Tensor
    loss_mask: Tensor
    ids: Tensor
    behaviour_logp: Tensor
    old_logp: Tensor | None
    signals: Mapping[str, SignalRows]
    advantage: Mapping[str, Tensor]
    route: Mapping[str, Tensor]
    fields: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A layout of whole sequences for one forward pass, and the rows its loss reads.

    members: for each sequence its place among the samples that were packed.
    """

    layout: TokenLayout
    rows: TokenRows
    temperature: float
    members: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """A mean in the making: sums add over micro-batches and ranks."""

    sum: float
    count: float

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did. skipped: the reason why no update was applied, or "". seconds by phase."""

    step: int
    version: int
    meters: Mapping[str, Meter]
    seconds: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""
