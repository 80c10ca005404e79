"""No operation holds a [tokens, vocabulary] tensor: sizes of every allocation at V = 151,936, and resident memory."""

import json
import subprocess
import sys
from pathlib import Path

import opd_kernels
import pytest
import torch

from tests.kernels import resident_steps
from tests.kernels.allocations import allocations_of

TOKENS, VOCABULARY, HIDDEN, CHOSEN = 256, 151_936, 64, 32
BUDGET = 32 << 20
WEIGHT_GRADIENT = 4 * VOCABULARY * HIDDEN  # 37 MiB; one [tokens, vocabulary] tensor would take 148 MiB
CEILING = 300 << 20
OPERATIONS = ("composable", "composable_topk", "fused", "topk", "dense", "dense_hinted")


def work_of(operation: str, dtype: torch.dtype = torch.float32, chunk_bytes: int | None = BUDGET):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(TOKENS, HIDDEN, generator=generator) * 0.7).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(0, VOCABULARY, (TOKENS, CHOSEN), generator=generator)
    keywords = {"chunk_bytes": chunk_bytes, "backend": "torch"}

    def work() -> None:
        hidden.grad = weight.grad = None
        if operation.startswith("composable"):
            topk = 16 if operation.endswith("topk") else 0
            out = opd_kernels.selected_logprobs(hidden, weight, ids, student_topk=topk, **keywords)
            (out.logp.sum() + out.tail_logp.sum() + out.entropy.sum()).backward()
        elif operation == "fused":
            loss, _ = opd_kernels.fused_sparse_loss(hidden, weight, ids, lambda s: ((s.tail_logp - s.entropy).sum(), {}), **keywords)
            loss.backward()
        elif operation == "topk":
            opd_kernels.topk_logprobs(hidden, weight, 64, always_include=ids[:, 0], **keywords)
        else:
            hint = torch.ones(TOKENS) if operation == "dense_hinted" else None
            teacher = hidden.detach() * 0.9
            values = opd_kernels.dense_divergence(hidden, weight, teacher, weight.detach(), opd_kernels.jsd(), token_weight=hint, **keywords)
            values.sum().backward()

    return work, (hidden, weight, ids)


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [*((operation, torch.float32) for operation in OPERATIONS), ("composable", torch.bfloat16), ("fused", torch.bfloat16)],
)
def test_no_allocation_exceeds_the_budget_or_the_weight_gradient(operation, dtype):
    work, inputs = work_of(operation, dtype)
    counted = allocations_of(work, *inputs)
    assert counted.largest_bytes <= max(BUDGET, WEIGHT_GRADIENT)
    assert counted.peak_bytes <= 2 * BUDGET + 2 * WEIGHT_GRADIENT


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "columns"), [(2048, 32_000), (1024, 151_936)])
def test_extra_memory_against_whole_logits(tokens, columns):
    """Peak minus inputs minus returned gradients, counted in bytes: composable at most 0.10 of plain PyTorch's, fused at most 0.40."""
    hidden_size, chosen = 16, 32  # small products: what is counted are logits, and those know no hidden size
    hidden, weight = torch.randn(tokens, hidden_size, requires_grad=True), torch.randn(columns, hidden_size, requires_grad=True)
    ids = torch.randint(0, columns, (tokens, chosen), generator=torch.Generator().manual_seed(0))
    returned = 4 * hidden_size * (tokens + columns)

    def extra(loss_of) -> int:
        return allocations_of(lambda: torch.autograd.grad(loss_of(), (hidden, weight)), hidden, weight, ids).peak_bytes - returned

    def eager():
        logp = (hidden @ weight.T).log_softmax(dim=1).gather(1, ids)
        return (logp.sum(dim=1) + torch.log(-torch.expm1(logp.logsumexp(dim=1).clamp(max=-1e-7)))).sum()

    def composable():
        out = opd_kernels.selected_logprobs(hidden, weight, ids, entropy=False, backend="torch")
        return (out.logp.sum(dim=1) + out.tail_logp).sum()

    def fused():
        def loss_fn(selected):
            return (selected.logp.sum(dim=1) + selected.tail_logp).sum(), {}

        return opd_kernels.fused_sparse_loss(hidden, weight, ids, loss_fn, entropy=False, backend="torch")[0]

    whole = extra(eager)
    assert whole > 2 * 4 * tokens * columns  # log-probabilities and their gradient at least
    assert extra(composable) <= 0.10 * whole
    assert 0.02 * whole < extra(fused) <= 0.40 * whole


def test_dense_logits_would_be_seen():
    """The counter itself: the reference allocates whole [tokens, vocabulary] tensors."""
    hidden, weight = torch.randn(32, 8), torch.randn(5000, 8)
    ids = torch.zeros(32, 1, dtype=torch.int64)
    counted = allocations_of(lambda: opd_kernels.selected_logprobs(hidden, weight, ids, backend="reference"), hidden, weight, ids)
    assert counted.largest_bytes >= 4 * 32 * 5000 and counted.peak_bytes >= 3 * 4 * 32 * 5000


def printed_by(*arguments: str):
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=root, capture_output=True, text=True, timeout=240, env={"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_resident_memory_of_every_operation():
    """Forward and backward with default budgets, in a fresh process: less than 300 MiB above the inputs."""
    extra = printed_by("tests.kernels.resident")
    assert sorted(extra) == sorted(OPERATIONS)
    assert all(bytes_ < CEILING for bytes_ in extra.values()), extra
    assert extra["composable"] <= WEIGHT_GRADIENT + (100 << 20)  # tiles wait in the memory of the gradient and a budget of 64 MiB
    assert extra["fused"] > WEIGHT_GRADIENT  # the measurement sees at least what must be there


@pytest.mark.parametrize(("dtype", "forwards"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 3)])
def test_resident_memory_of_training_steps(dtype, forwards):
    """Gradients, one budget a forward that waits, and no more: tiles give their pages back to the system while the gradient is written.

    78 MiB of logits, 78 or 39 of them in memory that the gradient lends. A second gradient is added to the first.
    """
    size = resident_steps
    one = size.HIDDEN * (size.TOKENS + size.VOCABULARY) * dtype.itemsize
    gradients = one * min(2, forwards)
    casts = 0 if dtype == torch.float32 else 2 * 4 * size.HIDDEN * (size.TOKENS + 1024)  # hidden and its gradient, a tile of each of weight
    peaks = printed_by("tests.kernels.resident_steps", str(dtype).removeprefix("torch."), str(forwards))
    assert all(one < peak <= gradients + casts + forwards * size.BUDGET + (12 << 20) for peak in peaks), (gradients, peaks)
