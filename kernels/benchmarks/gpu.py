"""GPU tables: every system that runs, on bf16 heads, with floors measured in the same run. One command:

    python kernels/benchmarks/gpu.py                      # about 10 minutes on one H200, 60 GiB of its memory
    python kernels/benchmarks/gpu.py --quick              # one small size a table
    python kernels/benchmarks/gpu.py --device cpu --quick # checks the script itself where there is no GPU

Needs torch and triton; liger-kernel, trl and cut-cross-entropy are measured where they are installed, and a table says why a system did
not run. Floors: the time of the three matrix products (forward, and both of backward) that any exact method needs, of four with a
recomputed forward, and of one for scoring; ratios to them are what the targets in ../README.md speak of.

NOT RUN YET on a GPU: none was at hand when this was written.
"""

import argparse
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Inputs, Sizes, Task, interleaved_seconds, make_inputs, measure, report
from systems import dense_task, label_task, product_alone, scoring_task, sparse_task
from torch import Tensor

HEADLINE = Sizes(tokens=8192, columns=151_936, hidden_size=4096, chosen=64, dtype="bfloat16", device="cuda")
HIDDEN_SIZES = (1024, 2048, 4096)
OTHER = (
    replace(HEADLINE, tokens=1024, hidden_size=2048),
    replace(HEADLINE, tokens=32_768, hidden_size=2048),
    replace(HEADLINE, columns=32_000, hidden_size=2048),
    replace(HEADLINE, columns=128_256, hidden_size=2048),
    replace(HEADLINE, hidden_size=2048, chosen=1),
    replace(HEADLINE, hidden_size=2048, chosen=256),
)
PRODUCTS = {"sparse": (3, 4), "label": (3, 4), "dense": (4, 6), "scoring": (1,)}


def d_hidden_product(inputs: Inputs, rows: int = 1024) -> Tensor:
    """[N, V] @ [V, H] over chunks of tokens, fp32 result."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    dlogits = torch.ones(min(rows, hidden.shape[0]), weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    out = torch.empty(hidden.shape, device=hidden.device)
    for start in range(0, hidden.shape[0], rows):
        _mm(dlogits[: hidden.shape[0] - start], weight, out[start : start + rows])
    return out[0, 0]


def d_weight_product(inputs: Inputs, columns: int = 16_384) -> Tensor:
    """[V, N] @ [N, H] over blocks of the vocabulary, fp32 result."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    columns = min(columns, weight.shape[0])
    dlogits = torch.ones(hidden.shape[0], columns, dtype=hidden.dtype, device=hidden.device)
    out = torch.empty(columns, hidden.shape[1], device=hidden.device)
    for start in range(0, weight.shape[0], columns):
        width = min(columns, weight.shape[0] - start)
        _mm(dlogits[:, :width].T, hidden, out[:width])
    return out[0, 0]


def _mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def floors(kind: str, sizes: Sizes, rounds: int) -> dict[str, float]:
    """Seconds of the products alone, measured now: as many forward products as the counts beyond three say."""
    inputs = [make_inputs(sizes)]
    products = {"forward": product_alone, "d_hidden": d_hidden_product, "d_weight": d_weight_product}
    times = interleaved_seconds(products, inputs, warmup=min(3, rounds), rounds=rounds)
    forward, d_hidden, d_weight = (statistics.median(times[name]) for name in products)
    backward = d_hidden + d_weight
    return {f"{count} products": forward * count if kind == "scoring" else forward * (count - 2) + backward for count in PRODUCTS[kind]}


def table(kind: str, task: Task, sizes: Sizes, rounds: int) -> dict[str, Any]:
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
    rows = measure(task, sizes, None, warmup=min(5, rounds), rounds=rounds)
    measured = floors(kind, sizes, rounds)
    for row in rows:
        if "seconds" in row:
            row["ratio_to_floor"] = {name: row["seconds"] / seconds for name, seconds in measured.items()}
    return {"task": task.name, "sizes": asdict(sizes), "rows": rows, "floors": measured}


def tables(quick: bool, device: str, rounds: int) -> list[dict[str, Any]]:
    gpu = device == "cuda"
    tasks = {"sparse": sparse_task(gpu=gpu), "label": label_task(gpu=gpu), "dense": dense_task(gpu=gpu), "scoring": scoring_task()}
    if quick:
        small = replace(HEADLINE, tokens=256, columns=32_000, hidden_size=512, chosen=16, device=device)
        if not gpu:
            small = replace(small, tokens=24, columns=500, hidden_size=16, chosen=4, dtype="float32")
        return [table(kind, task, small, rounds) for kind, task in tasks.items()]
    plan = [(kind, replace(HEADLINE, hidden_size=size)) for size in HIDDEN_SIZES for kind in tasks]
    plan += [("sparse", sizes) for sizes in OTHER]
    return [table(kind, tasks[kind], sizes, rounds) for kind, sizes in plan]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size a table")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu only checks the script: add --quick")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a GPU, or add --device cpu --quick to check the script")
    rounds = 2 if options.device == "cpu" else options.rounds
    report("gpu_quick" if options.quick else "gpu", tables(options.quick, options.device, rounds), options.results)


if __name__ == "__main__":
    main()
