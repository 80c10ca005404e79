"""Values and gradients of the torch backend against dense fp64 autograd on the same rounded inputs."""

import itertools

import opd_kernels
import pytest
import torch
from opd_kernels.selection import first_occurrences

from tests.kernels.cases import OUTPUTS, Case, assert_same, make_case, oracle, relative, run, upstream_of

PATHS = ("composable", "fused")
SMALL = 4096  # bytes of scratch: many ragged tiles
HEADS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "per_token": {"temperature": torch.linspace(0.3, 2.0, 21)},
    "bias": {"with_bias": True},
    "softcap": {"softcap": 5.0},
    "softcap30": {"softcap": 30.0, "temperature": 0.7},
    "scale": {"logit_scale": 0.25},
    "padded": {"vocab_size": 207},
    "all": {
        "with_bias": True, "softcap": 30.0, "logit_scale": 0.5, "vocab_size": 207, "temperature": torch.linspace(0.5, 2.0, 21)
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head", HEADS)
def test_equals_fp64_dense(head, path, dtype):
    case = make_case(dtype=dtype, **HEADS[head])
    upstream = upstream_of(case)
    largest = 30.0 / HEADS[head].get("temperature", 1.0) if head == "cold" else 30.0
    assert_same(
        run(case, upstream, path=path, chunk_bytes=SMALL),
        oracle(case, upstream),
        value=3e-5 * max(1.0, largest / 30),
        gradient=5e-6 if dtype == torch.float32 else 8e-3,
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("names", [("logp",), ("tail_logp",), ("logz",), ("entropy",), OUTPUTS], ids="+".join)
def test_each_output_alone(names, path):
    case = make_case(seed=3, softcap=8.0, with_bias=True)
    upstream = upstream_of(case, names)
    assert_same(run(case, upstream, path=path, chunk_bytes=SMALL), oracle(case, upstream), value=3e-5, gradient=5e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "shape",
    [(1, 5, 3, 1), (2, 65, 7, 65), (5, 64, 16, 3), (7, 257, 9, 256), (33, 130, 33, 1), (64, 128, 32, 8)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_ragged_shapes(shape, path):
    tokens, vocabulary, hidden_size, chosen = shape
    case = make_case(tokens, vocabulary, hidden_size, chosen, seed=5)
    upstream = upstream_of(case)
    assert_same(run(case, upstream, path=path, chunk_bytes=1500), oracle(case, upstream), value=3e-5, gradient=5e-6)


@pytest.mark.parametrize("path", PATHS)
def test_all_columns_chosen_leaves_no_tail(path):
    """K = V, each id once: the tail is -inf, takes no gradient, and everything else is finite."""
    case = make_case(4, 17, 5, 17)
    ids = torch.stack([torch.randperm(17, generator=torch.Generator().manual_seed(row)) for row in range(4)])
    case = Case(hidden=case.hidden, weight=case.weight, ids=ids)
    upstream = upstream_of(case, ("logp", "logz", "entropy"))
    result = run(case, upstream, path=path, chunk_bytes=300)
    assert (result.outputs["tail_logp"] == float("-inf")).all()
    assert_same(result, oracle(case, upstream), value=3e-5, gradient=5e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_tail_of_nothing_passes_no_gradient_on(backend):
    """K = V in the first row alone: its tail is a constant, whatever gradient arrives there."""
    hidden, weight = torch.randn(2, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, -1]])
    out = opd_kernels.selected_logprobs(hidden, weight, ids, backend=backend)
    (grad,) = torch.autograd.grad(out.tail_logp, hidden, torch.ones(2))
    assert out.tail_logp.isfinite().tolist() == [False, True]
    assert not grad[0].any() and grad[1].all()


def test_first_occurrences_by_hand():
    ids = torch.tensor([[4, -1, 4, 0], [-1, -1, 7, 7]])
    assert first_occurrences(ids).tolist() == [[True, False, False, True], [False, False, True, False]]


@pytest.mark.parametrize("path", PATHS)
def test_more_ids_than_columns(path):
    """K > V: several scorers' ids side by side, with duplicates and pads, over a tiny vocabulary."""
    case = make_case(6, 11, 8, 30)
    upstream = upstream_of(case, ("logp", "logz", "entropy"))
    assert_same(run(case, upstream, path=path, chunk_bytes=300), oracle(case, upstream), value=3e-5, gradient=5e-6)


@pytest.mark.parametrize("path", PATHS)
def test_pads_take_no_gradient(path):
    case = make_case(6, 40, 8, 5)
    case = Case(hidden=case.hidden, weight=case.weight, ids=torch.full((6, 5), -1))
    result = run(case, upstream_of(case, ("logp",)), path=path)
    assert (result.outputs["logp"] == opd_kernels.PAD_LOGP).all()
    assert result.outputs["tail_logp"].abs().max() < 1e-6  # nothing chosen: the tail is everything
    assert not result.d_hidden.any() and not result.d_weight.any()


def test_a_gradient_at_a_pad_is_ignored():
    case = make_case(5, 40, 8, 4)
    hidden = case.hidden.clone().requires_grad_()
    logp = opd_kernels.selected_logprobs(hidden, case.weight, case.ids, backend="torch").logp
    (with_pads,) = torch.autograd.grad(logp.sum(), hidden, retain_graph=True)
    (without,) = torch.autograd.grad(torch.where(case.ids >= 0, logp, 0.0).sum(), hidden)
    assert torch.equal(with_pads, without)


@pytest.mark.parametrize("path", PATHS)
def test_ids_at_the_edges_of_tiles(path):
    """Tiles are 64 columns wide here: first and last columns of each, in descending order, int32 and int64."""
    case = make_case(3, 200, 8, 8)
    ids = torch.tensor([199, 192, 191, 128, 127, 64, 63, 0]).expand(3, 8)
    upstream = upstream_of(Case(hidden=case.hidden, weight=case.weight, ids=ids))
    results = []
    for dtype in (torch.int32, torch.int64):
        edges = Case(hidden=case.hidden, weight=case.weight, ids=ids.to(dtype))
        results.append(run(edges, upstream, path=path, chunk_bytes=3 * 64 * 8))
    assert_same(results[0], oracle(Case(hidden=case.hidden, weight=case.weight, ids=ids), upstream), value=3e-5, gradient=5e-6)
    assert torch.equal(results[0].d_weight, results[1].d_weight)


def test_duplicates_add_their_gradients():
    """Three copies of an id with gradients 1, 2, 3 equal one copy with gradient 6; the log-probabilities are equal."""
    case = make_case(2, 30, 6, 3)
    ids = torch.tensor([[4, 4, 4], [9, 2, 9]])
    weights = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 5.0]])
    hidden = case.hidden.clone().requires_grad_()
    logp = opd_kernels.selected_logprobs(hidden, case.weight, ids, backend="torch").logp
    assert torch.equal(logp[0], logp[0, :1].expand(3))
    (three,) = torch.autograd.grad((logp * weights).sum(), hidden)
    single = opd_kernels.selected_logprobs(hidden, case.weight, torch.tensor([[4], [9]]), backend="torch").logp
    (one,) = torch.autograd.grad((single * 6.0).sum(), hidden)
    torch.testing.assert_close(three, one, rtol=1e-6, atol=1e-6)


def test_a_hand_computed_row():
    """Logits ln 1, ln 2, ln 3, ln 4: p = 0.1, 0.2, 0.3, 0.4."""
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()[:, None]
    selected = opd_kernels.selected_logprobs(torch.ones(1, 1), weight, torch.tensor([[1, 3]]), backend="torch")
    torch.testing.assert_close(selected.logp.exp(), torch.tensor([[0.2, 0.4]]))
    torch.testing.assert_close(selected.tail_logp.exp(), torch.tensor([0.4]))
    torch.testing.assert_close(selected.logz.exp(), torch.tensor([10.0]))
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(selected.entropy, -(p * p.log()).sum()[None])


def test_reference_equals_log_softmax():
    case = make_case(9, 50, 8, 5).cast(torch.float64)
    selected = opd_kernels.selected_logprobs(case.hidden, case.weight, case.ids, backend="reference")
    logp = (case.hidden @ case.weight.T).log_softmax(dim=1)
    assert torch.allclose(selected.logp[case.ids >= 0], logp.gather(1, case.ids.clamp(min=0))[case.ids >= 0], rtol=0, atol=1e-13)
    assert torch.allclose(selected.entropy, torch.distributions.Categorical(logits=logp).entropy(), rtol=0, atol=1e-13)
    for row, ids in enumerate(case.ids):
        rest = 1 - logp[row].exp()[ids[ids >= 0].unique()].sum()
        assert abs(selected.tail_logp[row].exp().item() - rest.item()) < 1e-13


@pytest.mark.parametrize("operation", ["composable", "fused", "dense", "dense_weighted"])
@pytest.mark.parametrize("decoration", ["plain", "bias+softcap"])
def test_gradcheck(operation, decoration):
    """Finite differences in fp64 through the chunked code, over several tiles."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight, other, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in ((3, 5), (17, 5), (17, 5), (17,))
    )
    ids = torch.tensor([[3, 16, -1, 0], [5, 5, 2, 9], [-1, 1, 7, 12]])
    keywords = {"chunk_bytes": 400, "backend": "torch", "temperature": 0.8}
    decorated = decoration != "plain"
    keywords |= {"softcap": 2.0} if decorated and "dense" not in operation else {}

    def composable(hidden, weight, bias):
        out = opd_kernels.selected_logprobs(hidden, weight, ids, bias=bias if decorated else None, **keywords)
        return out.logp, out.tail_logp, out.logz, out.entropy

    def fused(hidden, weight, bias):
        def loss_fn(selected, ids):
            per_token = torch.where(ids >= 0, selected.logp, 0.0).square().sum(dim=1) + selected.tail_logp * selected.entropy
            return (per_token + selected.logz).sum(), {}

        return opd_kernels.fused_sparse_loss(hidden, weight, ids, loss_fn, (ids,), bias=bias if decorated else None, **keywords)[0]

    teacher = hidden.detach() * 0.7

    def dense(hidden, weight, bias):
        constants = opd_kernels.HeadConstants(bias=bias, softcap=2.0) if decorated else opd_kernels.HeadConstants()
        weights = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
        divergence = opd_kernels.dense_divergence(
            hidden, weight, teacher, other.detach(), opd_kernels.jsd(0.3), constants_s=constants,
            token_weight=weights if operation == "dense_weighted" else None, **keywords,
        )  # fmt: skip
        return (divergence * weights).sum() if operation == "dense_weighted" else divergence

    function = {"composable": composable, "fused": fused}.get(operation, dense)
    assert torch.autograd.gradcheck(function, (hidden, weight, bias), nondet_tol=0.0)


def test_empty_batch_gives_connected_zeros():
    weight, bias = torch.randn(9, 4, requires_grad=True), torch.randn(9, requires_grad=True)
    for operation in ("composable", "fused", "dense"):
        hidden = torch.randn(0, 4, requires_grad=True)
        ids = torch.zeros(0, 3, dtype=torch.int64)
        if operation == "composable":
            out = opd_kernels.selected_logprobs(hidden, weight, ids, bias=bias, student_topk=2)
            assert out.logp.shape == (0, 3) and out.topk_ids.shape == (0, 2)
            loss = out.logp.sum() + out.tail_logp.sum()
        elif operation == "fused":
            loss, aux = opd_kernels.fused_sparse_loss(hidden, weight, ids, lambda s: (s.logp.sum(), {"d": s.logz}), bias=bias)
            assert aux["d"].shape == (0,)
        else:
            constants = opd_kernels.HeadConstants(bias=bias)
            divergence = opd_kernels.dense_divergence(
                hidden, weight, hidden.detach(), weight.detach(), opd_kernels.reverse_kl(), constants_s=constants
            )
            assert divergence.shape == (0,)
            loss = divergence.sum()
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        assert loss.item() == 0.0 and all(not grad.any() for grad in grads)
    scores = opd_kernels.topk_logprobs(torch.randn(0, 4), weight, 3, always_include=torch.zeros(0, dtype=torch.int64))
    assert scores.ids.shape == (0, 4) and scores.tail_logp.shape == (0,)


@pytest.mark.parametrize("path", PATHS)
def test_non_contiguous_inputs(path):
    case = make_case(12, 90, 16, 4)
    strided = Case(hidden=case.hidden.T.contiguous().T, weight=case.weight.repeat(1, 2)[:, ::2], ids=case.ids.T.contiguous().T)
    strided = Case(hidden=strided.hidden, weight=torch.stack([case.weight, case.weight], dim=2)[:, :, 0], ids=strided.ids)
    assert not strided.hidden.is_contiguous() and not strided.weight.is_contiguous() and not strided.ids.is_contiguous()
    upstream = upstream_of(case)
    assert_same(run(strided, upstream, path=path), oracle(case, upstream), value=3e-5, gradient=5e-6)


@pytest.mark.parametrize(("needs_hidden", "needs_weight"), list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("path", PATHS)
def test_only_what_needs_a_gradient_gets_one(path, needs_hidden, needs_weight):
    case = make_case(8, 60, 12, 3)
    hidden = case.hidden.clone().requires_grad_(needs_hidden)
    weight = case.weight.clone().requires_grad_(needs_weight)
    if path == "composable":
        loss = opd_kernels.selected_logprobs(hidden, weight, case.ids, backend="torch").logz.sum()
    else:
        loss, _ = opd_kernels.fused_sparse_loss(hidden, weight, case.ids, lambda s: (s.logz.sum(), {}), backend="torch")
    assert loss.requires_grad == (needs_hidden or needs_weight)
    if loss.requires_grad:
        loss.backward()
    expected = oracle(case, {"logz": torch.ones(8, dtype=torch.float64)})
    for tensor, wanted, needed in ((hidden, expected.d_hidden, needs_hidden), (weight, expected.d_weight, needs_weight)):
        assert (tensor.grad is not None) == needed
        assert not needed or relative(tensor.grad, wanted) < 5e-6
