"""Run as a script with COLUMNS CHOSEN K: one launch of every Triton kernel with the GPU's block sizes, compiled for Hopper and not run.

Prints "name bytes-of-shared-memory" for each kernel. Needs no GPU; the launchers see CPU tensors, and only the launch is replaced.
"""

import sys

import torch
import triton
from opd_kernels import divergences, row_kernels, selection_kernels, triton_divergence, triton_topk
from opd_kernels.row_kernels import TileConstants
from opd_kernels.selection import Coefficients, RunningSums, Upstream
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype].removeprefix('*')}{list(value.block_shape)}>"
    return "i32" if isinstance(value, int) else "fp32"


def compiled_launch(kernel, args: tuple, keywords: dict):
    """What a launch would run: specialised on ones and on multiples of 16."""
    keywords = dict(keywords)
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        one = isinstance(value, int) and not isinstance(value, bool) and value == 1
        if parameter.is_constexpr or one:
            signature[parameter.name], constants[(position,)] = "constexpr", value
            continue
        signature[parameter.name] = type_of(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGET, options=options)


def report_launch(kernel, *args, grid, warmup, **keywords) -> None:
    """Stands in for JITFunction.run."""
    compiled = compiled_launch(kernel, args, keywords)
    assert compiled.asm["cubin"]
    print(kernel.fn.__name__, compiled.metadata.shared, flush=True)


def launch_everything(columns: int, chosen: int, k: int, rows: int = 2) -> None:
    z = torch.zeros(rows, columns)
    ids = torch.zeros(rows, chosen, dtype=torch.int64)
    values, vector = torch.zeros(rows, chosen), torch.zeros(rows)
    bf16 = torch.zeros(rows, columns, dtype=torch.bfloat16)
    plain = TileConstants(inverse_temperature=vector)
    full = TileConstants(inverse_temperature=vector, bias=torch.zeros(columns), softcap=30.0, logit_scale=0.5)
    for constants in (plain, full):
        row_kernels.take(z, ids, constants, 0)
        row_kernels.row_sums(z, constants)
        rule = Coefficients(reference=vector, scale=vector, slope=None if constants is plain else vector, selected=values)
        row_kernels.dense_dz(z, bf16, rule, constants)
    row_kernels.overwrite(bf16, ids, values, 0)
    for dtype in (torch.float32, torch.bfloat16):
        row_kernels.scaled(z, vector[:1], dtype)
    logp, *rest = selection_kernels.finalize_rows(values, ids, RunningSums(m=vector, l=vector, t=vector))
    for other in (vector, None):
        upstream = Upstream(logp=values, tail_logp=other, logz=other, entropy=other)
        selection_kernels.coefficient_rows(upstream, ids, logp, *rest, vector)
    triton_topk.top_columns(z, k, triton_topk.group_size(columns, k), plain)
    rules = [divergences.forward_kl(entry_clip=0.1), divergences.reverse_kl(), divergences.jsd(0.5)]
    rules += [divergences.skew_forward_kl(0.1), divergences.skew_reverse_kl(0.1)]
    for divergence in rules:
        pair = [triton_divergence.ProductTile(z=z, constants=constants, logz=vector) for constants in (plain, full)]
        triton_divergence.divergence_rows(*pair, divergence)
        triton_divergence.divergence_dz(*pair, divergence, vector, vector, bf16)


if __name__ == "__main__":
    JITFunction.run = report_launch
    launch_everything(*(int(argument) for argument in sys.argv[1:]))
