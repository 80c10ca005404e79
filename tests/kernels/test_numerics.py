"""Accuracy where naive formulas lose it: confident tokens, tiny tails, near-equal models, shifts, infinities."""

import opd_kernels
import pytest
import torch
from opd_kernels.dlogits import dlogits_
from opd_kernels.placement import place
from opd_kernels.products import projection
from opd_kernels.selection import Coefficients
from opd_kernels.types import LogitOptions

from tests.kernels.cases import Case, assert_same, make_case, oracle, relative, run, upstream_of

PATHS = ("composable", "fused")


def logits_case(logits: torch.Tensor, ids: torch.Tensor) -> Case:
    """A head of width 1 a token: weight holds the logits of one token, so that they are exactly representable."""
    return Case(hidden=torch.ones(1, 1), weight=logits[:, None].contiguous(), ids=ids)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("margin", [2.0, 6.0, 9.0, 12.0, 15.0, 18.0])
def test_confident_tokens_keep_the_digits_of_one_minus_p(margin, path):
    """p from 0.3 to 0.999998: relative error of 1 - p, and of the gradient (which is proportional to it)."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(40, generator=generator)
    logits[11] = margin
    case = logits_case(logits, torch.tensor([[11]]))
    upstream = {"logp": torch.ones(1, 1, dtype=torch.float64)}
    actual, expected = run(case, upstream, path=path), oracle(case, upstream)
    rest, wanted = -torch.expm1(actual.outputs["logp"].double()), -torch.expm1(expected.outputs["logp"])
    assert relative(rest, wanted) < 1e-5
    assert relative(actual.d_weight, expected.d_weight) < 1e-5
    assert relative(actual.outputs["entropy"], expected.outputs["entropy"]) < 1e-5
    assert relative(actual.outputs["tail_logp"].exp(), expected.outputs["tail_logp"].exp()) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("exponent", range(1, 13))
def test_tail_masses_down_to_1e_12(exponent, path):
    """log1mexp of fp32 log-probabilities is off by 16 % at 4e-7 already; the complement sum is not."""
    generator = torch.Generator().manual_seed(exponent)
    logits = torch.randn(300, generator=generator) - exponent * 2.302585
    logits[[5, 77, 150]] = torch.tensor([1.0, 0.5, 0.2]) + 5.0
    case = logits_case(logits, torch.tensor([[5, 77, 150]]))
    upstream = {"tail_logp": torch.ones(1, dtype=torch.float64)}
    actual, expected = run(case, upstream, path=path, chunk_bytes=4096), oracle(case, upstream)
    assert (actual.outputs["tail_logp"].double() - expected.outputs["tail_logp"]).abs().max() < 1e-5
    assert relative(actual.d_weight, expected.d_weight) < 1e-5


@pytest.mark.parametrize("distance", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_near_teachers_keep_their_gradient(distance, dtype, weighted):
    """With logits rounded to bf16 this gradient is off by 64 % when student and teacher are close."""
    case = make_case(16, 300, 32, dtype=dtype, logit_std=5.6)
    teacher = (case.weight.float() + distance * 0.2 * torch.randn(300, 32, generator=torch.Generator().manual_seed(1))).to(dtype)
    divergences = (opd_kernels.forward_kl(), opd_kernels.reverse_kl(), opd_kernels.jsd(), opd_kernels.skew_forward_kl(0.1))
    for divergence in divergences:
        grads = {}
        for name, to in (("torch", dtype), ("reference", torch.float64)):
            hidden = case.hidden.to(to).clone().requires_grad_()
            values = opd_kernels.dense_divergence(
                hidden, case.weight.to(to), case.hidden.to(to), teacher.to(to), divergence, backend=name,
                token_weight=torch.ones(16) if weighted else None,
            )  # fmt: skip
            values.sum().backward()
            grads[name] = hidden.grad
        assert relative(grads["torch"], grads["reference"]) < 5e-3


@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_a_shift_of_all_logits_moves_only_the_normalizer(shift):
    case = make_case(9, 150, 16, 5)
    selected = [
        opd_kernels.selected_logprobs(case.hidden, case.weight, case.ids, bias=torch.full((150,), by), backend="torch")
        for by in (0.0, shift)
    ]
    assert (selected[1].logz - selected[0].logz - shift).abs().max() < 2e-5
    for name in ("logp", "tail_logp", "entropy"):
        assert (getattr(selected[1], name) - getattr(selected[0], name)).abs().max() < 2e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("level", [-3000.0, -200.0, 90.0, 3000.0])
def test_all_logits_far_from_zero(level, path):
    """A running maximum that starts at 0 gives NaN here where all logits are very negative (a known bug elsewhere)."""
    case = make_case(5, 70, 8, 4, logit_std=3.0)
    case = Case(hidden=case.hidden, weight=case.weight, ids=case.ids, bias=torch.full((70,), level))
    upstream = upstream_of(case)
    scale = max(1.0, abs(level) / 30)
    assert_same(run(case, upstream, path=path), oracle(case, upstream), value=3e-5 * scale, gradient=5e-6 * scale)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_infinite_logits_have_no_probability(softcap, path):
    """-inf through the bias: p = 0 there, also under a softcap (whose tanh would return -cap), and every result is finite elsewhere."""
    case = make_case(6, 90, 8, 4, softcap=softcap)
    bias = torch.zeros(90)
    bias[[3, 64, 65, 89]] = float("-inf")
    case = Case(hidden=case.hidden, weight=case.weight, ids=torch.arange(24).view(6, 4) + 5, bias=bias, keywords=case.keywords)
    upstream = upstream_of(case)
    actual = run(case, upstream, path=path, chunk_bytes=2000)
    keep = torch.isfinite(bias)
    kept_ids = (torch.cumsum(keep, 0) - 1)[case.ids]
    dense = Case(hidden=case.hidden, weight=case.weight[keep], ids=kept_ids, keywords=case.keywords)
    expected = oracle(dense, upstream)
    for name, wanted in expected.outputs.items():
        torch.testing.assert_close(actual.outputs[name].double(), wanted, rtol=0, atol=3e-5)
    assert relative(actual.d_hidden, expected.d_hidden) < 5e-6
    assert relative(actual.d_weight[keep], expected.d_weight) < 5e-6
    assert not actual.d_weight[~keep].any()


def test_a_chosen_id_of_probability_zero_reads_minus_infinity():
    bias = torch.tensor([0.0, float("-inf"), 0.0, 0.0])
    out = opd_kernels.selected_logprobs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([[0, 1]]), bias=bias, backend="torch")
    assert out.logp[0, 1] == float("-inf")
    torch.testing.assert_close(out.logp[0, 0].exp(), torch.tensor(1 / 3))
    torch.testing.assert_close(out.entropy, torch.tensor([3.0]).log())


def test_a_row_without_possible_columns_is_quiet():
    hidden = torch.ones(1, 2, requires_grad=True)
    out = opd_kernels.selected_logprobs(hidden, torch.ones(4, 2), torch.tensor([[0, 1]]), bias=torch.full((4,), float("-inf")))
    assert out.logz == float("-inf") and out.entropy == 0.0 and (out.logp == float("-inf")).all()
    (grad,) = torch.autograd.grad((out.logp, out.entropy, out.logz), hidden, [torch.ones_like(part) for part in (out.logp, out.entropy, out.logz)])
    assert not grad.any()


@pytest.mark.parametrize("slope", [None, 0.5])
def test_gradients_far_from_zero_lose_nothing_to_the_base_of_the_exponential(slope):
    """Logits and references near 1000 that fp32 holds exactly: exp(x - reference) * (scale + slope * (x - reference)) to a few ulp."""
    reference = 1000.0 + torch.arange(16.0) / 16
    x = reference[:, None] - torch.arange(40.0) / 8
    given = Coefficients(
        reference=reference, scale=torch.ones(16), slope=None if slope is None else torch.full((16,), slope), selected=torch.zeros(16, 1)
    )
    hidden, weight = torch.zeros(16, 1), torch.zeros(40, 1)
    head = projection(hidden, weight, LogitOptions(valid_columns=40))
    none = place(torch.full((16, 1), -1), head, tile_rows=16, tile_columns=40).tile(0, 0)
    distance = (x - reference[:, None]).double()
    wanted = distance.exp() * (1.0 + (slope or 0.0) * distance)
    found = dlogits_(x.clone(), head, slice(0, 16), given, none, None if slope is None else torch.empty_like(x), None)
    torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_nan_passes_through_its_own_row(path):
    case = make_case(6, 90, 8, 4)
    hidden = case.hidden.clone()
    hidden[4, 2] = float("nan")
    upstream = upstream_of(case, ("logp", "tail_logp", "logz", "entropy"))
    actual = run(Case(hidden=hidden, weight=case.weight, ids=case.ids), upstream, path=path, chunk_bytes=2000)
    clean = run(case, upstream, path=path, chunk_bytes=2000)
    rows = torch.arange(6) != 4
    for name in ("tail_logp", "logz", "entropy"):
        assert actual.outputs[name][4].isnan() and torch.equal(actual.outputs[name][rows], clean.outputs[name][rows])
    assert actual.outputs["logp"][4].isnan().all() and actual.d_hidden[4].isnan().all()
    assert torch.equal(actual.d_hidden[rows], clean.d_hidden[rows]) and actual.d_weight.isnan().any()


def test_entropy_of_a_sharp_row_keeps_its_digits():
    """Entropy 1e-5 under logits near 50: the difference logz - E[x] has no such digits in fp32."""
    logits = torch.full((60,), 30.0)
    logits[7] = 48.0
    out = opd_kernels.selected_logprobs(torch.ones(1, 1), logits[:, None], torch.tensor([[3]]), backend="torch")
    wanted = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert abs(out.entropy.item() / wanted.item() - 1) < 2e-2
    chosen = opd_kernels.selected_logprobs(torch.ones(1, 1), logits[:, None], torch.tensor([[7]]), backend="torch")
    assert abs(chosen.entropy.item() / wanted.item() - 1) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_directional_derivatives_are_unbiased(path):
    """Signed error of d loss along random directions of W, over 1000 rows: rounding must not lean to one side."""
    case = make_case(1000, 200, 16, 4, dtype=torch.bfloat16, logit_std=5.0, seed=11)
    upstream = {"logp": torch.full((1000, 4), -1.0, dtype=torch.float64)}
    actual, expected = run(case, upstream, path=path), oracle(case, upstream)
    directions = torch.randn(64, 200, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    slopes = (directions * actual.d_weight.double()).sum(dim=(1, 2))
    wanted = (directions * expected.d_weight).sum(dim=(1, 2))
    assert ((slopes - wanted) * wanted.sign()).mean().abs() / wanted.abs().mean() < 3e-4
