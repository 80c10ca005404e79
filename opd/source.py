"""Answers and verdicts for one step: draw prompts, let the student (or the data) answer, judge, filter, refill.

Nothing here depends on wall-clock time or on how often it ran before: a step's answers follow from the run seed, the step number, the
prompt cursor and the student's weights.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from opd_rollout.engine import Engine
from opd_rollout.sampling import request_seed
from opd_rollout.types import Completion, GenerateRequest, Sampling

from opd.config.choices import nearest, resolve
from opd.launcher.ranks import ALONE, Ranks, dealt
from opd.objective.schedules import SCHEDULES
from opd.objective.terms import Schedule, scheduled_value
from opd.replay_buffer import DATASET, VIEW, ReplayBuffer, ReplaySettings, check_replay
from opd.types import Judged, Meter, Prompt, Verdict, Verifier
from opd.verify import judge_all


class Stream(Protocol):
    """Where prompts come from; see opd.prompts.PromptStream."""

    def take(self, number: int) -> list[Prompt]: ...

    def meters(self) -> Mapping[str, Meter]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """Text to tokens and back.

    encode: a prompt's ids up to the assistant's turn. tokenize: plain text. end: the id that ends a completion.
    """

    encode: Callable[[Prompt], tuple[int, ...]]
    tokenize: Callable[[str], tuple[int, ...]]
    decode: Callable[[Sequence[int]], str]
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """How a step's batch is put together.

    num_prompts: of all ranks together. student_share: probability that the student answers a prompt as it is, else the prompt's hint
    named `dataset_hint` is the (only) answer, or the student answers while it reads the view of the signal `view`; schedule gives it anew
    at every step. paired: every prompt gets the student's answers and the dataset's as the last of its group. filter "mixed_groups" drops
    groups whose scored rewards are all equal and draws others, at most `max_refill` times. overlong "mask": completions cut at max_tokens
    leave the loss. max_error_share: at this share of verifier errors in a step the run stops. replay: answers of earlier steps, kept per rank,
    that take the place of some new ones.
    """

    num_prompts: int
    group: int
    seed: int
    student_share: float = 1.0
    dataset_hint: str = ""
    view: str = ""
    paired: bool = False
    schedule: Schedule | None = None
    filter: Literal["none", "mixed_groups"] = "none"
    max_refill: int = 4
    overlong: Literal["keep", "mask"] = "keep"
    max_prompt_tokens: int = 1 << 20
    max_error_share: float = 1.0
    replay: ReplaySettings | None = None


class RolloutSource:
    """Implements opd.loop.RolloutSource over an engine, a prompt stream and a verifier; owns the prompt cursor and the counters."""

    def __init__(
        self,
        engine: Engine,
        stream: Stream,
        verify: Verifier,
        codec: Codec,
        sampling: Sampling,
        settings: SourceSettings,
        show: Callable[[Prompt], tuple[int, ...] | None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """show: a prompt's ids under the view of `settings.view`, None where that has nothing to show."""
        check_settings(settings)
        assert not settings.view or show is not None, "a source that samples under a view is given it"
        self._show = show
        assert settings.num_prompts % ranks.count == 0, "every rank owns as many whole groups"
        self._engine, self._stream, self._verify, self._codec, self._sampling = engine, stream, verify, codec, sampling
        self.settings, self._ranks, self._share = settings, ranks, settings.num_prompts // ranks.count
        self._replay = None if settings.replay is None else ReplayBuffer(settings.replay, seed=settings.seed, rank=ranks.rank)
        self._student_share = settings.student_share
        self._meters: dict[str, Meter] = {}
        self._totals = {"generated_tokens": 0, "discarded_tokens": 0, "verifier_errors": 0}

    def collect(self, step: int, metrics: Mapping[str, float] | None = None) -> list[Judged]:
        """This rank's judged answers of a step, groups numbered from 0 in the order drawn, members within each.

        All ranks draw from one stream, each takes its part, so the step's prompts do not depend on how many there are. With a filter the
        batch may hold fewer groups than asked for; when no group of any rank passes, the unfiltered groups of the last round come back.
        Groups of earlier steps come last; no prompts are drawn for them.
        Raises ValueError for a prompt that is too long or lacks the dataset's answer, and when the verifier fails on too large a share.
        """
        found: dict[str, float] = {}
        share = self._student_share
        if self.settings.schedule is not None:
            share = min(max(scheduled_value(self.settings.schedule, "rollout.source", step, metrics or {}, found), 0.0), 1.0)
        again: list[list[Judged]] = []
        if self._replay is not None:
            again, share = self._replay.draw(step, self._share, share, metrics or {})
        self.settings = replace(self.settings, student_share=share)
        kept, dropped, rounds = self._new_groups(step, self._share - len(again))
        self._account(kept, dropped, rounds)
        self._meters |= {name: Meter(sum=value, count=1.0) for name, value in found.items()} | dict(self._stream.meters())
        if self._replay is not None:
            self._replay.add(step, kept)
            self._meters |= self._replay.meters()
        return [replace(item, group=group) for group, members in enumerate([*kept, *again]) for item in members]

    def _new_groups(self, step: int, wanted: int) -> tuple[list[list[Judged]], list[list[Judged]], int]:
        """(kept groups, dropped ones, rounds of generation) of the `wanted` that this rank has to fill."""
        kept: list[list[Judged]] = []
        dropped: list[list[Judged]] = []
        answered: list[list[Judged]] = []
        drawn: Counter[str] = Counter()
        filtered = self.settings.filter != "none"
        missing = [wanted] * self._ranks.count if self._replay is None else self._ranks.gather(wanted)
        everything, rounds = sum(missing), 0
        while sum(missing) and rounds <= (self.settings.max_refill if filtered else 0):
            rounds += 1
            answered = self._answer(self._draw(missing, drawn), step)
            for members in answered:
                (kept if not filtered or is_mixed(members) else dropped).append(members)
            missing = self._ranks.gather(wanted - len(kept)) if filtered else [0]
        if filtered and rounds and sum(missing) == everything:
            kept, dropped = dropped[len(dropped) - len(answered) :], dropped[: len(dropped) - len(answered)]
        return kept, dropped, rounds

    def meters(self) -> Mapping[str, Meter]:
        """What the last step's answers were like; discarded ones included, the dataset's not."""
        return self._meters

    def totals(self) -> Mapping[str, int]:
        """Counts since the run began: tokens generated, those of them discarded by the filter, verifier errors."""
        return self._totals

    def state(self) -> dict[str, Any]:
        """Plain values from which `load_state` continues exactly."""
        kept = {} if self._replay is None else {"replay": self._replay.state()}
        return {"stream": self._stream.state(), "totals": dict(self._totals), **kept}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._stream.load_state(state["stream"])
        self._totals.update(state["totals"])
        if self._replay is not None:
            self._replay.load_state(state.get("replay", []))

    def _draw(self, missing: Sequence[int], drawn: Counter[str]) -> list[tuple[Prompt, int]]:
        """This rank's part of the prompts that the ranks miss, each with the number of its first sample in this step."""
        prompts = self._stream.take(sum(missing))
        numbered = [(prompt, drawn_before(prompt.id, drawn) * self.settings.group) for prompt in prompts]
        return dealt(numbered, missing, self._ranks.rank)

    def _answer(self, drawn: Sequence[tuple[Prompt, int]], step: int) -> list[list[Judged]]:
        settings = self.settings
        prompts, firsts = [prompt for prompt, _ in drawn], [first for _, first in drawn]
        encoded = [self._encode(prompt) for prompt in prompts]
        asked = settings.view != ""
        from_student = [student_answers(settings, prompt.id, first, step) for prompt, first in drawn]
        requests = [
            GenerateRequest(prompt_ids=ids if ours else self._shown(prompt), seed=request_seed(settings.seed, prompt.id, first + member, step))
            for prompt, ids, first, ours in zip(prompts, encoded, firsts, from_student, strict=True)
            if ours or asked
            for member in range(settings.group)
        ]
        generated = self._engine.generate(requests, self._sampling) if requests else []
        assert len(generated) == len(requests)
        remaining = iter(generated)
        groups: list[list[tuple[Prompt, tuple[int, ...], Completion, int]]] = []
        for prompt, ids, ours in zip(prompts, encoded, from_student, strict=True):
            completions = [next(remaining) for _ in range(settings.group)] if ours or asked else [self._dataset_answer(prompt)]
            completions = completions if ours or not asked else [replace(completion, source=VIEW) for completion in completions]
            if settings.paired:
                completions = [*completions, self._dataset_answer(prompt)]
            groups.append([(prompt, ids, completion, member) for member, completion in enumerate(completions)])
        return self._judged(groups)

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        ids = self._codec.encode(prompt)
        if len(ids) > self.settings.max_prompt_tokens:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(ids)} tokens, more than {self.settings.max_prompt_tokens}; "
                "raise data.max_prompt_tokens or remove it"
            )
        return ids

    def _shown(self, prompt: Prompt) -> tuple[int, ...]:
        assert self._show is not None
        ids = self._show(prompt)
        if ids is None:
            raise ValueError(f"rollout.source: the view of signal {self.settings.view!r} has nothing to show for prompt {prompt.id!r}, or no room")
        return ids

    def _dataset_answer(self, prompt: Prompt) -> Completion:
        name = self.settings.dataset_hint
        text = prompt.hints.get(name)
        if not text:
            have = ", ".join(prompt.hints) or "none"
            raise ValueError(
                f"prompt {prompt.id!r} has no hint {name!r}{nearest(name, prompt.hints)} to learn from; it has {have}; set rollout.source"
            )
        return dataset_completion((*self._codec.tokenize(text), self._codec.end), self._sampling)

    def _judged(self, groups: Sequence[Sequence[tuple[Prompt, tuple[int, ...], Completion, int]]]) -> list[list[Judged]]:
        answers = [answer for group in groups for answer in group]
        texts = [self._codec.decode(completion.token_ids) for _, _, completion, _ in answers]
        verdicts = judge_all(self._verify, [(prompt, text) for (prompt, *_), text in zip(answers, texts, strict=True)])
        judged = iter([self._record(*answer, text, verdict) for answer, text, verdict in zip(answers, texts, verdicts, strict=True)])
        return [[next(judged) for _ in group] for group in groups]

    def _record(self, prompt: Prompt, ids: tuple[int, ...], completion: Completion, member: int, text: str, verdict: Verdict) -> Judged:
        if self.settings.overlong == "mask" and completion.finish == "length":
            completion = replace(completion, loss_mask=torch.zeros_like(completion.loss_mask))
        return Judged(prompt=prompt, prompt_ids=ids, completion=completion, text=text, verdict=verdict, group=0, member=member)

    def _account(self, kept: Sequence[Sequence[Judged]], dropped: Sequence[Sequence[Judged]], rounds: int) -> None:
        everything = [item for members in (*kept, *dropped) for item in members]
        discarded = [item for members in dropped for item in members]
        errors = [f"{item.prompt.id!r}: {item.verdict.feedback or 'no reason given'}" for item in everything if item.verdict.status == "error"]
        counts = [generated_tokens(everything), generated_tokens(discarded), len(errors), len(everything)]
        of_ranks = self._ranks.gather((counts, errors[:1]))
        generated, thrown, failed, judged = (sum(column) for column in zip(*(found for found, _ in of_ranks), strict=True))
        check_errors(failed, judged, [first for _, firsts in of_ranks for first in firsts], self.settings.max_error_share)
        self._meters = rollout_meters(everything, discarded)
        if self.settings.filter != "none":
            self._meters["rollout/rounds"] = Meter(sum=float(rounds), count=1.0)
            self._meters["rollout/groups_kept"] = Meter(sum=float(len(kept)), count=float(len(kept) + len(dropped)))
        self._totals["generated_tokens"] += generated
        self._totals["discarded_tokens"] += thrown
        self._totals["verifier_errors"] += failed


class Mixture(NamedTuple):
    """Who answers: the student with probability `student`, else the data (the hint `hint`) or the student under a signal's view (`view`).

    paired: the student and the data both answer every prompt. schedule: gives `student` anew at every step.
    """

    student: float
    hint: str = ""
    view: str = ""
    paired: bool = False
    schedule: Schedule | None = None

    @property
    def kind(self) -> Literal["student", "dataset", "mixed"]:
        """Whose answers a term may meet; under a view it is the student who answers."""
        if self.paired or self.schedule is not None:
            return "mixed"
        return "student" if self.student == 1 or self.view else "dataset" if self.student == 0 else "mixed"

    @property
    def reads_data(self) -> bool:
        """Whether some answers come from the prompts' hint."""
        return self.kind != "student" and bool(self.hint)


def parse_source(choice: Any) -> Mixture:
    """The mixture of `student`, `{dataset: HINT}`, `{view: SIGNAL}`, `{paired: {dataset: HINT}}` or `{mixed: {student: SHARE, dataset: HINT}}`
    (or view: SIGNAL); SHARE is a number or a schedule.

    Raises ValueError for anything else.
    """
    form = (
        "student | {dataset: HINT} | {view: SIGNAL} | {paired: {dataset: HINT}} | {mixed: {student: SHARE, dataset: HINT}} | "
        "{mixed: {student: SHARE, view: SIGNAL}}"
    )
    if choice == "student":
        return Mixture(1.0)
    if isinstance(choice, Mapping) and len(choice) == 1:
        [(name, value)] = choice.items()
        given = dict(value) if name == "mixed" and isinstance(value, Mapping) else {"student": 0.0, name: value}
        if name == "paired" and isinstance(value, Mapping) and set(value) == {DATASET} and isinstance(value[DATASET], str) and value[DATASET]:
            return Mixture(1.0, value[DATASET], paired=True)
        share, schedule = given.pop("student", None), None
        if isinstance(share, Mapping):
            share, schedule = 0.5, resolve(share, SCHEDULES, "rollout.source.mixed.student")
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if number and 0 <= share <= 1 and len(given) == 1:
            [(kind, other)] = given.items()
            if kind in (DATASET, VIEW) and isinstance(other, str) and other:
                return Mixture(float(share), other if kind == DATASET else "", other if kind == VIEW else "", schedule=schedule)
    raise ValueError(f"rollout.source is {choice!r}; write {form}, with SHARE between 0 and 1 (or a schedule)")


def check_settings(settings: SourceSettings) -> None:
    """Raises ValueError for settings under which no step could run."""
    if settings.num_prompts < 1 or settings.group < 1:
        raise ValueError(f"rollout.prompts ({settings.num_prompts}) and group ({settings.group}) must be at least 1")
    if not 0 <= settings.student_share <= 1:
        raise ValueError(f"the student's share must lie between 0 and 1, found {settings.student_share}")
    if settings.student_share < 1 and not settings.dataset_hint and not settings.view:
        raise ValueError("rollout.source mixes in the dataset but names no hint to learn from, e.g. {dataset: solution}")
    if settings.replay is not None:
        check_replay(settings.replay, student=settings.student_share > 0 or settings.schedule is not None)
    if settings.filter == "mixed_groups" and (settings.group < 2 or settings.paired or (settings.student_share < 1 and not settings.view)):
        raise ValueError(
            "rollout.filter mixed_groups compares the student's answers to one prompt: it needs group 2 or more and source student"
        )


def student_answers(settings: SourceSettings, prompt_id: str, sample: int, step: int) -> bool:
    """The coin of GKD (arXiv:2306.13649, algorithm 1), one toss a prompt: a pure function of run seed, step, prompt and sample."""
    if settings.student_share in (0.0, 1.0):
        return settings.student_share == 1.0
    name = f"coin/{settings.seed}/{step}/{sample}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") * 2.0**-64 < settings.student_share


def drawn_before(prompt_id: str, drawn: Counter[str]) -> int:
    """How often a step drew this prompt already; counts the new draw. A second draw must not repeat the first one's seeds."""
    drawn[prompt_id] += 1
    return drawn[prompt_id] - 1


def dataset_completion(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
    """Data in the form of a completion: no policy sampled it, so its log-probs are NaN. Cut at max_tokens like any other."""
    ids = token_ids[: sampling.max_tokens]
    return Completion(
        token_ids=ids,
        logprobs=torch.full((len(ids),), float("nan")),
        loss_mask=torch.ones(len(ids), dtype=torch.bool),
        source=DATASET,
        temperature=sampling.temperature,
        finish="stop" if len(ids) == len(token_ids) else "length",
        versions=(),
    )


def is_mixed(members: Sequence[Judged]) -> bool:
    """Whether the scored rewards of a group differ (DAPO's dynamic sampling, arXiv:2503.14476)."""
    return len({item.verdict.reward for item in members if item.verdict.status == "score"}) > 1


def generated_tokens(judged: Sequence[Judged]) -> int:
    """Tokens that a policy sampled."""
    return sum(len(item.completion.token_ids) for item in judged if item.completion.source != DATASET)


def check_errors(failed: int, judged: int, first: Sequence[str], max_share: float) -> None:
    """Raises ValueError when the verifier failed on at least `max_share` of a step's answers, with what it said first."""
    if failed and failed >= max_share * judged:
        raise ValueError(f"the verifier failed on {failed} of {judged} answers of this step; first on prompt {first[0]}")


def rollout_meters(judged: Sequence[Judged], discarded: Sequence[Judged]) -> dict[str, Meter]:
    """Reward, accuracy, lengths (tokens), truncated share, verdict shares and token counts of the student's answers.

    Means over nothing are left out (no scored answer, no answer of the student).
    """
    ours = [item for item in judged if item.completion.source != DATASET]
    scored = [item.verdict for item in ours if item.verdict.status == "score"]
    meters = {"tokens/student": Meter(sum=float(generated_tokens(judged)), count=1.0)}
    if len(ours) < len(judged):
        meters["rollout/dataset_share"] = _mean([float(item.completion.source == DATASET) for item in judged])
    if ours:
        meters["length/mean"] = _mean([float(len(item.completion.token_ids)) for item in ours])
        meters["length/truncated"] = _mean([float(item.completion.finish == "length") for item in ours])
        meters["tokens/discarded"] = Meter(sum=float(generated_tokens(discarded)), count=1.0)
    for status in ("abstain", "error") if judged else ():
        meters[f"verdict/{status}"] = _mean([float(item.verdict.status == status) for item in judged])
    if scored:
        meters["reward/mean"] = _mean([verdict.reward for verdict in scored])
        meters["accuracy/train"] = _mean([float(verdict.correct) for verdict in scored])
    return {**meters, **_part_meters(scored)}


def _part_meters(verdicts: Sequence[Verdict]) -> dict[str, Meter]:
    values: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        for name, value in verdict.parts.items():
            values[f"reward/{name}"].append(value)
    return {name: _mean(found) for name, found in values.items()}


def _mean(values: Sequence[float]) -> Meter:
    return Meter(sum=float(sum(values)), count=float(len(values)))
