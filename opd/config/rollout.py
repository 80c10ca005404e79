"""Who answers in a step, as a typed, frozen tree."""

from typing import Literal

from pydantic import Field, model_validator

from opd.config.base import Choice, Frozen, NonNegative, Positive


class Replay(Frozen):
    """Answers of earlier steps, whole groups with their verdicts, that take the place of new ones."""

    size: Positive = Field(default=256, description="groups kept (a rank), the oldest leave first; a checkpoint holds them")
    max_age: Positive = Field(default=4, description="rollout steps after which a group is not used any more")
    fresh: float | Choice = Field(default=0.5, description="share of the student's answers that are written anew: a number or a schedule")
    least: Positive = Field(default=1, description="groups that must be there before any is used again")


class Revise(Frozen):
    """After each attempt a phrase of its verdict, and the student goes on: attempt, phrase and revision are one answer, judged by the revision."""

    right: str = Field(default="Let me rephrase the above solution.", description="phrase after a right attempt")
    wrong: str = Field(default="Wait, this response is wrong. Let me correct it.", description="phrase after a wrong attempt")
    between: str = Field(default="\n\n", description="text before and after the phrase")


class Rollout(Frozen):
    """Who answers and which groups are kept."""

    prompts: Positive = Field(default=32, description="prompts a step")
    source: Choice = Field(
        default="student",
        description="student | {dataset: HINT} | {view: SIGNAL} | {paired: {dataset: HINT}} | {mixed: {student: share, dataset or view: NAME}}",
    )
    sampler: Choice = Field(
        default="student",
        description="who draws the student's tokens: student | {mixture: {share: s}} | {interleave: {k: n}} | teacher, with signal: main",
    )
    filter: Literal["none", "mixed_groups"] = Field(default="none", description="mixed_groups drops groups whose rewards are all equal and refills")
    replay: Replay | None = Field(default=None, description="a buffer of the student's earlier answers: {size, max_age, fresh, least}")
    max_refill: NonNegative = Field(default=4, description="extra rounds of generation to refill a filtered batch")
    revise: Revise | None = Field(default=None, description="the student revises its answers: {right, wrong, between}")
    overlong: Literal["keep", "mask"] = Field(default="keep", description="mask: completions cut at max_tokens leave the loss")

    @model_validator(mode="after")
    def _revises_its_own(self) -> "Rollout":
        if self.revise and (self.source != "student" or self.sampler != "student" or self.replay):
            other = "source" if self.source != "student" else "sampler" if self.sampler != "student" else "replay"
            fix = "leave it out" if other == "replay" else f"use rollout.{other}=student"
            raise ValueError(f"rollout.revise lets the student revise what it has just written, and rollout.{other} gives it other answers: {fix}")
        return self
