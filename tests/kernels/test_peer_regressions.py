"""Bugs found in other implementations of this arithmetic, each as a test."""

import opd_kernels
import pytest
import torch

from tests.kernels.cases import Case, make_case, oracle, relative, run, upstream_of

BACKENDS = ("reference", "torch")


@pytest.mark.parametrize("columns", [65, 127, 129, 191, 1187 % 128 + 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_phantom_columns(columns, backend):
    """A tile that ends beyond the vocabulary must not add exp(0) a missing column: all true logits are -40 here."""
    hidden, weight = torch.ones(2, 1), torch.full((columns, 1), -40.0)
    ids = torch.tensor([[0, columns - 1]] * 2)
    out = opd_kernels.selected_logprobs(hidden, weight, ids, backend=backend, chunk_bytes=64 * 2 * 8)
    wanted = -torch.tensor(float(columns)).log()
    torch.testing.assert_close(out.logp, wanted.expand(2, 2))
    torch.testing.assert_close(out.entropy, -wanted.expand(2))
    scores = opd_kernels.topk_logprobs(hidden, weight, 5, backend=backend, chunk_bytes=64 * 2 * 8)
    assert torch.equal(scores.ids, torch.arange(5).expand(2, 5))
    torch.testing.assert_close(scores.logz, -40.0 - wanted.expand(2))
    same = opd_kernels.dense_divergence(hidden, weight, hidden, weight - 3.0, opd_kernels.reverse_kl(), backend=backend)
    assert same.abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_a_zero_logit(backend):
    """Padded rows of zeros would be the likeliest tokens of a model whose true logits are all negative."""
    case = make_case(5, 50, 8, 3)
    weight = torch.cat([case.weight, torch.zeros(14, 8)])
    bias = torch.cat([torch.full((50,), -60.0), torch.zeros(14)])
    padded = opd_kernels.selected_logprobs(case.hidden, weight, case.ids, bias=bias, vocab_size=50, backend=backend)
    plain = opd_kernels.selected_logprobs(case.hidden, case.weight, case.ids, bias=bias[:50], backend=backend)
    for name in ("logp", "tail_logp", "logz", "entropy"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name), rtol=0, atol=2e-5)
    constants = opd_kernels.HeadConstants(bias=bias)
    divergence = opd_kernels.dense_divergence(
        case.hidden, weight, case.hidden * 0.5, weight, opd_kernels.jsd(), vocab_size=50, constants_s=constants, backend=backend
    )
    wanted = opd_kernels.dense_divergence(case.hidden, case.weight, case.hidden * 0.5, case.weight, opd_kernels.jsd(), backend=backend)
    torch.testing.assert_close(divergence, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_comes_after_the_softcap(backend):
    """Masked before the cap, a padded column becomes -cap: here it would be as likely as the saturated true ones."""
    hidden, weight = torch.ones(1, 1), torch.full((12, 1), -1e4)
    out = opd_kernels.selected_logprobs(hidden, weight, torch.tensor([[3]]), softcap=5.0, vocab_size=8, backend=backend)
    torch.testing.assert_close(out.logp.exp(), torch.tensor([[1 / 8]]))
    torch.testing.assert_close(out.logz, torch.tensor([-5.0]) + torch.tensor(8.0).log())


@pytest.mark.parametrize("path", ["composable", "fused"])
@pytest.mark.parametrize("margin", [3.0, 5.0, 8.0, 12.0, 18.0])
def test_confident_tokens_keep_their_gradient_in_bf16(margin, path):
    """p from 0.3 to 0.999999: a dense part rounded to bf16 plus an exact sparse part is off by 19 % at 0.99 and 110 % at 0.999."""
    case = make_case(16, 120, 32, 1, dtype=torch.bfloat16, logit_std=1.0)
    weight = case.weight.clone()
    weight[7] = 1.0
    hidden = case.hidden.clone()
    hidden += ((margin - hidden.float().sum(dim=1, keepdim=True)) / 32).to(torch.bfloat16)
    confident = Case(hidden=hidden, weight=weight, ids=torch.full((16, 1), 7))
    upstream = upstream_of(confident, ("logp",))
    actual, expected = run(confident, upstream, path=path), oracle(confident, upstream)
    assert relative(actual.d_hidden, expected.d_hidden) < 1e-2 and relative(actual.d_weight, expected.d_weight) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tail_belongs_to_the_ids_it_comes_with(backend):
    """A tail of one set beside the ids of another (a teacher's top k beside the student's) is stale: each set gets its own."""
    case = make_case(6, 80, 8, 4)
    p = (case.hidden.double() @ case.weight.double().T).softmax(dim=1)
    fifth = p.argsort(dim=1, descending=True)[:, 4]
    plain = opd_kernels.topk_logprobs(case.hidden, case.weight, 4, backend=backend)
    union = opd_kernels.topk_logprobs(case.hidden, case.weight, 4, always_include=fifth, backend=backend)
    rescored = opd_kernels.selected_logprobs(case.hidden, case.weight, union.ids, backend=backend)
    for scores in (plain, union):
        rest = p.scatter(1, scores.ids, 0.0).sum(dim=1)
        torch.testing.assert_close(scores.tail_logp.double(), rest.log(), rtol=0, atol=1e-5)
    torch.testing.assert_close(rescored.tail_logp, union.tail_logp, rtol=0, atol=1e-6)
    assert (union.tail_logp < plain.tail_logp).all()


def test_per_token_temperature_divides_fp32_logits():
    """Dividing bf16 logits in bf16 (or by one temperature for all) is off by 1e-2."""
    case = make_case(9, 60, 16, 3, dtype=torch.bfloat16)
    temperature = torch.linspace(0.31, 1.7, 9)
    out = opd_kernels.selected_logprobs(case.hidden, case.weight, case.ids, temperature=temperature, backend="torch")
    x = case.hidden.double() @ case.weight.double().T / temperature[:, None].double()
    wanted = torch.where(case.ids >= 0, x.log_softmax(dim=1).gather(1, case.ids.clamp(min=0)), opd_kernels.PAD_LOGP)
    torch.testing.assert_close(out.logp.double(), wanted, rtol=0, atol=1e-4)
    assert out.logp.dtype == torch.float32
