"""GPU tables: ours and every other system that runs, on bf16 heads, with floors measured in the same rounds. One command:

    python kernels/benchmarks/gpu.py                      # all tables, about 8 minutes on one H100 or H200, 60 GiB of its memory
    python kernels/benchmarks/gpu.py --minutes 3          # leaves out the tables that no longer fit, and says so
    python kernels/benchmarks/gpu.py --quick              # one small size a table
    python kernels/benchmarks/gpu.py --device cpu --quick # checks the script itself where there is no GPU

Needs torch and triton; liger-kernel, trl and cut-cross-entropy are measured where they are installed, and a table says why a system did
not run. Floors: the time of the three matrix products (forward, and both of backward) that any exact method needs, of four with a
recomputed forward, and of one for scoring; ratios to them are what the targets in ../README.md speak of. The file is written anew after
every table, so that a run that is cut off loses one. Systems that take long to set up, or to run, are in the tables of H = 2048 alone.
"""

import argparse
import functools
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Inputs, Sizes, System, Task, measure, show, write
from systems import dense_task, label_task, product_alone, scoring_task, sparse_task
from torch import Tensor

HEADLINE = Sizes(tokens=8192, columns=151_936, hidden_size=4096, chosen=64, dtype="bfloat16", device="cuda")
HIDDEN_SIZES = (4096, 2048, 1024)
WITH_PEERS = 2048
OTHER = (
    replace(HEADLINE, tokens=1024, hidden_size=2048),
    replace(HEADLINE, tokens=2048, hidden_size=2048),
    replace(HEADLINE, tokens=32_768, hidden_size=2048),
    replace(HEADLINE, columns=32_000, hidden_size=2048),
    replace(HEADLINE, columns=128_256, hidden_size=2048),
    replace(HEADLINE, hidden_size=2048, chosen=1),
    replace(HEADLINE, hidden_size=2048, chosen=256),
)
PRODUCTS = {"sparse": (3, 4), "label": (3, 4), "dense": (4, 6), "scoring": (1,)}
ALWAYS = {
    "sparse": ("eager", "composable", "fused"),
    "label": ("eager", "composable", "fused", "liger_fused_linear_ce", "cce"),
    "dense": ("ours_recompute", "ours_in_forward", "liger_fused_linear_jsd"),
    "scoring": ("eager", "topk_logprobs"),  # beside the product alone
}
PATIENCE = 1.5  # seconds of a system a table, after three rounds


def floor_systems(sizes: Sizes) -> dict[str, System]:
    """The three products by themselves, over buffers that stand ready; the gradient's values are random, as ones run faster."""
    dtype = getattr(torch, sizes.dtype)
    block = min(16_384, sizes.columns)
    dlogits = torch.randn(min(sizes.tokens, 8192), sizes.columns, device=sizes.device).to(dtype)
    d_hidden = torch.empty(sizes.tokens, sizes.hidden_size, device=sizes.device)
    d_weight = torch.empty(block, sizes.hidden_size, device=sizes.device)

    def d_hidden_alone(inputs: Inputs) -> Tensor:
        for start in range(0, sizes.tokens, len(dlogits)):
            out = d_hidden[start : start + len(dlogits)]
            _mm(dlogits[: len(out)], inputs.weight.detach(), out)
        return d_hidden[0, 0]

    def d_weight_alone(inputs: Inputs) -> Tensor:
        for tokens in range(0, sizes.tokens, len(dlogits)):
            hidden = inputs.hidden.detach()[tokens : tokens + len(dlogits)]
            for start in range(0, sizes.columns, block):
                part = dlogits[: len(hidden), start : start + block]
                _mm(part.T, hidden, d_weight[: part.shape[1]])
        return d_weight[0, 0]

    forward = functools.partial(product_alone, rows=2048)
    return {"forward_alone": forward, "d_hidden_alone": d_hidden_alone, "d_weight_alone": d_weight_alone}


def _mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def floors(kind: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the products alone: as many forward products as the counts beyond three say."""
    seconds = {row["system"]: row["seconds"] for row in rows if row["system"].endswith("alone")}
    forward = seconds["forward_alone"]
    if kind == "scoring":
        return {"1 products": forward}
    backward = seconds["d_hidden_alone"] + seconds["d_weight_alone"]
    return {f"{count} products": forward * (count - 2) + backward for count in PRODUCTS[kind]}


def table(kind: str, task: Task, sizes: Sizes, rounds: int) -> dict[str, Any]:
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
    alone = floor_systems(sizes)
    if kind == "scoring":
        alone = {"forward_alone": alone["forward_alone"]}
    task = replace(task, systems=task.systems | alone)
    rows = measure(task, sizes, None, warmup=min(2, rounds), rounds=rounds, patience=PATIENCE)
    measured = floors(kind, rows)
    for row in rows:
        if "seconds" in row:
            row["ratio_to_floor"] = {name: row["seconds"] / seconds for name, seconds in measured.items()}
    return {"task": task.name, "sizes": asdict(sizes), "rows": rows, "floors": measured}


def plan(quick: bool, device: str, *, others: bool = True, peers: bool = True) -> list[tuple[str, Task, Sizes]]:
    """(kind, task, sizes) of every table, the headline ones first; without peers only the few systems of ALWAYS."""
    gpu = device == "cuda"
    tasks = {"sparse": sparse_task(gpu=gpu), "scoring": scoring_task(), "dense": dense_task(gpu=gpu), "label": label_task(gpu=gpu)}
    if quick:
        small = replace(HEADLINE, tokens=256, columns=32_000, hidden_size=512, chosen=16, device=device)
        if not gpu:
            small = replace(small, tokens=24, columns=500, hidden_size=16, chosen=4, dtype="float32")
        return [(kind, task, small) for kind, task in tasks.items()]
    found = []
    for kind, task in tasks.items():
        few = replace(task, systems={name: system for name, system in task.systems.items() if name in ALWAYS[kind]})
        sizes = HIDDEN_SIZES if kind != "label" else (WITH_PEERS,)
        found += [(kind, task if size == WITH_PEERS and peers else few, replace(HEADLINE, hidden_size=size)) for size in sizes]
    few = replace(tasks["sparse"], systems={name: tasks["sparse"].systems[name] for name in ALWAYS["sparse"]})
    return found + [("sparse", few, sizes) for sizes in OTHER if others]


def tables(
    planned: list[tuple[str, Task, Sizes]], rounds: int, *, minutes: float = float("inf"), name: str = "", folder: Path = RESULTS
) -> list[dict[str, Any]]:
    """Measures in order, shows each table as it is done and, with a name, writes the file; leaves out what no longer fits `minutes`."""
    done, slowest, deadline = [], 0.0, time.monotonic() + 60 * minutes  # slowest: seconds a system of a table
    for kind, task, sizes in planned:
        began = time.monotonic()
        if began + slowest * len(task.systems) > deadline:
            left = f"{deadline - began:.0f} s are left, and it may take {slowest * len(task.systems):.0f} s"
            done.append({"task": task.name, "sizes": asdict(sizes), "skipped": left})
        else:
            done.append(table(kind, task, sizes, rounds))
            slowest = max(slowest, (time.monotonic() - began) / len(task.systems))
        show(done[-1:])
        print(f"({time.monotonic() - began:.0f} s)", flush=True)
        if name:
            write(name, done, folder)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size a table")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="tables that no longer fit are left out")
    parser.add_argument("--kinds", nargs="+", choices=list(PRODUCTS), default=list(PRODUCTS))
    parser.add_argument("--headline", action="store_true", help="without the tables of other sizes")
    parser.add_argument("--few", action="store_true", help="few systems at every size: quick, for work on ours")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--name", help="of the result file, without .json")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu only checks the script: add --quick")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a GPU, or add --device cpu --quick to check the script")
    rounds = 2 if options.device == "cpu" else options.rounds
    planned = [one for one in plan(options.quick, options.device, others=not options.headline, peers=not options.few) if one[0] in options.kinds]
    name = options.name or ("gpu_quick" if options.quick else "gpu")
    tables(planned, rounds, minutes=options.minutes, name=name, folder=options.results)


if __name__ == "__main__":
    main()
