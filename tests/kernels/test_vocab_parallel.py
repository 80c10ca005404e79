"""A vocabulary split over 2 to 4 ranks, unevenly, against one rank with all of it."""

import opd_kernels
import pytest
import torch
import torch.distributed as dist
from opd_kernels.chunked_rows import row_chunks
from opd_kernels.distributed import any_over_ranks
from opd_kernels.products import projection
from opd_kernels.types import LogitOptions

from tests.kernels.cases import OUTPUTS, Case, make_case, mixed_loss, relative, upstream_of
from tests.kernels.ranks import launch

VOCABULARY, VALID = 203, 190
SHARDS = {2: (120, 83), 3: (64, 130, 9), 4: (50, 51, 1, 101)}  # rows a rank holds; the last hold padded rows, one rank of 3 nothing else


def everything(case: Case, weight: torch.Tensor, bias: torch.Tensor, **keywords) -> dict[str, torch.Tensor]:
    """All operations on one shard (or the whole); gradients of weight and bias are the shard's."""
    results = {}
    upstream = upstream_of(case)
    valid = case.ids >= 0
    keywords = {"backend": "torch", "vocab_size": VALID, "temperature": torch.linspace(0.7, 1.5, 21), **keywords}
    for path in ("composable", "fused"):
        leaves = [tensor.clone().requires_grad_() for tensor in (case.hidden, weight, bias)]
        kinds = {**keywords, "bias": leaves[2], "softcap": 20.0, "student_topk": 4}
        if path == "composable":
            selected = opd_kernels.selected_logprobs(leaves[0], leaves[1], case.ids, **kinds)
            outputs = {name: getattr(selected, name) for name in (*OUTPUTS, "topk_ids", "topk_logp")}
            loss = mixed_loss(selected, upstream, valid).sum()
        else:

            def loss_fn(selected, valid, *coefficients):
                aux = {name: getattr(selected, name) for name in (*OUTPUTS, "topk_ids", "topk_logp")}
                return mixed_loss(selected, dict(zip(upstream, coefficients, strict=True)), valid).sum(), aux

            loss, outputs = opd_kernels.fused_sparse_loss(
                leaves[0], leaves[1], case.ids, loss_fn, (valid, *upstream.values()), chunk_bytes=9000, **kinds
            )
        loss.backward()
        results |= {f"{path}/{name}": value.detach() for name, value in outputs.items()}
        results |= {f"{path}/d_{name}": leaf.grad for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True)}
    scores = opd_kernels.topk_logprobs(case.hidden, weight, 12, always_include=case.ids[:, 1], bias=bias, **keywords)
    results |= {f"topk/{name}": getattr(scores, name) for name in ("ids", "logp", "tail_logp", "logz", "entropy")}
    for hint in (None, torch.linspace(-1.0, 2.0, 21)):
        hidden, head = case.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = opd_kernels.dense_divergence(
            hidden, head, case.hidden * 0.8, weight + 0.3, opd_kernels.jsd(0.4), token_weight=hint, chunk_bytes=9000, **keywords
        )
        (values * torch.linspace(-1.0, 2.0, 21)).sum().backward()
        name = "dense" if hint is None else "dense_hinted"
        results |= {f"{name}/values": values.detach(), f"{name}/d_hidden": hidden.grad, f"{name}/d_weight": head.grad}
    return results


def shard_equals_whole(rank: int, world: int) -> None:
    case = make_case(21, VOCABULARY, 24, 7, with_bias=True, vocab_size=VALID)
    whole = everything(case, case.weight, case.bias)
    start = sum(SHARDS[world][:rank])
    rows = slice(start, start + SHARDS[world][rank])
    keywords = {"process_group": dist.group.WORLD, "vocab_start": start}
    part = everything(case, case.weight[rows], case.bias[rows], **keywords)
    again = everything(case, case.weight[rows], case.bias[rows], **keywords)
    for name, wanted in whole.items():
        if name.endswith(("d_weight", "d_bias")):
            wanted = wanted[rows]
        assert torch.equal(part[name], again[name]), f"{name} does not repeat"
        if wanted.dtype == torch.int64:
            assert torch.equal(part[name], wanted), name
        elif "/d_" in name:
            tolerance = 1e-5 if name.startswith("dense") else 1e-6  # a divergence's gradient is a difference of near-equal terms
            assert (part[name] - wanted).norm() <= tolerance * whole[name].norm(), (name, relative(part[name], wanted))
        else:
            torch.testing.assert_close(part[name], wanted, rtol=1e-6, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def impossible_column_of_another_rank(rank: int, world: int) -> None:
    """0 * -inf is NaN: ranks that do not own a chosen id of probability zero must not multiply it away."""
    ids = torch.tensor([[1, 30], [30, 2]])
    bias = torch.zeros(40)
    bias[30] = float("-inf")
    rows = slice(0, 25) if rank == 0 else slice(25, 40)
    hidden, weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), torch.ones(40, 4)
    keywords = {"process_group": dist.group.WORLD, "vocab_start": rows.start, "backend": "torch"}
    out = opd_kernels.selected_logprobs(hidden, weight[rows], ids, bias=bias[rows], **keywords)
    torch.testing.assert_close(out.logp.exp(), torch.tensor([[1 / 39, 0.0], [0.0, 1 / 39]]))
    assert out.tail_logp.isfinite().all() and out.entropy.isfinite().all()


def test_an_impossible_column_of_another_rank(tmp_path):
    launch(impossible_column_of_another_rank, 2, tmp_path)


def ranks_agree(rank: int, world: int) -> None:
    """9,000 bytes hold 35, 17 and 250 rows of the shards' columns, of which a power of two is taken; all go by the fewest."""
    columns = SHARDS[3][rank]
    options = LogitOptions(valid_columns=columns, process_group=dist.group.WORLD, chunk_bytes=9000)
    assert row_chunks(projection(torch.zeros(64, 2), torch.zeros(columns, 2), options)).rows == 16
    for flags, wanted in (((False, True, False), True), ((False, False, False), False), ((True, True, True), True)):
        assert any_over_ranks(flags[rank], dist.group.WORLD, torch.device("cpu")) is wanted


def test_ranks_agree_on_the_smallest_chunk_and_on_flags(tmp_path):
    launch(ranks_agree, 3, tmp_path)


@pytest.mark.parametrize("world", sorted(SHARDS))
def test_shards_equal_the_whole(world, tmp_path):
    launch(shard_equals_whole, world, tmp_path)
