"""Checks of the Triton backend that only a GPU can make. Exit status 1 and a table when one fails.

    PYTHONPATH=kernels python kernels/benchmarks/gpu_smoke.py                  # about 60 GiB of device memory, minutes
    PYTHONPATH=kernels python kernels/benchmarks/gpu_smoke.py --interpret      # tiny, on the CPU, by Triton's interpreter

What is checked: all four operations against fp64 on some rows and against the torch backend on all; tiles of more than 2^31 entries;
top-k ids on exact ties; peak memory against the formula; bitwise repeats.
"""

import argparse
import functools
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import opd_kernels
import torch
from torch import Tensor

GIB = 1 << 30
OUTPUTS = ("logp", "tail_logp", "logz", "entropy")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    device: str
    tokens: int
    columns: int
    hidden_size: int
    chosen: int
    k: int
    oracle_rows: int
    repeats: int
    huge_tokens: int  # with `columns`, more than 2^31 entries in one tile
    memory_hidden_size: int
    chunk_bytes: int


GPU = Sizes(
    device="cuda", tokens=8192, columns=151_936, hidden_size=1024, chosen=64, k=64, oracle_rows=64, repeats=20,
    huge_tokens=16_384, memory_hidden_size=4096, chunk_bytes=2560 << 20,
)  # fmt: skip
TINY = Sizes(
    device="cpu", tokens=6, columns=300, hidden_size=8, chosen=4, k=5, oracle_rows=6, repeats=2,
    huge_tokens=7, memory_hidden_size=8, chunk_bytes=6000,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    check: str
    measured: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit


@dataclass(frozen=True, kw_only=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    upstream: dict[str, Tensor]


def make_inputs(sizes: Sizes, *, tokens: int | None = None, hidden_size: int | None = None) -> Inputs:
    """bf16 heads with a logit standard deviation of 6; ids with pads and duplicates."""
    tokens, width = tokens or sizes.tokens, hidden_size or sizes.hidden_size
    generator = torch.Generator(sizes.device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=sizes.device)
    ids = torch.randint(0, sizes.columns, (tokens, sizes.chosen), generator=generator, device=sizes.device)
    ids[::3, 1] = ids[::3, 0]
    ids[::5, -1] = -1
    upstream = {name: draw(tokens, sizes.chosen) if name == "logp" else draw(tokens) for name in OUTPUTS}
    hidden = (draw(tokens, width) * (6.0 / width**0.5)).bfloat16()
    return Inputs(hidden=hidden, weight=draw(sizes.columns, width).bfloat16(), ids=ids, upstream=upstream)


def token_loss(selected, ids: Tensor, *coefficients: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    by_name = dict(zip(OUTPUTS, coefficients, strict=True))
    total = torch.where(ids >= 0, selected.logp * by_name["logp"].to(selected.logp.dtype), 0.0).sum()
    for name in OUTPUTS[1:]:
        total = total + (getattr(selected, name) * by_name[name].to(selected.logz.dtype)).sum()
    return total, {name: getattr(selected, name) for name in OUTPUTS}


def sparse(inputs: Inputs, path: str, backend: str, *, chunk_bytes: int | None = None, rows: slice = slice(None), dtype=None):
    """Outputs and gradients (d_hidden, d_weight) of a mixed loss."""
    hidden = inputs.hidden[rows].to(dtype or inputs.hidden.dtype).clone().requires_grad_()
    weight = inputs.weight.to(dtype or inputs.weight.dtype).detach().requires_grad_()
    ids, extras = inputs.ids[rows], (inputs.ids[rows], *(inputs.upstream[name][rows] for name in OUTPUTS))
    if path == "fused":
        loss, outputs = opd_kernels.fused_sparse_loss(hidden, weight, ids, token_loss, extras, backend=backend, chunk_bytes=chunk_bytes)
    else:
        loss, outputs = token_loss(
            opd_kernels.selected_logprobs(hidden, weight, ids, backend=backend, chunk_bytes=chunk_bytes), *extras
        )
    loss.backward()
    return {name: value.detach() for name, value in outputs.items()} | {"d_hidden": hidden.grad, "d_weight": weight.grad}


def eager_outputs(inputs: Inputs, rows: slice) -> dict[str, Tensor]:
    """The four outputs by plain code on fp32 logits of the same bf16 operands, as the matrix units multiply them."""
    ids, hidden = inputs.ids[rows], inputs.hidden[rows]
    on_gpu = hidden.is_cuda
    logits = torch.mm(hidden, inputs.weight.T, out_dtype=torch.float32) if on_gpu else hidden.float() @ inputs.weight.float().T
    logp = logits.log_softmax(dim=1)
    valid = ids >= 0
    unique = torch.zeros_like(logp, dtype=torch.bool)
    unique = torch.cat([unique, unique[:, :1]], dim=1).scatter(1, torch.where(valid, ids, logits.shape[1]), True)[:, :-1]
    chosen = torch.where(unique, logp, float("-inf")).logsumexp(dim=1)
    return {
        "logp": torch.where(valid, logp.gather(1, ids.clamp(min=0)), opd_kernels.PAD_LOGP),
        "tail_logp": torch.log(-torch.expm1(chosen)),
        "logz": logits.logsumexp(dim=1),
        "entropy": -(logp.exp() * logp).sum(dim=1),
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def largest(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item()


def check_sparse(sizes: Sizes) -> Iterator[Finding]:
    inputs, rows = make_inputs(sizes), slice(0, sizes.oracle_rows)
    exact = sparse(inputs, "composable", "reference", rows=rows, dtype=torch.float64)
    eager, value_limit = eager_outputs(inputs, rows), 1e-4 if sizes.device == "cuda" else 3e-5  # the matrix units sum less exactly
    for path in ("composable", "fused"):
        whole = sparse(inputs, path, "triton", chunk_bytes=sizes.chunk_bytes)
        other = sparse(inputs, path, "torch", chunk_bytes=sizes.chunk_bytes)
        for name in OUTPUTS:
            yield Finding(check=f"{path} {name} against fp64", measured=largest(whole[name][rows], exact[name]), limit=value_limit)
            worse = largest(whole[name][rows], exact[name]) / max(1e-6, largest(eager[name], exact[name]))
            yield Finding(check=f"{path} {name}: error over that of eager with fp32 logits", measured=worse, limit=1.5)
            yield Finding(check=f"{path} {name} against torch", measured=largest(whole[name], other[name]), limit=6e-5)
        errors = (whole["d_hidden"][rows].double() - exact["d_hidden"]).norm(dim=1) / exact["d_hidden"].norm(dim=1)
        yield Finding(check=f"{path} d_hidden against fp64, worst row", measured=errors.max().item(), limit=1.6e-2)
        yield Finding(check=f"{path} d_hidden against fp64, median row", measured=errors.median().item(), limit=3e-3)
        yield Finding(check=f"{path} d_weight against torch", measured=relative(whole["d_weight"], other["d_weight"]), limit=8e-3)
        part = sparse(inputs, path, "triton", rows=rows, chunk_bytes=sizes.chunk_bytes)
        yield Finding(check=f"{path} d_weight against fp64", measured=relative(part["d_weight"], exact["d_weight"]), limit=8e-3)


def check_huge_tiles(sizes: Sizes) -> Iterator[Finding]:
    """One tile of all rows and columns: an offset in 32 bits would wrap."""
    inputs = make_inputs(sizes, tokens=sizes.huge_tokens, hidden_size=min(256, sizes.hidden_size))
    entries = inputs.hidden.shape[0] * sizes.columns
    yield Finding(check="2^31 over the entries of the huge tile", measured=2**31 / entries, limit=1.0 if sizes.device == "cuda" else 1e9)
    for path in ("composable", "fused"):
        small = sparse(inputs, path, "triton", chunk_bytes=sizes.chunk_bytes)
        huge = sparse(inputs, path, "triton", chunk_bytes=8 * entries + GIB)
        last = slice(-32, None)
        for name in OUTPUTS:
            yield Finding(check=f"{path} {name} of the last rows, huge tile", measured=largest(huge[name][last], small[name][last]), limit=3e-5)
        yield Finding(
            check=f"{path} d_hidden of the last rows, huge tile",
            measured=relative(huge["d_hidden"][last], small["d_hidden"][last]),
            limit=8e-3,
        )
        yield Finding(check=f"{path} d_weight, huge tile", measured=relative(huge["d_weight"], small["d_weight"]), limit=8e-3)


def check_topk(sizes: Sizes) -> Iterator[Finding]:
    """Heads of small integers, whose products are exact: ties abound and the ids must equal a stable sort's."""
    generator = torch.Generator(sizes.device).manual_seed(1)
    draw = functools.partial(torch.randint, generator=generator, device=sizes.device)
    hidden = draw(-3, 4, (sizes.tokens, sizes.hidden_size)).bfloat16()
    weight = draw(-3, 4, (sizes.columns, sizes.hidden_size)).bfloat16()
    hidden[1] = 0.0  # every logit equal
    included = draw(0, sizes.columns, (sizes.tokens,))
    scores = opd_kernels.topk_logprobs(hidden, weight, sizes.k, backend="triton", chunk_bytes=sizes.chunk_bytes)
    with_included = opd_kernels.topk_logprobs(hidden, weight, sizes.k, always_include=included, backend="triton")
    rows = slice(0, sizes.oracle_rows)
    logits = hidden[rows].double() @ weight.double().T
    wanted = logits.sort(dim=1, descending=True, stable=True).indices[:, : sizes.k]
    logp = logits.log_softmax(dim=1)
    kept = torch.ones_like(logp, dtype=torch.bool).scatter(1, wanted, False)
    tail = torch.where(kept, logp, float("-inf")).logsumexp(dim=1)
    yield Finding(check="top-k ids that differ from a stable sort", measured=(scores.ids[rows] != wanted).sum().item(), limit=0)
    yield Finding(check="top-k logp against fp64", measured=largest(scores.logp[rows], logp.gather(1, wanted)), limit=1e-4)
    visible = tail > -60.0
    if visible.any():
        yield Finding(check="top-k tail against fp64", measured=largest(scores.tail_logp[rows][visible], tail[visible]), limit=1e-4)
    repeated = torch.where(scores.ids == included[:, None], -1, scores.ids)
    differs = (with_included.ids[:, 1:] != repeated).sum() + (with_included.ids[:, 0] != included).sum()
    yield Finding(check="top-k ids with an included id that differ", measured=differs.item(), limit=0)


def check_dense(sizes: Sizes) -> Iterator[Finding]:
    tokens = min(sizes.tokens, 1024)
    student, teacher = make_inputs(sizes, tokens=tokens), make_inputs(sizes, tokens=tokens, hidden_size=2 * sizes.hidden_size)
    rows = slice(0, sizes.oracle_rows)
    kinds = (opd_kernels.forward_kl(), opd_kernels.reverse_kl(), opd_kernels.jsd(0.5), opd_kernels.skew_reverse_kl(0.1))
    for kind in (*kinds, opd_kernels.forward_kl(entry_clip=0.05)):
        for hint in (None, torch.ones(tokens, device=sizes.device)):
            found = {}
            for backend, dtype in (("reference", torch.float64), ("triton", torch.bfloat16)):
                part = rows if backend == "reference" else slice(None)
                hidden = student.hidden[part].to(dtype).clone().requires_grad_()
                values = opd_kernels.dense_divergence(
                    hidden, student.weight.to(dtype), teacher.hidden[part].to(dtype), teacher.weight.to(dtype), kind,
                    token_weight=None if backend == "reference" else hint, backend=backend, chunk_bytes=sizes.chunk_bytes,
                )  # fmt: skip
                values.sum().backward()
                found[backend] = (values.detach()[rows], hidden.grad[rows])
            name = f"{kind.name}{' clipped' if kind.entry_clip is not None else ''}, {'recomputed' if hint is None else 'in the forward pass'}"
            value, exact = (found[backend][0].double() for backend in ("triton", "reference"))
            error = ((value - exact).abs() / exact.abs().clamp(min=1.0)).max().item()  # nats, relative above one
            yield Finding(check=f"{name}: values", measured=error, limit=5e-5)
            yield Finding(check=f"{name}: d_hidden", measured=relative(found["triton"][1], found["reference"][1]), limit=8e-3)


def check_repeats(sizes: Sizes) -> Iterator[Finding]:
    inputs = make_inputs(sizes, tokens=min(sizes.tokens, 2048))
    for path in ("composable", "fused"):
        first = sparse(inputs, path, "triton", chunk_bytes=sizes.chunk_bytes)
        unequal = 0
        for _ in range(sizes.repeats - 1):
            again = sparse(inputs, path, "triton", chunk_bytes=sizes.chunk_bytes)
            unequal += sum(not torch.equal(again[name], value) for name, value in first.items())
        yield Finding(check=f"{path}: tensors that differ in {sizes.repeats} repeats", measured=unequal, limit=0)


def check_memory(sizes: Sizes) -> Iterator[Finding]:
    """Peak above the inputs, without the returned gradients, over the bytes that the design accounts for."""
    if sizes.device != "cuda":
        return
    inputs = make_inputs(sizes, hidden_size=sizes.memory_hidden_size)
    tokens, width = inputs.hidden.shape
    for path in ("composable", "fused"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = sparse(inputs, path, "triton", chunk_bytes=sizes.chunk_bytes)
        returned = sum(found[name].numel() * found[name].element_size() for name in ("d_hidden", "d_weight"))
        extra = torch.cuda.max_memory_allocated() - before - returned
        del found
        leaf = 2 * tokens * width  # the script's own copy of hidden
        per_token = 4 * tokens * (8 * sizes.chosen + 16)
        formula = sizes.chunk_bytes + 4 * tokens * width + leaf + per_token
        if path == "fused":  # the fp32 gradient of weight stands beside scratch, then beside the returned one
            formula = max(formula - 2 * sizes.columns * width, 4 * tokens * width + leaf + per_token) + 4 * sizes.columns * width
        yield Finding(check=f"{path}: peak extra memory over the formula", measured=extra / formula, limit=1.1)
        yield Finding(check=f"{path}: peak extra memory, GiB", measured=extra / GIB, limit=8.0)


CHECKS = {
    "sparse": check_sparse, "huge": check_huge_tiles, "topk": check_topk, "dense": check_dense, "repeats": check_repeats,
    "memory": check_memory,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="tiny sizes on the CPU under TRITON_INTERPRET=1")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--repeats", type=int, help="runs that must agree bitwise (default 20; 2 with --interpret)")
    parser.add_argument("--json", type=Path, help="also write the findings there")
    arguments = parser.parse_args()
    sizes = TINY if arguments.interpret else GPU
    if arguments.repeats is not None:
        sizes = replace(sizes, repeats=arguments.repeats)
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --interpret runs tiny sizes on the CPU")
    findings = []
    for name in arguments.only:
        for finding in CHECKS[name](sizes):
            findings.append(finding)
            print(f"{'ok  ' if finding.passed else 'FAIL'} {finding.measured:12.3e} <= {finding.limit:9.1e}  {finding.check}", flush=True)
    if arguments.json:
        machine = torch.cuda.get_device_name() if sizes.device == "cuda" else platform.processor() or platform.machine()
        record = {
            "date": datetime.now().isoformat(timespec="seconds"),
            "machine": machine,
            "torch": torch.__version__,
            "findings": [finding.__dict__ | {"passed": finding.passed} for finding in findings],
        }
        arguments.json.write_text(json.dumps(record, indent=1))
    return int(not all(finding.passed for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
