"""Tiny models, answers and objectives that the learner's tests share. Legend: T completion tokens."""

import random
from collections.abc import Sequence

import torch
from opd_rollout.types import Completion
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.learner.types import LearnerSettings, OptimizerSettings
from opd.objective import Objective, build_objective, join
from opd.teacher.local import LocalTeacher, frozen_copy
from opd.teacher.score import SignalScorer, Weights
from opd.types import Judged, Prompt, Sample, Verdict

VOCABULARY = 61
REVERSE_KL_FULL = [{"distill": "reverse_kl"}]
GRPO = [{"policy": "ppo_clip", "advantage": "group_centered"}]
NLL = [{"nll": {}}]
TEACHER_TOPK = [{"distill": "forward_kl", "support": {"teacher_topk": {"k": 4, "tail": "bucket"}}}]
STUDENT_TOPK = [{"distill": {"jsd": {"mix": 0.5}}, "support": {"student_topk": {"k": 5, "tail": "bucket"}}}]
HYBRID = [{"policy": "ppo_clip", "advantage": "group_centered"}, {"distill": "reverse_kl", "coef": 0.5}]
ALL_OBJECTIVES = {"full": REVERSE_KL_FULL, "grpo": GRPO, "nll": NLL, "teacher_topk": TEACHER_TOPK, "student_topk": STUDENT_TOPK, "hybrid": HYBRID}


def tiny_model(seed: int = 0, *, tied: bool = True, dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        attention_dropout=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).to(dtype).eval()


def answers(count: int = 8, *, group: int = 4, seed: int = 0, longest: int = 12) -> list[Judged]:
    """Answers of different lengths, one of them empty, with rewards that differ within groups."""
    draw = random.Random(seed)
    judged = []
    for index in range(count):
        prompt_ids = tuple(draw.randrange(2, VOCABULARY) for _ in range(4 + (index // group) % 3))
        length = 0 if index == 1 else draw.randrange(1, longest)
        tokens = tuple(draw.randrange(VOCABULARY) for _ in range(length))
        completion = Completion(
            token_ids=tokens,
            logprobs=torch.full((length,), -2.0),
            loss_mask=torch.tensor([draw.random() < 0.9 for _ in tokens], dtype=torch.bool),
            source="student",
            temperature=1.0,
            finish="stop",
            versions=((0, 0, length),),
        )
        prompt = Prompt(id=f"p{index // group}", messages=({"role": "user", "content": "?"},))
        verdict = Verdict(reward=float(draw.random() < 0.5) + 0.1 * (index % group), correct=draw.random() < 0.5)
        judged.append(
            Judged(
                prompt=prompt, prompt_ids=prompt_ids, completion=completion, text="", verdict=verdict,
                group=index // group, member=index % group,
            )
        )
    return judged


def contexts(judged: Sequence[Judged]) -> list[tuple[int, ...] | None]:
    """A privileged context an answer: some tokens before the question; the third answer of the first group has none."""
    return [None if (one.group, one.member) == (0, 2) else (7, 8, 9, *one.prompt_ids) for one in judged]


def teacher_of(model: nn.Module, objective: Objective, *, temperature: float = 1.0) -> SignalScorer:
    """Frozen weights for every signal."""
    teacher = LocalTeacher(frozen_copy(model), temperature=temperature, token_budget=4096)
    weights = Weights(scores=teacher.scores, head=teacher.head)
    return SignalScorer({name: weights for name in objective.needs.signals}, objective.needs.signals)


def samples_for(learner, judged: Sequence[Judged], objective: Objective, scorer: SignalScorer) -> list[Sample]:
    """Steps 4 to 6 of the loop."""
    prepared = learner.prepare(judged, objective.needs)
    views = {name: contexts(judged) for name in objective.needs.signals}
    return join(judged, prepared, scorer.score(judged, views, prepared), objective)


def settings(**changes) -> LearnerSettings:
    return LearnerSettings(**{"token_budget": 64, **changes})


def optimizer(**changes) -> OptimizerSettings:
    return OptimizerSettings(**{"lr": 1e-2, "clip": 1.0, **changes})


def train(learner, spec, steps: int, *, teacher_model: nn.Module | None = None, seed: int = 0, count: int = 8) -> list:
    """`steps` rounds on fresh answers; the reports. Round n depends on the seed and the learner's version only."""
    objective = build_objective(spec)
    scorer = teacher_of(teacher_model or tiny_model(5), objective)
    reports = []
    for _ in range(steps):
        judged = answers(count, seed=1000 * seed + learner.version)
        samples = samples_for(learner, judged, objective, scorer)
        reports.append(learner.step(samples, objective.at(learner.version, {}), scorer.heads()))
    return reports


def weights_of(learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in learner.weights(0).buckets() for name, tensor in bucket}


def losses(reports) -> list[float]:
    return [report.meters["loss/total"].mean for report in reports]
