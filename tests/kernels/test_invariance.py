"""Results that must not depend on chunking or order, and must repeat bit for bit."""

import opd_kernels
import pytest
import torch

from tests.kernels.cases import OUTPUTS, Case, make_case, relative, run, upstream_of

PATHS = ("composable", "fused")


def equal_bits(left, right) -> bool:
    outputs = all(torch.equal(left.outputs[name], right.outputs[name]) for name in OUTPUTS)
    return outputs and torch.equal(left.d_hidden, right.d_hidden) and torch.equal(left.d_weight, right.d_weight)


def close(left, right) -> bool:
    outputs = max((left.outputs[name] - right.outputs[name]).abs().max() for name in OUTPUTS)
    return outputs < 1e-5 and relative(left.d_hidden, right.d_hidden) < 1e-6 and relative(left.d_weight, right.d_weight) < 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_repeats_bitwise(path):
    case = make_case(30, 300, 16, 6, softcap=9.0, with_bias=True)
    upstream = upstream_of(case)
    first = run(case, upstream, path=path, chunk_bytes=9000)
    assert all(equal_bits(first, run(case, upstream, path=path, chunk_bytes=9000)) for _ in range(5))


@pytest.mark.parametrize("path", PATHS)
def test_chunk_sizes_do_not_matter(path):
    case = make_case(37, 301, 16, 6)
    upstream = upstream_of(case)
    whole = run(case, upstream, path=path)
    for chunk_bytes in (1, 700, 3000, 20_000, 100_000):
        assert close(run(case, upstream, path=path, chunk_bytes=chunk_bytes), whole)


def test_fused_equals_composable():
    case = make_case(37, 301, 16, 6, with_bias=True, softcap=20.0)
    upstream = upstream_of(case)
    assert close(run(case, upstream, path="fused", chunk_bytes=9000), run(case, upstream, path="composable", chunk_bytes=9000))


@pytest.mark.parametrize("path", PATHS)
def test_order_of_tokens_does_not_matter(path):
    case = make_case(24, 150, 16, 5)
    upstream = upstream_of(case)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = Case(hidden=case.hidden[order], weight=case.weight, ids=case.ids[order])
    left = run(case, upstream, path=path, chunk_bytes=3000)
    right = run(shuffled, {name: value[order] for name, value in upstream.items()}, path=path, chunk_bytes=3000)
    for name in OUTPUTS:
        assert (left.outputs[name][order] - right.outputs[name]).abs().max() < 1e-5
    assert relative(right.d_hidden, left.d_hidden[order]) < 1e-6 and relative(right.d_weight, left.d_weight) < 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_order_of_ids_does_not_matter(path):
    case = make_case(24, 150, 16, 5)
    upstream = upstream_of(case)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = Case(hidden=case.hidden, weight=case.weight, ids=case.ids[:, order])
    left = run(case, upstream, path=path)
    right = run(shuffled, {**upstream, "logp": upstream["logp"][:, order]}, path=path)
    assert (left.outputs["logp"][:, order] - right.outputs["logp"]).abs().max() < 1e-6
    assert (left.outputs["tail_logp"] - right.outputs["tail_logp"]).abs().max() < 1e-6
    assert relative(right.d_hidden, left.d_hidden) < 1e-6


def test_top_k_does_not_depend_on_chunks():
    case = make_case(20, 400, 8, 3)
    whole = opd_kernels.topk_logprobs(case.hidden, case.weight, 9, backend="torch")
    for chunk_bytes in (1, 4000, 16_000):
        chunked = opd_kernels.topk_logprobs(case.hidden, case.weight, 9, backend="torch", chunk_bytes=chunk_bytes)
        assert torch.equal(chunked.ids, whole.ids)
        assert (chunked.logp - whole.logp).abs().max() < 1e-5 and (chunked.tail_logp - whole.tail_logp).abs().max() < 1e-5
