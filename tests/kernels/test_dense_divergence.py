"""Divergences between two heads: every kind against dense fp64 autograd, per-token values, clips, hints, other hidden sizes."""

import math

import opd_kernels
import pytest
import torch
from opd_kernels.divergences import elementwise

from tests.kernels.cases import relative

TOKENS, COLUMNS = 13, 211
KINDS = {
    "forward_kl": opd_kernels.forward_kl(),
    "reverse_kl": opd_kernels.reverse_kl(),
    "jsd": opd_kernels.jsd(0.5),
    "jsd_0.1": opd_kernels.jsd(0.1),
    "skew_forward": opd_kernels.skew_forward_kl(0.1),
    "skew_forward_0": opd_kernels.skew_forward_kl(0.0),
    "skew_reverse": opd_kernels.skew_reverse_kl(0.7),
    "forward_clip": opd_kernels.forward_kl(entry_clip=0.05),
    "forward_clip_0": opd_kernels.forward_kl(entry_clip=0.0),
    "reverse_clip": opd_kernels.reverse_kl(entry_clip=0.1),
    "jsd_clip": opd_kernels.jsd(0.5, entry_clip=0.02),
    "skew_forward_clip": opd_kernels.skew_forward_kl(0.2, entry_clip=0.03),
    "skew_reverse_clip": opd_kernels.skew_reverse_kl(0.2, entry_clip=0.03),
    "total_variation": elementwise(lambda lp, lq: 0.5 * (lp.exp() - lq.exp()).abs(), lambda lp, lq: 0.5 * lp.exp() * (lp - lq).sign()),
}


def inputs(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TOKENS, 24), (COLUMNS, 24), (TOKENS, 40), (COLUMNS, 40))
    drawn = [torch.randn(shape, generator=generator) * (0.6 if shape[0] == TOKENS else 1.0) for shape in shapes]
    return [tensor.to(dtype) for tensor in drawn]


def gradients(kind, tensors, backend, *, upstream, token_weight=None, dtype=None, **keywords):
    dtype = dtype or tensors[0].dtype
    hidden_s, weight_s, hidden_t, weight_t = (tensor.to(dtype).clone() for tensor in tensors)
    hidden_s.requires_grad_(), weight_s.requires_grad_()
    values = opd_kernels.dense_divergence(
        hidden_s, weight_s, hidden_t, weight_t, kind, backend=backend, token_weight=token_weight, **keywords
    )
    (values * upstream.to(values.dtype)).sum().backward()
    return values.detach(), hidden_s.grad, weight_s.grad


@pytest.mark.parametrize("mode", ["recompute", "in_forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_equals_fp64_dense(name, dtype, mode):
    tensors = inputs(dtype)
    upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(4))
    keywords = {"temperature": 1.3, "vocab_size": COLUMNS - 8}
    expected = gradients(KINDS[name], tensors, "reference", upstream=upstream, dtype=torch.float64, **keywords)
    actual = gradients(
        KINDS[name],
        tensors,
        "torch",
        upstream=upstream,
        token_weight=upstream * 0.5 if mode == "in_forward" else None,
        chunk_bytes=12_000,
        **keywords,
    )
    assert (actual[0] - expected[0]).abs().max() < 1e-5
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    assert relative(actual[1], expected[1]) < tolerance and relative(actual[2], expected[2]) < tolerance
    assert not actual[2][COLUMNS - 8 :].any()


def test_hand_computed_values():
    """p = (1/2, 1/2), q = (1/4, 3/4): every divergence by its textbook formula."""
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    kl = lambda a, b: (a * (a / b).log()).sum().item()  # noqa: E731
    wanted = {
        "forward_kl": kl(q, p),
        "reverse_kl": kl(p, q),
        "jsd": 0.5 * kl(q, (p + q) / 2) + 0.5 * kl(p, (p + q) / 2),
        "jsd_0.1": 0.1 * kl(q, 0.1 * q + 0.9 * p) + 0.9 * kl(p, 0.1 * q + 0.9 * p),
        "skew_forward": kl(q, 0.1 * q + 0.9 * p),
        "skew_reverse": kl(p, 0.7 * p + 0.3 * q),
        "forward_clip": 0.25 * math.log(0.5) + 0.05,
        "total_variation": 0.25,
    }
    for name, value in wanted.items():
        for backend in ("reference", "torch"):
            out = opd_kernels.dense_divergence(
                torch.ones(1, 1), p.log()[:, None], torch.ones(1, 1), q.log()[:, None], KINDS[name], backend=backend
            )
            assert abs(out.item() - value) < 1e-6, name


def test_entry_clip_laws():
    """An infinite clip changes nothing; clip 0 keeps the negative entries alone; the gradient is p * sum(kept q) - kept q."""
    tensors = inputs()
    upstream = torch.ones(TOKENS)
    plain = gradients(opd_kernels.forward_kl(), tensors, "torch", upstream=upstream)
    loose = gradients(opd_kernels.forward_kl(entry_clip=math.inf), tensors, "torch", upstream=upstream)
    assert (plain[0] - loose[0]).abs().max() < 1e-5 and relative(loose[1], plain[1]) < 1e-5
    zero = gradients(opd_kernels.forward_kl(entry_clip=0.0), tensors, "torch", upstream=upstream)
    lp, lq = ((tensors[i].double() @ tensors[i + 1].double().T).log_softmax(dim=1) for i in (0, 2))
    entry = lq.exp() * (lq - lp)
    assert (zero[0] - entry.clamp(max=0.0).sum(dim=1)).abs().max() < 1e-5
    kept = (entry <= 0.0) * lq.exp()
    slope = lp.exp() * kept.sum(dim=1, keepdim=True) - kept
    assert relative(zero[1], slope @ tensors[1].double()) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_equal_heads_have_no_divergence(name):
    hidden, weight, *_ = inputs()
    if "clip" in name:
        return
    values, d_hidden, d_weight = gradients(KINDS[name], (hidden, weight, hidden, weight), "torch", upstream=torch.ones(TOKENS))
    assert values.abs().max() < 1e-6 and d_hidden.abs().max() < 1e-6 and d_weight.abs().max() < 1e-6


def test_nonnegative_and_close_values_keep_their_digits():
    """A teacher 1e-2 away: D is about 1e-4, where sums of q (lq - lp) in fp32 have a relative error near 1e-2."""
    hidden, weight, *_ = inputs()
    other = weight + 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_forward", "skew_reverse"):
        values = opd_kernels.dense_divergence(hidden, weight, hidden, other, KINDS[name], backend="torch")
        wanted = opd_kernels.dense_divergence(*(t.double() for t in (hidden, weight, hidden, other)), KINDS[name], backend="reference")
        assert relative(values, wanted) < 2e-3


def test_the_hint_changes_cost_and_not_results():
    tensors = inputs()
    token_weight = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2))
    token_weight[3] = 0.0
    plain = gradients(KINDS["jsd"], tensors, "torch", upstream=token_weight * -2.0)
    hinted = gradients(KINDS["jsd"], tensors, "torch", upstream=token_weight * -2.0, token_weight=token_weight)
    for left, right in zip(plain, hinted, strict=True):
        assert relative(left, right) < 2e-6


def test_a_wrong_hint_raises():
    with pytest.raises(ValueError, match="not proportional to token_weight"):
        gradients(KINDS["jsd"], inputs(), "torch", upstream=torch.arange(13.0), token_weight=torch.ones(TOKENS))


def test_the_teacher_takes_no_gradient():
    for backend in ("reference", "torch"):
        tensors = [tensor.requires_grad_() for tensor in inputs()]
        opd_kernels.dense_divergence(*tensors, KINDS["reverse_kl"], backend=backend).sum().backward()
        assert tensors[0].grad is not None and tensors[1].grad is not None
        assert tensors[2].grad is None and tensors[3].grad is None


@pytest.mark.parametrize("hinted", [False, True])
def test_constants_of_both_heads(hinted):
    """Bias, softcap and scale differ between the sides; per-token temperatures; gradient of the student's bias."""
    tensors = inputs()
    generator = torch.Generator().manual_seed(9)
    biases = [torch.randn(COLUMNS, generator=generator) for _ in range(2)]
    temperature = torch.linspace(0.6, 1.8, TOKENS)
    results = []
    for backend, dtype in (("reference", torch.float64), ("torch", torch.float32)):
        bias = biases[0].to(dtype).requires_grad_()
        values, d_hidden, d_weight = gradients(
            KINDS["skew_reverse"],
            tensors,
            backend,
            dtype=dtype,
            upstream=torch.ones(TOKENS),
            token_weight=torch.ones(TOKENS) if hinted else None,
            temperature=temperature.to(dtype),
            constants_s=opd_kernels.HeadConstants(bias=bias, softcap=4.0, logit_scale=1.5),
            constants_t=opd_kernels.HeadConstants(bias=biases[1].to(dtype), softcap=9.0),
            chunk_bytes=9000,
        )
        results.append((values, d_hidden, d_weight, bias.grad))
    assert all(relative(actual, expected) < 1e-5 for expected, actual in zip(*results, strict=True))


def test_heads_of_different_rows():
    """A teacher padded to more rows than the student: the columns both mean are compared, and no other."""
    hidden_s, weight_s, hidden_t, weight_t = inputs()
    padded = torch.cat([weight_t, torch.full((17, 40), 3.0)])
    with pytest.raises(ValueError, match="pass vocab_size"):
        opd_kernels.dense_divergence(hidden_s, weight_s, hidden_t, padded, KINDS["jsd"])
    wanted = opd_kernels.dense_divergence(hidden_s, weight_s, hidden_t, weight_t, KINDS["jsd"])
    actual = opd_kernels.dense_divergence(hidden_s, weight_s, hidden_t, padded, KINDS["jsd"], vocab_size=COLUMNS)
    assert torch.equal(actual, wanted)


def test_repeats_bitwise():
    token_weight = torch.rand(TOKENS)
    for hint in (None, token_weight):
        first, second = (
            gradients(KINDS["jsd"], inputs(), "torch", upstream=token_weight, token_weight=hint, chunk_bytes=9000) for _ in range(2)
        )
        assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("hinted", [False, True])
def test_ids_give_the_student_from_the_same_logits(hinted, backend):
    hidden_s, weight_s, hidden_t, weight_t = inputs()
    hidden_s.requires_grad_(), weight_s.requires_grad_()
    hint = torch.linspace(0.1, 1.0, TOKENS)
    ids = torch.randint(0, COLUMNS, (TOKENS, 3), generator=torch.Generator().manual_seed(2))
    ids[0, 1], ids[1, 2] = -1, ids[1, 0]
    shared = {"temperature": 0.8, "vocab_size": COLUMNS - 8, "backend": backend, "chunk_bytes": 12_000}
    pair = (hidden_s, weight_s, hidden_t, weight_t, opd_kernels.reverse_kl())
    ids = ids.clamp(max=COLUMNS - 9)
    plain = opd_kernels.dense_divergence(*pair, token_weight=hint if hinted else None, **shared)
    wanted_gradients = torch.autograd.grad((plain * hint).sum(), (hidden_s, weight_s))
    values, selected = opd_kernels.dense_divergence(*pair, token_weight=hint if hinted else None, ids=ids, **shared)
    found_gradients = torch.autograd.grad((values * hint).sum(), (hidden_s, weight_s))
    torch.testing.assert_close(values, plain, rtol=0, atol=1e-6)
    for found, wanted in zip(found_gradients, wanted_gradients, strict=True):
        assert relative(found, wanted) < 1e-6
    wanted = opd_kernels.selected_logprobs(hidden_s.double(), weight_s.double(), ids, **(shared | {"backend": "reference"}))
    for name in ("logp", "tail_logp", "logz", "entropy"):
        torch.testing.assert_close(getattr(selected, name).double(), getattr(wanted, name), rtol=0, atol=1e-5)
        assert not getattr(selected, name).requires_grad
    empty_values, empty = opd_kernels.dense_divergence(hidden_s[:0], weight_s, hidden_t[:0], weight_t, opd_kernels.jsd(), ids=ids[:0])
    assert empty_values.shape == (0,) and empty.logp.shape == (0, 3) and not empty.logp.requires_grad
