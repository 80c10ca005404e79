"""A tiny language model around a Head, and one loss of each kind of request."""

import opd_kernels
import torch
from torch import Tensor, nn

VOCABULARY, VALID, HIDDEN = 97, 90, 16


class TinyModel(nn.Module):
    """Embedding, one nonlinear layer, Head; forward(tokens, request) runs the request inside the Head."""

    def __init__(self, *, tied: bool = False, frozen_head: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
            self.body = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
            lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=not tied)
        if tied:
            lm_head.weight = self.embedding.weight
        if frozen_head:
            lm_head.requires_grad_(False)
        self.lm_head = opd_kernels.Head.from_lm_head(lm_head, softcap=12.0, vocab_size=VALID)

    def forward(self, tokens: Tensor, request=None):
        return self.lm_head(self.body(self.embedding(tokens)), request)


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, VALID, (12,), generator=generator), torch.randint(0, VALID, (12, 3), generator=generator)


def request_of(kind: str, ids: Tensor):
    """A request that returns a scalar loss by the named operation."""

    def composable(hidden, view):
        selected = opd_kernels.selected_logprobs(hidden, view.weight, ids, **view.keywords())
        return (selected.tail_logp - selected.logp.sum(dim=1) + 0.1 * selected.entropy).mean()

    def fused(hidden, view):
        def loss_fn(selected):
            per_token = selected.tail_logp - selected.logp.sum(dim=1) + 0.1 * selected.entropy
            return per_token.sum() / len(ids), {"per_token": per_token}

        loss, aux = opd_kernels.fused_sparse_loss(hidden, view.weight, ids, loss_fn, chunk_bytes=2000, **view.keywords())
        return {"loss": loss, "aux": aux}

    def dense(hidden, view):
        generator = torch.Generator().manual_seed(5)
        teacher = torch.randn(VOCABULARY, 8, generator=generator)
        states = torch.randn(len(ids), 8, generator=generator)
        return opd_kernels.dense_divergence(
            hidden, view.weight, states, teacher, opd_kernels.jsd(), constants_s=view.constants(), vocab_size=view.vocab_size
        ).mean()

    return {"composable": composable, "fused": fused, "dense": dense}[kind]


def loss_of(model: nn.Module, kind: str, rank: int) -> Tensor:
    tokens, ids = batch(rank)
    result = model(tokens, request_of(kind, ids))
    return result["loss"] if isinstance(result, dict) else result


def expected_gradients(kind: str, ranks: int, **model_keywords: bool) -> dict[str, Tensor]:
    """Gradients of the mean over ranks' losses, on one process."""
    model = TinyModel(**model_keywords)
    (sum(loss_of(model, kind, rank) for rank in range(ranks)) / ranks).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
