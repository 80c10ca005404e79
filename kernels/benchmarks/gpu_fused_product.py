"""Whether the top-k's group statistics belong inside the matrix product: the rule fixed before is to fuse them only if a fused Triton
product exceeds 600 TFLOP/s at H = 2048. One command answers it:

    python kernels/benchmarks/gpu_fused_product.py            # three hidden sizes, every launch shape; minutes on one H100 or H200, 30 GiB
    python kernels/benchmarks/gpu_fused_product.py --quick    # H = 2048 and three launch shapes
    TRITON_INTERPRET=1 python kernels/benchmarks/gpu_fused_product.py --device cpu --quick    # tiny: checks the script

Per hidden size: cuBLAS alone, cuBLAS and `group_sums`, the same with a leaner pass, and the fused product by launch shape, in turn within
the same rounds; then the best shape with all that follows (the selection of the k largest), and with nothing stored, which shows the most
that storing fewer products could win. Agreement is that of the statistics and of the top k with the unfused path, and of both with fp64 on
a few rows.
"""

import argparse
import functools
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fused_product import SHAPES, LaunchShape, fused_product
from harness import RESULTS, Inputs, Sizes, Task, make_inputs, measure, write
from lean_group_sums import lean_group_sums
from opd_kernels.row_kernels import TILES, TileConstants, Tiles
from opd_kernels.tiling import spans
from opd_kernels.triton_rows import TileScratch
from opd_kernels.triton_topk import GroupSums, empty_groups, group_size, group_sums, top_of_groups
from torch import Tensor

HEADLINE = Sizes(tokens=8192, columns=151_936, hidden_size=2048, chosen=64, dtype="bfloat16", device="cuda")
HIDDEN_SIZES = (2048, 1024, 4096)
QUICK_SHAPES = (SHAPES[0], SHAPES[1], SHAPES[6])
LEAST_TERAFLOPS = 600.0  # of the rule, at H = 2048
WIDEST_DIFFERENCE = 1e-3  # of logits and log-sums, before a time counts for nothing: fp32 sums in another order differ by 1e-5
PRODUCT, UNFUSED, LEAN = "product alone (cuBLAS)", "product, then group sums", "product, then lean group sums"
EXACT_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the systems of one table write: products of a chunk of rows, and the statistics of their groups."""

    z: Tensor  # [rows of a chunk, V] fp32
    sums: GroupSums
    group: int  # columns
    k: int
    tiles: Tiles

    def constants(self, rows: int) -> TileConstants:
        return TileConstants(inverse_temperature=torch.ones(rows, device=self.z.device))


Step = Callable[[Place, Tensor, Tensor], object]
"""Takes the hidden states of a chunk, at most as many rows as the place has, and the weight."""


def place_of(sizes: Sizes, chunk: int, tiles: Tiles) -> Place:
    rows = min(chunk, sizes.tokens)
    z = TileScratch(rows, sizes.columns, torch.device(sizes.device)).tile(rows, sizes.columns)
    group = group_size(sizes.columns, sizes.chosen, tiles)
    assert group is not None
    return Place(z=z, sums=empty_groups(z, group), group=group, k=sizes.chosen, tiles=tiles)


def rows_of(sums: GroupSums, rows: int) -> GroupSums:
    return GroupSums(code=sums.code[:rows], total=sums.total[:rows], centred=sums.centred[:rows])


def product(place: Place, hidden: Tensor, weight: Tensor) -> Tensor:
    z = place.z[: len(hidden)]
    if hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=z)
    else:
        torch.mm(hidden.float(), weight.T.float(), out=z)
    return z


def unfused(place: Place, hidden: Tensor, weight: Tensor) -> GroupSums:
    return group_sums(product(place, hidden, weight), place.group, place.constants(len(hidden)), place.tiles)


def unfused_lean(place: Place, hidden: Tensor, weight: Tensor, *, warps: int) -> GroupSums:
    z, tiles = product(place, hidden, weight), replace(place.tiles, warps=warps)
    return lean_group_sums(z, place.group, place.constants(len(hidden)), tiles)


def fused(place: Place, hidden: Tensor, weight: Tensor, *, shape: LaunchShape, store: bool = True) -> GroupSums:
    rows = len(hidden)
    sums = rows_of(place.sums, rows)
    fused_product(hidden, weight, place.z[:rows], sums, place.group, place.constants(rows), shape, store=store)
    return sums


def then_selected(place: Place, hidden: Tensor, weight: Tensor, *, statistics: Step) -> object:
    sums, rows = statistics(place, hidden, weight), len(hidden)
    return top_of_groups(place.z[:rows], sums, place.k, place.group, place.constants(rows), place.tiles)


def over_chunks(inputs: Inputs, *, place: Place, step: Step) -> Tensor:
    """A system of the harness: the step on every chunk of rows."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    for rows in spans(len(hidden), len(place.z)):
        step(place, hidden[rows], weight)
    return place.z[0, 0]


def rows_of_table(steps: dict[str, Step], place: Place, sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """A row a step, with TFLOP/s of the product's own arithmetic and the ratio to the product alone, which must be among them."""
    systems = {name: functools.partial(over_chunks, place=place, step=step) for name, step in steps.items()}
    task = Task(name="product and group statistics", systems=systems, oracle=None, baseline=PRODUCT)
    measured = measure(task, sizes, None, warmup=min(3, rounds), rounds=rounds, times_only=True)
    operations = 2e-12 * sizes.tokens * sizes.columns * sizes.hidden_size
    return [row | ({"teraflops": operations / row["seconds"]} if "seconds" in row else {}) for row in measured]


def agreement(place: Place, inputs: Inputs, shape: LaunchShape) -> dict[str, float]:
    """Largest differences of the fused path from the unfused one over a chunk, and of both from fp64 over a few rows."""
    hidden, weight = inputs.hidden.detach()[: len(place.z)], inputs.weight.detach()
    constants = place.constants(len(hidden))
    sums = [unfused(place, hidden, weight)]
    z = [place.z[: len(hidden)].clone()]
    place.z.fill_(math.nan)
    sums.append(fused(place, hidden, weight, shape=shape))
    z.append(place.z[: len(hidden)])
    lean = moments(lean_group_sums(z[0], place.group, constants, place.tiles))
    top = [top_of_groups(one, of_z, place.k, place.group, constants, place.tiles) for one, of_z in zip(z, sums, strict=True)]
    largest, log_total, mean = (tuple(values) for values in zip(*(moments(one) for one in sums), strict=True))
    exact = exact_log_totals(hidden[:EXACT_ROWS], weight, place.group)
    return {
        "product": worst(z[0] - z[1]),
        "largest": worst(largest[0] - largest[1]),
        "log_total": worst(log_total[0] - log_total[1]),
        "mean": worst(mean[0] - mean[1]),
        "log_total_of_the_lean_pass": worst(log_total[0] - lean[1]),
        "mean_of_the_lean_pass": worst(mean[0] - lean[2]),
        "top_value_at_equal_rank": worst(top[0].x - top[1].x),
        "share_of_equal_top_ids": (top[0].columns == top[1].columns).double().mean().item(),
        "log_total_from_fp64_unfused": worst(log_total[0][:EXACT_ROWS] - exact),
        "log_total_from_fp64_fused": worst(log_total[1][:EXACT_ROWS] - exact),
    }


def moments(sums: GroupSums) -> tuple[Tensor, Tensor, Tensor]:
    """(largest logit, log of the sum of exponentials, mean logit under them) of each group, fp64 [C, groups]."""
    largest = (sums.code ^ ((sums.code >> 31) & 0x7FFFFFFF)).view(torch.float32).double()
    return largest, largest + sums.total.double().log(), largest + sums.centred.double() / sums.total.double()


def exact_log_totals(hidden: Tensor, weight: Tensor, group: int) -> Tensor:
    x = torch.nn.functional.pad(hidden.double() @ weight.double().T, (0, -len(weight) % group), value=-math.inf)
    return x.view(len(hidden), -1, group).logsumexp(dim=2)


def worst(difference: Tensor) -> float:
    """Largest absolute value; NaN where there is one."""
    return difference.abs().max().item()


def agrees(differences: dict[str, float]) -> bool:
    """Whether the fused path computes the same. Ids may differ between near ties, whose values are then equal to rounding."""
    return all(differences[name] < WIDEST_DIFFERENCE for name in differences if name != "share_of_equal_top_ids")


def table(sizes: Sizes, shapes: tuple[LaunchShape, ...], chunk: int, tiles: Tiles, rounds: int) -> dict[str, Any]:
    """One hidden size: times by launch shape, the best shape with and without what follows, and its agreement."""
    place = place_of(sizes, chunk, tiles)
    by_name = {f"fused {shape.name()}": functools.partial(fused, shape=shape) for shape in shapes}
    lean = {f"{LEAN}, {warps} warps": functools.partial(unfused_lean, warps=warps) for warps in (4, 8)}
    rows = rows_of_table({PRODUCT: product, UNFUSED: unfused} | lean | by_name, place, sizes, rounds)
    ran = [row for row in rows if row["system"] in by_name and "seconds" in row]
    done = {"task": "product and group statistics", "sizes": asdict(sizes), "rows": rows}
    if not ran:
        return done | {"best": None, "agrees": False}
    best = min(ran, key=lambda row: row["seconds"])["system"]
    shape = next(shape for shape in shapes if best == f"fused {shape.name()}")
    following = {
        PRODUCT: product,
        "product, group sums, selection": functools.partial(then_selected, statistics=unfused),
        "best fused, selection": functools.partial(then_selected, statistics=by_name[best]),
        "best fused, nothing stored": functools.partial(fused, shape=shape, store=False),
    }
    differences = agreement(place, make_inputs(sizes), shape)
    return done | {
        "best": best,
        "following": rows_of_table(following, place, sizes, rounds),
        "differences": differences,
        "agrees": agrees(differences),
    }


def verdict(tables: list[dict[str, Any]]) -> str:
    """One line: what the rule decides by the table of H = 2048."""
    for done in tables:
        if done["sizes"]["hidden_size"] != HEADLINE.hidden_size:
            continue
        if done["best"] is None:
            return "no verdict: no fused product ran at H = 2048"
        if not done["agrees"]:
            return f"no verdict: the fused product's numbers are off by more than {WIDEST_DIFFERENCE:g}"
        best = next(row for row in done["rows"] if row["system"] == done["best"])
        passed = best["teraflops"] > LEAST_TERAFLOPS
        comparison, decision = ("more than", "fuse") if passed else ("not more than", "do not fuse")
        return (
            f"H = 2048: {best['teraflops']:.0f} TFLOP/s, {best['ratio']:.2f} of the product alone ({done['best']}), "
            f"{comparison} {LEAST_TERAFLOPS:.0f}: {decision}"
        )
    return "no verdict: H = 2048 was not measured"


def show_table(done: dict[str, Any]) -> None:
    print("\n" + done["task"] + "  " + "  ".join(f"{key}={value}" for key, value in done["sizes"].items()))
    print(f"{'':60}{'ms':>10}{'TFLOP/s':>10}{'ratio':>8}")
    for row in done["rows"] + done.get("following", []):
        if "did_not_run" in row:
            print(f"{row['system']:60}did not run: {row['did_not_run']}")
        else:
            print(f"{row['system']:60}{row['seconds'] * 1e3:10.3f}{row['teraflops']:10.1f}{row['ratio']:8.2f}")
    if done["best"] is not None:
        print("best: " + done["best"])
        print("differences: " + ", ".join(f"{name} {value:.2g}" for name, value in done["differences"].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="H = 2048 and three launch shapes; with --device cpu tiny sizes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    cpu = options.device == "cpu"
    if cpu and (not options.quick or os.environ.get("TRITON_INTERPRET") != "1"):  # read by Triton as kernels are defined, before any option
        parser.error("--device cpu only checks the script: add --quick, and TRITON_INTERPRET=1 in the environment")
    if not cpu and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a GPU, or check the script with TRITON_INTERPRET=1 and --device cpu --quick")
    if not cpu and torch.cuda.get_device_capability()[0] < 9:
        parser.error("this needs a GPU with TMA: compute capability 9.0 (H100, H200) or later")
    name, tables = "gpu_fused_product_quick" if options.quick else "gpu_fused_product", []
    for hidden_size in HIDDEN_SIZES[:1] if options.quick else HIDDEN_SIZES:
        if cpu:
            sizes = replace(HEADLINE, tokens=6, columns=100, hidden_size=24, chosen=2, device="cpu")
            shape = LaunchShape(rows=16, columns=32, depth=16, warps=4, stages=2, swath=2)
            tables.append(table(sizes, (shape,), 4, Tiles(block=64, group=16), 1))
        else:
            torch.cuda.empty_cache()
            shapes = QUICK_SHAPES if options.quick else SHAPES
            tables.append(table(replace(HEADLINE, hidden_size=hidden_size), shapes, 2048, TILES, options.rounds))
        show_table(tables[-1])
        path = write(name, tables, options.results)
    print(f"\n{verdict(tables)}\nwritten to {path}")


if __name__ == "__main__":
    main()
