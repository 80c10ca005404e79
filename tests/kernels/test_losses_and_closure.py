"""Losses of the objectives on [N, K] through all three ways (eager, composable, fused), and what autograd may do with the fused one."""

import opd_kernels
import pytest
import torch

from tests.kernels.cases import make_case, relative

TOKENS, CHOSEN = 24, 6


def forward_kl(s, extras):
    ids, q, q_tail, *_ = extras
    entries = torch.where(ids >= 0, q * (q.clamp(min=1e-9).log() - s.logp), 0.0).sum(dim=1)
    return entries + q_tail * (q_tail.log() - s.tail_logp)


def reverse_kl(s, extras):
    ids, q, q_tail, *_ = extras
    entries = torch.where(ids >= 0, s.logp.exp() * (s.logp - q.clamp(min=1e-9).log()), 0.0).sum(dim=1)
    return entries + s.tail_logp.exp() * (s.tail_logp - q_tail.log())


def jsd(s, extras):
    ids, q, q_tail, *_ = extras
    p, q = torch.cat([s.logp, s.tail_logp[:, None]], dim=1).exp(), torch.cat([q, q_tail[:, None]], dim=1)
    m = (0.3 * q + 0.7 * p).clamp(min=1e-9)
    entry = 0.3 * q * (q.clamp(min=1e-9) / m).log() + 0.7 * p * (p.clamp(min=1e-9) / m).log()
    valid = torch.cat([ids >= 0, torch.ones_like(ids[:, :1], dtype=torch.bool)], dim=1)
    return torch.where(valid, entry, 0.0).sum(dim=1)


def skew(s, extras):
    ids, q, q_tail, *_ = extras
    mixed = 0.1 * q + 0.9 * s.logp.exp()
    return torch.where(ids >= 0, q * (q.clamp(min=1e-9) / mixed.clamp(min=1e-9)).log(), 0.0).sum(dim=1)


def policy_gradient(s, extras):
    *_, advantage, _ = extras
    return -advantage * s.logp[:, 0]


def grpo_clip(s, extras):
    *_, advantage, old = extras
    ratio = (s.logp[:, 0] - old).clamp(-20, 20).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)


def entropy_bonus(s, extras):
    *_, advantage, _ = extras
    return -advantage * s.logp[:, 0] - 0.01 * s.entropy + 1e-3 * s.logz.square()


LOSSES = [forward_kl, reverse_kl, jsd, skew, policy_gradient, grpo_clip, entropy_bonus]


def batch(dtype=torch.float32):
    case = make_case(TOKENS, 180, 16, CHOSEN, logit_std=3.0)
    ids = torch.stack([torch.randperm(180, generator=torch.Generator().manual_seed(row))[:CHOSEN] for row in range(TOKENS)])
    ids[::5, -1] = -1
    generator = torch.Generator().manual_seed(8)
    q = torch.rand(TOKENS, CHOSEN + 1, generator=generator)
    q[:, :CHOSEN][ids < 0] = 0.0
    q = q / q.sum(dim=1, keepdim=True)
    advantage, noise = torch.randn(2, TOKENS, generator=generator)
    logp = (case.hidden @ case.weight.T).log_softmax(dim=1).gather(1, ids[:, :1])[:, 0]
    extras = (ids, q[:, :CHOSEN].to(dtype), q[:, CHOSEN].to(dtype), advantage.to(dtype), (logp + 0.3 * noise).to(dtype))
    return case, ids, extras


def evaluate(loss, path, dtype=torch.float32):
    case, ids, extras = batch(dtype)
    hidden, weight = (tensor.to(dtype).clone().requires_grad_() for tensor in (case.hidden, case.weight))
    if path == "fused":
        total, aux = opd_kernels.fused_sparse_loss(
            hidden, weight, ids, lambda s, *e: (loss(s, e).sum(), {"loss": loss(s, e)}), extras, backend="torch", chunk_bytes=7000
        )
        assert torch.allclose(aux["loss"].sum(), total)
    else:
        backend = "reference" if path == "eager" else "torch"
        total = loss(opd_kernels.selected_logprobs(hidden, weight, ids, backend=backend), extras).sum()
    total.backward()
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("path", ["composable", "fused"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_every_loss_agrees(loss, path):
    expected = evaluate(loss, "eager", torch.float64)
    actual = evaluate(loss, path)
    assert abs(actual[0] - expected[0]) < 1e-5 * max(1.0, abs(expected[0].item()))
    assert relative(actual[1], expected[1]) < 5e-6 and relative(actual[2], expected[2]) < 5e-6


def simple(selected, scale=1.0):
    return (selected.logz * scale).sum() - selected.tail_logp.sum(), {"logz": selected.logz}


def leaves(case, needs_hidden=True, needs_weight=True):
    return case.hidden.clone().requires_grad_(needs_hidden), case.weight.clone().requires_grad_(needs_weight)


def test_an_upstream_scale_multiplies_the_gradients():
    case = make_case()
    grads = []
    for factor in (1.0, -0.125):
        hidden, weight = leaves(case)
        loss, _ = opd_kernels.fused_sparse_loss(hidden, weight, case.ids, simple)
        (loss * factor).backward()
        grads.append((hidden.grad, weight.grad))
    for one, scaled in zip(*grads, strict=True):
        assert torch.equal(one * -0.125, scaled)


def test_a_retained_graph_gives_the_same_gradient_again():
    case = make_case()
    hidden, weight = leaves(case)
    loss, _ = opd_kernels.fused_sparse_loss(hidden, weight, case.ids, simple)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(weight.grad, 3 * first, rtol=1e-6, atol=1e-6)


def test_two_micro_batches_add_up():
    case = make_case()
    hidden, weight = leaves(case)
    for _ in range(2):
        opd_kernels.fused_sparse_loss(hidden, weight, case.ids, simple)[0].backward()
    once_hidden, once_weight = leaves(case)
    opd_kernels.fused_sparse_loss(once_hidden, once_weight, case.ids, simple)[0].backward()
    torch.testing.assert_close(weight.grad, 2 * once_weight.grad)
    torch.testing.assert_close(hidden.grad, 2 * once_hidden.grad)


def test_no_grad_gives_the_value_alone():
    case = make_case()
    hidden, weight = leaves(case)
    with torch.no_grad():
        loss, aux = opd_kernels.fused_sparse_loss(hidden, weight, case.ids, simple)
        selected = opd_kernels.selected_logprobs(hidden, weight, case.ids)
    assert not loss.requires_grad and not aux["logz"].requires_grad and not selected.logp.requires_grad
    torch.testing.assert_close(loss, selected.logz.sum() - selected.tail_logp.sum())


def test_autocast_changes_nothing():
    """Products stay in fp32 under bf16 autocast, in the operations and in a closure's own products."""
    case = make_case()
    results = []
    for enabled in (False, True):
        hidden, weight = leaves(case)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            fused, _ = opd_kernels.fused_sparse_loss(hidden, weight, case.ids, simple)
            loss = fused + opd_kernels.selected_logprobs(hidden, weight, case.ids).entropy.sum()
            loss = loss + opd_kernels.dense_divergence(hidden, weight, case.hidden * 0.5, case.weight, opd_kernels.jsd()).sum()
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*results, strict=True))


@pytest.mark.parametrize("operation", ["composable", "fused", "dense"])
def test_a_second_derivative_raises(operation):
    case = make_case()
    hidden, weight = leaves(case)
    if operation == "composable":
        loss = opd_kernels.selected_logprobs(hidden, weight, case.ids).logz.sum()
    elif operation == "fused":
        loss, _ = opd_kernels.fused_sparse_loss(hidden, weight, case.ids, simple)
    else:
        loss = opd_kernels.dense_divergence(hidden, weight, case.hidden * 0.5, case.weight, opd_kernels.jsd()).sum()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_aux_comes_back_joined_and_detached():
    case = make_case(30, 100, 8, 3)
    hidden, weight = leaves(case)
    weights = torch.arange(30.0)
    _, aux = opd_kernels.fused_sparse_loss(
        hidden, weight, case.ids, lambda s, w: ((s.logz * w).sum(), {"weight": w, "logp": s.logp}), (weights,), chunk_bytes=3200
    )
    assert torch.equal(aux["weight"], weights) and aux["logp"].shape == (30, 3) and not aux["logp"].requires_grad


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda s: (s.logz, {}), "a scalar tensor"),
        (lambda s: (s.logz.sum(), {"mean": s.logz.mean()}), r"aux\['mean'\]"),
    ],
)
def test_a_malformed_closure_raises(loss_fn, message):
    case = make_case()
    with pytest.raises(ValueError, match=message):
        opd_kernels.fused_sparse_loss(case.hidden, case.weight, case.ids, loss_fn)


def test_outputs_that_are_not_asked_for_are_none():
    case = make_case()
    selected = opd_kernels.selected_logprobs(case.hidden, case.weight, case.ids, tail=False, entropy=False, backend="torch")
    assert selected.tail_logp is None and selected.entropy is None and selected.topk_ids is None

    def loss_fn(s):
        assert s.tail_logp is None and s.entropy is None
        return s.logp[:, 1].sum(), {}

    hidden, weight = leaves(case)
    opd_kernels.fused_sparse_loss(hidden, weight, case.ids, loss_fn, tail=False, entropy=False)[0].backward()
    other_hidden, other_weight = leaves(case)
    opd_kernels.selected_logprobs(other_hidden, other_weight, case.ids, tail=False, entropy=False).logp[:, 1].sum().backward()
    torch.testing.assert_close(weight.grad, other_weight.grad)
