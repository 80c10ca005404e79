"""A training step never holds a [tokens, vocabulary] tensor: nothing larger than the chunk budget, weights and their gradients apart."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.learner.deepspeed_learner import deepspeed_learner
from opd.learner.torch_learner import torch_learner
from opd.objective import build_objective
from opd.teacher.local import LocalTeacher, frozen_copy
from opd.teacher.score import SignalScorer, Weights
from tests.kernels.allocations import Allocations
from tests.learner import cases

VOCABULARY, HIDDEN, CHUNK_BYTES = 20_000, 8, 6 << 20


def wide_model(seed: int) -> torch.nn.Module:
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def test_the_case_can_fail():
    """The counter sees whole logits where something makes them: 160 answers' worth would be far above the bound."""
    model = wide_model(0)
    with Allocations() as counted:
        model(input_ids=torch.zeros(1, 120, dtype=torch.int64))
    assert counted.largest_bytes >= 120 * VOCABULARY * 4 > max(CHUNK_BYTES, VOCABULARY * HIDDEN * 4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "torch") for name in cases.ALL_OBJECTIVES), *((name, kind) for name in ("full", "hybrid") for kind in ("zero0", "zero3"))],
)
def test_prepare_score_and_step_stay_within_the_chunk_budget(name, kind):
    objective = build_objective(cases.ALL_OBJECTIVES[name])
    model, judged = wide_model(0), cases.answers(160, longest=32)
    num_tokens = sum(len(one.completion.token_ids) for one in judged)
    settings = cases.settings(token_budget=4096, chunk_bytes=CHUNK_BYTES, minibatches=2)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    parts = (model, cases.optimizer(), settings)
    buckets = {"reduce_bucket_size": num_weights, "allgather_bucket_size": num_weights}  # DeepSpeed's default is 2 GB of its own
    learner = torch_learner(*parts) if kind == "torch" else deepspeed_learner(*parts, zero_stage=int(kind[-1]), zero_options=buckets)
    teacher = LocalTeacher(frozen_copy(wide_model(1)), temperature=1.0, token_budget=4096, chunk_bytes=CHUNK_BYTES)
    scorer = SignalScorer({s: Weights(scores=teacher.scores, head=teacher.head) for s in objective.needs.signals}, objective.needs.signals)
    weight_bytes = 4 * (VOCABULARY * HIDDEN if kind == "torch" else num_weights + (num_weights & 1))  # DeepSpeed's flat buffers hold all
    dense_bytes = num_tokens * VOCABULARY * 4
    assert dense_bytes > 15 * max(CHUNK_BYTES, weight_bytes), "the case must be able to fail"
    with Allocations() as counted:
        samples = cases.samples_for(learner, judged, objective, scorer)
        learner.step(samples, objective.at(0, {}), scorer.heads())
    learner.close()
    assert counted.largest_bytes <= max(CHUNK_BYTES, weight_bytes), f"{counted.largest_bytes} bytes in one tensor"
