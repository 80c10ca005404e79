"""The four operations on the Triton backend, interpreted, against the dense reference in fp64 on the same rounded inputs."""

import opd_kernels
import pytest
import torch
from opd_kernels import triton_rows
from opd_kernels.types import LogitOptions

from tests.kernels.cases import OUTPUTS, Case, assert_same, make_case, oracle, relative, run, upstream_of
from tests.kernels.test_dense_divergence import KINDS, gradients
from tests.kernels.triton_cases import shrink_launches

PATHS = ("composable", "fused")
SMALL = 3000  # bytes of scratch: several ragged chunks and tiles
TOKENS, COLUMNS, WIDTH, CHOSEN = 7, 141, 12, 5
HEADS = {
    "plain": {},
    "cold": {"temperature": 0.3, "logit_std": 2.0},
    "softcap": {"softcap": 5.0},
    "all": {"with_bias": True, "softcap": 30.0, "logit_scale": 0.5, "vocab_size": 129, "temperature": torch.linspace(0.5, 2.0, TOKENS)},
}


@pytest.fixture(autouse=True)
def poisoned_memory_and_small_launches(monkeypatch):
    shrink_launches(monkeypatch.setattr)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def triton_run(case: Case, upstream, path: str, chunk_bytes: int = SMALL):
    return run(case, upstream, path=path, backend="triton", chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head", HEADS)
def test_equals_fp64_dense(head, path, dtype):
    case = make_case(TOKENS, COLUMNS, WIDTH, CHOSEN, dtype=dtype, **HEADS[head])
    upstream = upstream_of(case)
    actual = triton_run(case, upstream, path)
    assert_same(actual, oracle(case, upstream), value=3e-5, gradient=5e-6 if dtype == torch.float32 else 8e-3)
    assert not actual.d_weight[case.keywords.get("vocab_size", COLUMNS) :].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_one_output_at_a_time(name, path):
    case = make_case(4, COLUMNS, WIDTH, CHOSEN)
    upstream = upstream_of(case, (name,))
    assert_same(triton_run(case, upstream, path, 1 << 20), oracle(case, upstream), value=3e-5, gradient=5e-6)


@pytest.mark.parametrize(("tokens", "columns", "width", "chosen"), [(1, 1, 1, 1), (1, 65, 3, 65), (3, 129, 5, 1), (2, 20, 4, 19), (5, 64, 7, 3)])
@pytest.mark.parametrize("path", PATHS)
def test_ragged_shapes(path, tokens, columns, width, chosen):
    case = make_case(tokens, columns, width, chosen)
    if chosen == columns:  # everything chosen: no tail
        case = Case(hidden=case.hidden, weight=case.weight, ids=torch.arange(columns).flip(0).repeat(tokens, 1))
    upstream = upstream_of(case)
    expected = oracle(case, upstream_of(case, ("logp", "logz", "entropy")) if chosen == columns else upstream)
    actual = triton_run(case, upstream, path, 700)
    assert_same(actual, expected, value=3e-5, gradient=5e-6)
    assert (actual.outputs["tail_logp"] == float("-inf")).all() == (chosen == columns)


@pytest.mark.parametrize("path", PATHS)
def test_many_ids_at_the_edges_of_blocks(path):
    ids = torch.tensor([[0, 63, 64, 127, 128, 140, -1, 64], [140, 0, 0, 0, -1, -1, 128, 1], [-1] * 8])
    case = Case(hidden=make_case(3, COLUMNS, WIDTH, 2).hidden, weight=make_case(3, COLUMNS, WIDTH, 2).weight, ids=ids)
    upstream = upstream_of(case)
    actual = triton_run(case, upstream, path)
    assert_same(actual, oracle(case, upstream), value=3e-5, gradient=5e-6)
    assert (actual.outputs["logp"][ids < 0] == opd_kernels.PAD_LOGP).all() and actual.outputs["tail_logp"][2].abs() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("margin", [6.0, 12.0, 18.0])
def test_confident_tokens_keep_the_digits_of_one_minus_p(margin, path, dtype):
    logits = torch.randn(90, generator=torch.Generator().manual_seed(7)).to(dtype)
    logits[70] = margin
    case = Case(hidden=torch.ones(1, 1, dtype=dtype), weight=logits[:, None].contiguous(), ids=torch.tensor([[70, 3]]))
    upstream = {"logp": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}
    actual, expected = triton_run(case, upstream, path), oracle(case, upstream)
    assert relative(-torch.expm1(actual.outputs["logp"][:, 0].double()), -torch.expm1(expected.outputs["logp"][:, 0])) < 1e-5
    assert relative(actual.d_weight, expected.d_weight) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert relative(actual.d_weight[70], expected.d_weight[70]) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("exponent", [1, 6, 12])
def test_small_tails(exponent, path):
    logits = torch.randn(150, generator=torch.Generator().manual_seed(exponent)) - exponent * 2.302585
    logits[[5, 77, 149]] = torch.tensor([6.0, 5.5, 5.2])
    case = Case(hidden=torch.ones(1, 1), weight=logits[:, None].contiguous(), ids=torch.tensor([[5, 77, 149]]))
    upstream = {"tail_logp": torch.ones(1, dtype=torch.float64)}
    actual, expected = triton_run(case, upstream, path), oracle(case, upstream)
    assert (actual.outputs["tail_logp"].double() - expected.outputs["tail_logp"]).abs().max() < 1e-5
    assert relative(actual.d_weight, expected.d_weight) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("level", [-3000.0, 3000.0])
def test_logits_far_from_zero(level, path):
    case = make_case(3, 70, 8, 3, logit_std=3.0)
    case = Case(hidden=case.hidden, weight=case.weight, ids=case.ids, bias=torch.full((70,), level))
    upstream = upstream_of(case)
    assert_same(triton_run(case, upstream, path), oracle(case, upstream), value=3e-3, gradient=5e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_columns_of_minus_infinity_do_not_count(softcap, path):
    case = make_case(4, 90, 8, 4, softcap=softcap)
    bias = torch.zeros(90)
    bias[[3, 64, 65, 89]] = float("-inf")
    ids = torch.arange(16).view(4, 4) + 5
    actual = triton_run(Case(hidden=case.hidden, weight=case.weight, ids=ids, bias=bias, keywords=case.keywords), upstream_of(case), path)
    keep = torch.isfinite(bias)
    dense = Case(hidden=case.hidden, weight=case.weight[keep], ids=(torch.cumsum(keep, 0) - 1)[ids], keywords=case.keywords)
    expected = oracle(dense, upstream_of(case))
    for name, wanted in expected.outputs.items():
        torch.testing.assert_close(actual.outputs[name].double(), wanted, rtol=0, atol=3e-5)
    assert relative(actual.d_hidden, expected.d_hidden) < 5e-6 and not actual.d_weight[~keep].any()


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_row_and_rows_without_columns_are_quiet(path):
    case = make_case(4, 90, 8, 4)
    hidden = case.hidden.clone()
    hidden[2, 1] = float("nan")
    actual = triton_run(Case(hidden=hidden, weight=case.weight, ids=case.ids), upstream_of(case), path)
    clean = triton_run(case, upstream_of(case), path)
    rows = torch.arange(4) != 2
    assert all(actual.outputs[name][2].isnan().all() for name in OUTPUTS) and actual.d_hidden[2].isnan().all()
    assert all(torch.equal(actual.outputs[name][rows], clean.outputs[name][rows]) for name in OUTPUTS)
    assert torch.equal(actual.d_hidden[rows], clean.d_hidden[rows])
    dead = Case(hidden=case.hidden, weight=case.weight, ids=case.ids, bias=torch.full((90,), float("-inf")))
    quiet = triton_run(dead, upstream_of(dead, ("logp", "tail_logp", "entropy")), path)
    assert not quiet.d_hidden.any() and not quiet.d_weight.any() and (quiet.outputs["logz"] == float("-inf")).all()


@pytest.mark.parametrize("path", PATHS)
def test_repeats_bitwise_and_does_not_depend_on_chunks(path):
    case = make_case(6, COLUMNS, WIDTH, CHOSEN)
    upstream = upstream_of(case)
    first, again = triton_run(case, upstream, path), triton_run(case, upstream, path)
    assert torch.equal(first.d_weight, again.d_weight) and torch.equal(first.d_hidden, again.d_hidden)
    for chunk_bytes in (1, 1 << 20):
        other = triton_run(case, upstream, path, chunk_bytes)
        assert relative(other.d_weight, first.d_weight) < 2e-6 and relative(other.d_hidden, first.d_hidden) < 2e-6
        assert all((other.outputs[name] - first.outputs[name]).abs().max() < 1e-5 for name in OUTPUTS)


def test_directional_derivatives_are_unbiased():
    """Signed error of d loss along random directions of W: the rounding of dz must not lean to one side (cutting off: 2e-3)."""
    case = make_case(120, 120, 8, 2, dtype=torch.bfloat16, logit_std=5.0, seed=11)
    upstream = {"logp": torch.full((120, 2), -1.0, dtype=torch.float64)}
    actual, expected = triton_run(case, upstream, "fused", 1 << 20), oracle(case, upstream)
    directions = torch.randn(256, 120, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    slopes, wanted = ((directions * result.d_weight.double()).sum(dim=(1, 2)) for result in (actual, expected))
    assert ((slopes - wanted) * wanted.sign()).mean().abs() / wanted.abs().mean() < 8e-4


@pytest.mark.parametrize("path", PATHS)
def test_frozen_inputs_scaled_and_repeated_backward(path):
    case = make_case(4, COLUMNS, WIDTH, CHOSEN)
    upstream = upstream_of(case, ("logz",))
    expected = oracle(case, upstream)
    weights = upstream["logz"].float()
    for frozen in ("hidden", "weight", None):
        hidden, weight = case.hidden.clone().requires_grad_(frozen != "hidden"), case.weight.clone().requires_grad_(frozen != "weight")
        keywords = {"backend": "triton", "chunk_bytes": SMALL}
        if path == "composable":
            loss = (opd_kernels.selected_logprobs(hidden, weight, case.ids, **keywords).logz * weights).sum()
        else:
            loss, _ = opd_kernels.fused_sparse_loss(
                hidden, weight, case.ids, lambda s, w: ((s.logz * w).sum(), {"logz": s.logz}), (weights,), **keywords
            )
        (loss * -2.0).backward(retain_graph=True)
        loss.backward()
        for name, tensor in (("hidden", hidden), ("weight", weight)):
            if frozen == name:
                assert tensor.grad is None
            else:
                assert relative(tensor.grad, -getattr(expected, f"d_{name}")) < 5e-6
    with pytest.raises(RuntimeError, match="first derivatives only|second time|does not require grad"):
        torch.autograd.grad(torch.autograd.grad(loss, hidden, create_graph=True)[0].sum(), hidden)


def test_without_gradients_nothing_is_kept():
    case = make_case(4, COLUMNS, WIDTH, CHOSEN)
    weight = case.weight.clone().requires_grad_()
    with torch.no_grad():
        selected = opd_kernels.selected_logprobs(case.hidden, weight, case.ids, backend="triton", tail=False, entropy=False)
        loss, _ = opd_kernels.fused_sparse_loss(case.hidden, weight, case.ids, lambda s: (s.logz.sum(), {}), backend="triton")
    assert not selected.logp.requires_grad and not loss.requires_grad and selected.tail_logp is None and selected.entropy is None


def test_mixed_dtypes_and_autocast():
    case = make_case(4, COLUMNS, WIDTH, CHOSEN)
    upstream = upstream_of(case)
    mixed = Case(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16().float(), ids=case.ids)
    rounded = Case(hidden=mixed.hidden, weight=mixed.weight.bfloat16(), ids=case.ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = triton_run(mixed, upstream, "composable")
    assert actual.d_weight.dtype == torch.float32 and actual.d_hidden.dtype == torch.bfloat16
    assert_same(actual, oracle(rounded, upstream), value=3e-5, gradient=8e-3)


@pytest.mark.parametrize("mode", ["recompute", "in_forward"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "total_variation"])
def test_dense_divergence(name, mode):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if mode == "in_forward" else torch.float32
    shapes = ((6, 12), (131, 12), (6, 20), (131, 20))
    tensors = [(torch.randn(shape, generator=generator) * (0.8 if shape[0] == 6 else 1.0)).to(dtype) for shape in shapes]
    upstream = torch.randn(6, generator=generator)
    constants_s = opd_kernels.HeadConstants(bias=torch.randn(131, generator=generator), softcap=20.0)
    keywords = {"vocab_size": 125, "constants_t": opd_kernels.HeadConstants(softcap=25.0, logit_scale=0.9)}
    results = {}
    for backend, to in (("reference", torch.float64), ("triton", dtype)):
        bias = constants_s.bias.to(torch.float64 if backend == "reference" else torch.float32)
        results[backend] = gradients(
            KINDS[name], tensors, backend, upstream=upstream, dtype=to, chunk_bytes=5000,
            constants_s=opd_kernels.HeadConstants(bias=bias, softcap=20.0),
            temperature=torch.linspace(0.8, 1.4, 6).to(bias.dtype),
            token_weight=upstream * 0.5 if mode == "in_forward" and backend == "triton" else None, **keywords,
        )  # fmt: skip
    actual, expected = results["triton"], results["reference"]
    assert (actual[0] - expected[0]).abs().max() < 1e-5
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    assert relative(actual[1], expected[1]) < tolerance and relative(actual[2], expected[2]) < tolerance
    assert not actual[2][125:].any()


@pytest.mark.parametrize("distance", [1.0, 0.1, 0.01])
def test_near_teachers_keep_value_and_gradient(distance):
    """Values of 1e-5 nats: sums over entries of both signs would have no digits left."""
    case = make_case(6, 130, 16, dtype=torch.bfloat16, logit_std=5.6)
    teacher = (case.weight.float() + distance * 0.2 * torch.randn(130, 16, generator=torch.Generator().manual_seed(1))).bfloat16()
    for divergence in (opd_kernels.reverse_kl(), opd_kernels.jsd(), opd_kernels.skew_forward_kl(0.1), opd_kernels.skew_reverse_kl(0.1)):
        found = {}
        for backend, to in (("triton", torch.bfloat16), ("reference", torch.float64)):
            hidden = case.hidden.to(to).clone().requires_grad_()
            heads = (hidden, case.weight.to(to), case.hidden.to(to), teacher.to(to))
            values = opd_kernels.dense_divergence(*heads, divergence, backend=backend)
            values.sum().backward()
            found[backend] = (values.detach(), hidden.grad)
        assert relative(found["triton"][0], found["reference"][0]) < 1e-2
        assert relative(found["triton"][1], found["reference"][1]) < 5e-3


@pytest.mark.parametrize("budget", [1, 5_000, 100_000, 1 << 30])
def test_scratch_stays_within_the_budget_or_is_least(budget):
    columns, hidden_size, tokens = 10_000, 64, 3_000
    rows = triton_rows.rows_in_budget(tokens, 6 * triton_rows.padded(columns), budget)
    assert 1 <= rows <= tokens and (rows == 1 or rows * 6 * triton_rows.padded(columns) <= budget)
    height, width = triton_rows.tile_in_budget(tokens, columns, 6, 4 * hidden_size, budget)
    assert 1 <= height <= tokens and 1 <= width <= columns
    least = height == 1 and width == 128
    assert least or height * triton_rows.padded(width) * 6 + width * 4 * hidden_size <= budget


def test_rows_start_aligned():
    tile = triton_rows.TileScratch(3, 141, torch.device("cpu")).tile(2, 141)
    assert tile.shape == (2, 141) and tile.stride() == (192, 1)
    assert triton_rows.row_head(torch.ones(2, 3), torch.ones(5, 3), LogitOptions(valid_columns=5)).inverse_temperature.tolist() == [1.0, 1.0]
