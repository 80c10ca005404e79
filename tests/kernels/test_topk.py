"""Top-k scoring: exact ids and order against a stable sort; exact tail of the returned set."""

import opd_kernels
import pytest
import torch
from opd_kernels.topk import topk_of

from tests.kernels.cases import make_case


def stable(x: torch.Tensor, k: int) -> torch.Tensor:
    return x.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 130, 700, 2000, 9001])
@pytest.mark.parametrize("kind", ["random", "ties", "constant", "cluster", "minus_infinity", "signed_zeros"])
def test_ids_equal_a_stable_sort(kind, columns):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(5, columns, generator=generator)
    if kind == "ties":
        x = (x * 2).round()
    elif kind == "constant":
        x = torch.full_like(x, -3.0)
    elif kind == "cluster":
        x[:, columns // 2 : columns // 2 + 40] += 50.0
    elif kind == "minus_infinity":
        x[x < 0.3] = float("-inf")
        x[4] = float("-inf")
    elif kind == "signed_zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    for k in (1, 2, 5, 16, 64, columns):
        if k <= columns:
            values, ids = topk_of(x, k)
            assert torch.equal(ids, stable(x, k)) and torch.equal(values, x.gather(1, ids))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("k", [1, 5, 40, 219])
def test_scores_equal_the_dense_distribution(k, backend):
    case = make_case(15, 219, 24, dtype=torch.float32)
    scores = opd_kernels.topk_logprobs(case.hidden, case.weight, k, backend=backend, temperature=0.8, chunk_bytes=4000)
    logp = (case.hidden.double() @ case.weight.double().T / 0.8).log_softmax(dim=1)
    assert torch.equal(scores.ids, stable((case.hidden @ case.weight.T), k))
    assert (scores.logp - logp.gather(1, scores.ids)).abs().max() < 3e-5
    rest = torch.ones_like(logp, dtype=torch.bool).scatter(1, scores.ids, False)
    wanted = torch.where(rest, logp, float("-inf")).logsumexp(dim=1)
    torch.testing.assert_close(scores.tail_logp.double(), wanted, rtol=0, atol=3e-5)
    assert (scores.entropy + (logp.exp() * logp).sum(dim=1)).abs().max() < 3e-5


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_included_id_stands_first_and_once(backend):
    case = make_case(15, 219, 24)
    plain = opd_kernels.topk_logprobs(case.hidden, case.weight, 6, backend=backend)
    included = torch.where(torch.arange(15) % 2 == 0, plain.ids[:, 3], torch.randint(0, 219, (15,)))
    included[7] = -1
    scores = opd_kernels.topk_logprobs(case.hidden, case.weight, 6, always_include=included, backend=backend)
    assert scores.ids.shape == (15, 7) and torch.equal(scores.ids[:, 0], included)
    for row in range(15):
        wanted = [-1 if id_ == included[row] else id_ for id_ in plain.ids[row].tolist()]
        assert scores.ids[row, 1:].tolist() == wanted
    assert torch.equal(scores.logp == opd_kernels.PAD_LOGP, scores.ids == -1)
    union = torch.where(scores.ids >= 0, scores.logp.exp(), 0.0).sum(dim=1) + scores.tail_logp.exp()
    torch.testing.assert_close(union, torch.ones(15), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padded_columns_are_never_returned(backend):
    case = make_case(8, 130, 16)
    weight = case.weight.clone()
    weight[100:] = 40.0 * case.hidden[0] / case.hidden[0].norm()
    scores = opd_kernels.topk_logprobs(case.hidden, weight, 100, vocab_size=100, backend=backend)
    assert scores.ids.max() < 100 and (scores.tail_logp == float("-inf")).all()
    torch.testing.assert_close(scores.logp.exp().sum(dim=1), torch.ones(8))


@pytest.mark.parametrize("chunk_bytes", [None, 3000])
@pytest.mark.parametrize("k", [4, 70])
def test_student_topk_of_both_paths(k, chunk_bytes):
    case = make_case(10, 300, 16, 5)
    wanted = opd_kernels.topk_logprobs(case.hidden, case.weight, k, backend="reference")
    keywords = {"student_topk": k, "backend": "torch", "chunk_bytes": chunk_bytes}
    out = opd_kernels.selected_logprobs(case.hidden, case.weight, case.ids, **keywords)

    def loss_fn(selected):
        return selected.logp.sum(), {"ids": selected.topk_ids, "logp": selected.topk_logp}

    _, aux = opd_kernels.fused_sparse_loss(case.hidden, case.weight, case.ids, loss_fn, **keywords)
    for ids, logp in ((out.topk_ids, out.topk_logp), (aux["ids"], aux["logp"])):
        assert torch.equal(ids, wanted.ids)
        torch.testing.assert_close(logp, wanted.logp, rtol=0, atol=3e-5)


def test_the_top_token_keeps_the_digits_of_one_minus_p():
    logits = torch.zeros(200)
    logits[33] = 19.0
    scores = opd_kernels.topk_logprobs(torch.ones(1, 1), logits[:, None], 2, backend="torch")
    wanted = 199 / (199 + torch.tensor(19.0, dtype=torch.float64).exp())
    assert abs(-torch.expm1(scores.logp[0, 0].double()) / wanted - 1) < 1e-5
