"""Two hundred steps of distillation: the chunked operations and eager fp32 logits give one loss curve."""

import opd_kernels
import pytest
import torch
from torch import nn

STEPS, TOKENS, VOCABULARY, HIDDEN, CHOSEN = 200, 32, 200, 16, 8


def curve(path: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    inputs, teacher_head = draw(STEPS, TOKENS, 12), draw(VOCABULARY, 12)
    torch.manual_seed(1)
    body, head = nn.Sequential(nn.Linear(12, HIDDEN), nn.Tanh()), nn.Parameter(0.1 * draw(VOCABULARY, HIDDEN))
    optimizer = torch.optim.AdamW([*body.parameters(), head], lr=3e-2)
    losses = []
    for step in range(STEPS):
        scores = opd_kernels.topk_logprobs(inputs[step], teacher_head, CHOSEN, backend="reference")
        hidden = body(inputs[step])
        loss = loss_of(path, hidden, head, scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def forward_kl(logp, tail_logp, q_logp, q_tail):
    return (q_logp.exp() * (q_logp - logp)).sum(dim=1) + q_tail.exp() * (q_tail - tail_logp)


def loss_of(path: str, hidden, head, scores):
    if path == "eager":
        logp = (hidden @ head.T).log_softmax(dim=1)
        outside = torch.ones_like(logp, dtype=torch.bool).scatter(1, scores.ids, False)
        tail = torch.where(outside, logp, float("-inf")).logsumexp(dim=1)
        return forward_kl(logp.gather(1, scores.ids), tail, scores.logp, scores.tail_logp).mean()
    if path == "composable":
        out = opd_kernels.selected_logprobs(hidden, head, scores.ids, backend="torch", chunk_bytes=9000)
        return forward_kl(out.logp, out.tail_logp, scores.logp, scores.tail_logp).mean()

    def loss_fn(selected, q_logp, q_tail):
        return forward_kl(selected.logp, selected.tail_logp, q_logp, q_tail).sum() / TOKENS, {}

    extras = (scores.logp, scores.tail_logp)
    return opd_kernels.fused_sparse_loss(hidden, head, scores.ids, loss_fn, extras, backend="torch", chunk_bytes=9000)[0]


@pytest.mark.parametrize("path", ["composable", "fused"])
def test_loss_curves_are_equal(path):
    eager, ours = curve("eager"), curve(path)
    assert eager[-20:].mean() < 0.5 * eager[:20].mean()  # it learns
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)
