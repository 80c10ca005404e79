"""Inputs and comparisons that the kernel tests share. The oracle is the dense reference in fp64 on the same rounded inputs."""

from dataclasses import dataclass, field
from typing import Any

import opd_kernels
import torch
from torch import Tensor

OUTPUTS = ("logp", "tail_logp", "logz", "entropy")


@dataclass(frozen=True, kw_only=True)
class Case:
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    bias: Tensor | None = None
    keywords: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> "Case":
        bias = None if self.bias is None else self.bias.to(dtype)
        temperature = self.keywords.get("temperature")
        keywords = dict(self.keywords)
        if isinstance(temperature, Tensor) and dtype == torch.float64:
            keywords["temperature"] = temperature.double()
        return Case(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), ids=self.ids, bias=bias, keywords=keywords)


def make_case(
    tokens: int = 21,
    vocabulary: int = 219,
    hidden_size: int = 24,
    chosen: int = 7,
    *,
    dtype: torch.dtype = torch.float32,
    logit_std: float = 6.0,
    with_bias: bool = False,
    seed: int = 0,
    **keywords: Any,
) -> Case:
    """Random inputs whose logits have the given standard deviation; ids with pads, duplicates and a row of pads alone."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator) * (logit_std / hidden_size**0.5)
    weight = torch.randn(vocabulary, hidden_size, generator=generator)
    ids = torch.randint(0, keywords.get("vocab_size") or vocabulary, (tokens, chosen), generator=generator)
    if chosen > 2 and tokens > 3:
        ids[0, 0] = -1
        ids[1, -1] = -1
        ids[2, 1] = ids[2, 0]
        ids[3] = -1
        ids[2, 2] = ids[2, 0]
    bias = torch.randn(vocabulary, generator=generator).to(dtype) if with_bias else None
    return Case(hidden=hidden.to(dtype), weight=weight.to(dtype), ids=ids, bias=bias, keywords=keywords)


def mixed_loss(selected: opd_kernels.SelectedLogprobs, upstream: dict[str, Tensor], valid: Tensor) -> Tensor:
    """[N] token losses that are linear in the outputs, with the given coefficients."""
    total = torch.zeros_like(selected.logz)
    for name, coefficient in upstream.items():
        value = getattr(selected, name)
        coefficient = coefficient.to(value.dtype)
        total = total + (torch.where(valid, value * coefficient, 0.0).sum(dim=1) if name == "logp" else value * coefficient)
    return total


def upstream_of(case: Case, names: tuple[str, ...] = OUTPUTS, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: case.ids.shape if name == "logp" else case.ids.shape[:1] for name in OUTPUTS}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: drawn[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class Result:
    outputs: dict[str, Tensor]
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor | None


def run(case: Case, upstream: dict[str, Tensor], *, path: str, backend: str = "torch", chunk_bytes: int | None = None) -> Result:
    """Outputs and gradients of the mixed loss by the composable operation or the fused one."""
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (case.hidden, case.weight))
    bias = None if case.bias is None else case.bias.detach().clone().requires_grad_()
    valid = case.ids >= 0
    keywords = {**case.keywords, "bias": bias, "backend": backend, "chunk_bytes": chunk_bytes}
    if path == "composable":
        selected = opd_kernels.selected_logprobs(hidden, weight, case.ids, **keywords)
        outputs = {name: getattr(selected, name) for name in OUTPUTS}
        loss = mixed_loss(selected, upstream, valid).sum()
    else:
        names = tuple(upstream)

        def loss_fn(selected, valid, *coefficients):
            aux = {name: getattr(selected, name) for name in OUTPUTS}
            return mixed_loss(selected, dict(zip(names, coefficients, strict=True)), valid).sum(), aux

        loss, outputs = opd_kernels.fused_sparse_loss(hidden, weight, case.ids, loss_fn, (valid, *upstream.values()), **keywords)
    loss.backward()
    return Result(
        outputs={name: value.detach() for name, value in outputs.items()},
        d_hidden=hidden.grad,
        d_weight=weight.grad,
        d_bias=None if bias is None else bias.grad,
    )


def oracle(case: Case, upstream: dict[str, Tensor]) -> Result:
    return run(case.cast(torch.float64), upstream, path="composable", backend="reference")


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def assert_same(actual: Result, expected: Result, *, value: float, gradient: float) -> None:
    """Absolute tolerance on finite outputs, infinities in the same places; relative tolerance on gradients."""
    for name, wanted in expected.outputs.items():
        torch.testing.assert_close(actual.outputs[name].double(), wanted, rtol=0, atol=value, msg=lambda text, n=name: f"{n}: {text}")
    assert relative(actual.d_hidden, expected.d_hidden) <= gradient
    assert relative(actual.d_weight, expected.d_weight) <= gradient
    if expected.d_bias is not None:
        assert relative(actual.d_bias, expected.d_bias) <= gradient
