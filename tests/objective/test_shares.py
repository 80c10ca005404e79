"""What share of the tokens each term of a mixture learns from."""

import pytest
import torch
from opd_kernels import selected_logprobs

from opd.learner.packing import pack
from opd.objective import Setting, build_objective, token_loss
from tests.objective.dense import Batch, V


def test_the_share_of_a_term_is_that_of_its_tokens():
    batch = Batch.make(seed=2)
    specs = [{"nll": {}, "route": "correct"}, {"distill": "reverse_kl", "route": "wrong"}, {"nll": {}, "weight": {"prefix": {"tokens": 1}}}]
    objective = build_objective(specs, Setting()).at(0, {})
    samples = batch.samples(objective)
    rows = [pack([s], signals=objective.needs.signals, token_budget=99, packed=True, temperature=1.0, pad_id=0)[0].rows for s in samples]
    found = {name: 0.0 for name in ("nll", "distill", "nll_2")}
    tokens = sum(len(a.tokens) for a in batch.answers)
    for a, r in zip(batch.answers, rows, strict=True):
        selected = selected_logprobs(a.now, torch.eye(V, dtype=torch.float64), r.ids)
        full = {"distill": torch.zeros(len(a.tokens), dtype=torch.float64)}
        _, columns = token_loss(objective, {"nll": 1.0, "distill": 1.0, "nll_2": 1.0}, selected, r, full)
        for name in found:
            found[name] += float(columns[f"share/{name}"].sum()) / tokens
    right = sum(len(a.tokens) for a in batch.answers if a.reward > 0.5) / tokens
    assert found == pytest.approx({"nll": right, "distill": 1.0 - right, "nll_2": len(batch.answers) / tokens})
