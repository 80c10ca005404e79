"""The records that flow through one training step, from a prompt to the learner's micro-batch.

Legend: P prompts, G samples a prompt, B = P x G sequences, T completion length, N completion tokens of a micro-batch, K support size.
Every per-token array is indexed by completion token: entry n is about predicting completion token n.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

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
    """One completion, its text and verdict; `group` numbers the prompt within the step, `member` the sample within its group."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completion: Completion
    text: str
    verdict: Verdict
    group: int
    member: int


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a teacher reads before the student's tokens. must_keep: the messages' part that truncation may not touch is everything
    but `hint`; `template` has the hint's place as {hint}."""

    messages: tuple[Message, ...]
    kind: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Everything the learner may know about one answer. All tensors are detached, indexed by completion token.

    scores: signal name -> TokenScores, absent where the sample has no view. old_logp [T] or None; support_ids [T, K] or None (student top-k).
    advantage: term name -> [T]. route: term name -> factor. fields: named per-token statistics made before the step (entropy, sequence ratio ...).
    """

    judged: Judged
    scores: Mapping[str, TokenScores]
    advantage: Mapping[str, Tensor]
    route: Mapping[str, float]
    fields: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalBatch:
    """One signal's scores, packed over a micro-batch.

    available [N] bool: false where the sample has no view. sampled [N], entropy [N], tail_logp [N].
    columns: this signal's slice of MicroBatch.ids. logp [N, k] true teacher log-probs at those ids. hidden [N, D] for support "full".
    """

    available: Tensor
    sampled: Tensor
    entropy: Tensor
    columns: slice
    logp: Tensor
    tail_logp: Tensor
    hidden: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Token rows for one forward pass and everything its loss reads.

    input_ids, position_ids [R, S] (padded) or [1, S] (packed); attention_mask [R, S] or None when packed.
    predict_at [N]: flat row of the hidden states that predicts completion token n. token, sequence, position [N] int64.
    ids [N, K] int64: column 0 is the sampled token, then every signal's support columns; -1 pads.
    behaviour_logp [N] (NaN where no policy sampled), old_logp [N] or None. temperature: one number a run.
    advantage, route: term name -> [N]. fields: name -> [N]. loss_mask [N] bool.

    Example: prompt ids [5, 6, 7], completion [8, 9, 2] -> input_ids [5, 6, 7, 8, 9, 2], predict_at [2, 3, 4], token [8, 9, 2], position [0, 1, 2].
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    predict_at: Tensor
    token: Tensor
    sequence: Tensor
    position: Tensor
    ids: Tensor
    behaviour_logp: Tensor
    old_logp: Tensor | None
    temperature: float
    signals: Mapping[str, SignalBatch]
    advantage: Mapping[str, Tensor]
    route: Mapping[str, Tensor]
    fields: Mapping[str, Tensor]
    loss_mask: Tensor
    num_sequences: int


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
