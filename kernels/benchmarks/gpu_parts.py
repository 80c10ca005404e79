"""Where the time of an operation goes on a GPU: bandwidth of every row kernel by launch shape, and the profiler's list of kernels.

    python kernels/benchmarks/gpu_parts.py                                   # about a minute
    TRITON_INTERPRET=1 python kernels/benchmarks/gpu_parts.py --device cpu   # tiny: checks the script

A row kernel should run at the bandwidth of a copy; one that does not is the next to be looked at.
"""

import argparse
import functools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Inputs, Sizes, machine, make_inputs, run_once
from opd_kernels import divergences, row_kernels, triton_divergence
from opd_kernels.row_kernels import TileConstants, Tiles
from opd_kernels.selection import Coefficients
from opd_kernels.triton_topk import top_columns
from systems import composable, dense_ours, fused, scoring_ours
from torch import Tensor

SHAPES = ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16_384, 16))  # columns and warps of a program
TOP_SHAPES = ((2048, 4), (4096, 8), (8192, 8))
HIDDEN_SIZES = (1024, 4096)


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median of `repeats` calls; on a GPU the device's own time."""
    times = []
    call()
    for _ in range(repeats):
        if device == "cpu":
            call()
            times.append(1.0)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidths(device: str, rows: int, columns: int, repeats: int, only: str) -> list[dict[str, Any]]:
    """GB/s of each kernel over a tile [rows, columns], by columns and warps of a program, and of a copy."""
    z, other = (torch.randn(rows, columns, device=device) * 6 for _ in range(2))
    dz, vector = torch.empty(rows, columns, dtype=torch.bfloat16, device=device), torch.zeros(rows, device=device)
    constants = TileConstants(inverse_temperature=torch.ones(rows, device=device))
    rule = Coefficients(reference=vector + 18, scale=vector + 1, slope=None, selected=torch.zeros(rows, 64, device=device))
    student, teacher = (triton_divergence.ProductTile(z=x, constants=constants, logz=vector + 30) for x in (z, other))
    kinds = {"jsd": divergences.jsd(0.5), "forward_kl": divergences.forward_kl()}
    k = min(64, columns // 128)
    calls: dict[str, tuple[int, Callable[[Tiles], object]]] = {
        "row_sums": (4, lambda tiles: row_kernels.row_sums(z, constants, tiles)),
        "dense_dz": (6, lambda tiles: row_kernels.dense_dz(z, dz, rule, constants, tiles)),
    }
    for group in (128, 256, 512) if device == "cuda" else (16,):
        calls[f"top_columns, k={k}, {group}"] = (4, functools.partial(_top, z, k, group, constants))
    for name, kind in kinds.items():
        calls[f"divergence value, {name}"] = (8, functools.partial(_value, student, teacher, kind))
        calls[f"divergence dz, {name}"] = (10, functools.partial(_dz, student, teacher, kind, vector, dz))
    copied = seconds(lambda: other.copy_(z), device, repeats)
    found = [{"kernel": "copy", "gigabytes_per_second": 8e-9 * z.numel() / copied, "seconds": copied}]
    for name, (bytes_each, call) in calls.items():
        if not name.startswith(only):
            continue
        shapes = ((64, 4),) if device == "cpu" else TOP_SHAPES if name.startswith("top") else SHAPES
        for block, warps in shapes:
            tiles = Tiles(block=block, warps=warps)
            took = seconds(functools.partial(call, tiles), device, repeats)
            speed = bytes_each * z.numel() / took
            found.append({"kernel": name, "block": block, "warps": warps, "seconds": took, "gigabytes_per_second": speed * 1e-9})
    return found


def _top(z, k, group, constants, tiles) -> object:
    return top_columns(z, k, group, constants, tiles)


def _value(student, teacher, kind, tiles) -> object:
    return triton_divergence.divergence_rows(student, teacher, kind, tiles)


def _dz(student, teacher, kind, vector, dz, tiles) -> object:
    return triton_divergence.divergence_dz(student, teacher, kind, vector, vector + 1, dz, tiles)


def profiled(call: Callable[[Inputs], Tensor], inputs: Inputs, device: str, most: int = 25) -> list[dict[str, Any]]:
    """The kernels of one call and its backward pass, longest first: name, launches, milliseconds."""
    for _ in range(2):
        run_once(call, inputs)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if device == "cuda" else [activity.CPU]) as profile:
        run_once(call, inputs)
        if device == "cuda":
            torch.cuda.synchronize()
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [event for event in profile.key_averages() if device == "cpu" or event.device_type == torch.autograd.DeviceType.CUDA]
    rows = [{"kernel": event.key[:120], "launches": event.count, "milliseconds": getattr(event, spent) / 1e3} for event in events]
    rows.sort(key=lambda row: -row["milliseconds"])
    rest = rows[most:]
    total = {"kernel": "all", "launches": sum(r["launches"] for r in rows), "milliseconds": sum(r["milliseconds"] for r in rows)}
    others = {"kernel": "the others", "launches": sum(r["launches"] for r in rest), "milliseconds": sum(r["milliseconds"] for r in rest)}
    return [total, *rows[:most], others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-rows", action="store_true", help="the profiles alone")
    parser.add_argument("--only", default="", help="row kernels whose name begins so")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_parts.json")
    options = parser.parse_args()
    device = options.device
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # read by Triton as kernels are defined, before any option
        parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a GPU, or add --device cpu to check the script")
    size = (2944, 151_936) if device == "cuda" else (3, 600)
    record: dict[str, Any] = {"machine": machine(), "rows": [] if options.skip_rows else bandwidths(device, *size, options.repeats, options.only)}
    for row in record["rows"]:
        shape = f"{row.get('block', ''):>7} {row.get('warps', ''):>3}"
        print(f"{row['kernel']:32}{shape}{row['seconds'] * 1e3:10.3f} ms{row['gigabytes_per_second']:10.0f} GB/s", flush=True)
    backend = "triton"
    calls = {
        "fused": functools.partial(fused, backend=backend), "composable": functools.partial(composable, backend=backend),
        "topk_logprobs": functools.partial(scoring_ours, backend=backend),
        "dense in forward": functools.partial(dense_ours, hinted=True, backend=backend),
    }  # fmt: skip
    sizes = Sizes(tokens=8192, columns=151_936, hidden_size=1024, chosen=64, dtype="bfloat16", device="cuda")
    if device == "cpu":
        sizes = replace(sizes, tokens=4, columns=600, chosen=4, dtype="float32", device="cpu")
    few = make_inputs(replace(sizes, tokens=min(64, sizes.tokens), hidden_size=64))
    for name, call in calls.items():  # so few tokens that the time is that of issuing the launches
        issue = seconds(lambda call=call: run_once(call, few), device, options.repeats)
        record["rows"].append({"kernel": f"launches of {name}", "seconds": issue, "gigabytes_per_second": 0.0})
        print(f"launches of {name}: {issue * 1e3:.2f} ms")
    record["profiles"] = []
    for hidden_size in HIDDEN_SIZES if device == "cuda" else (8,):
        inputs = make_inputs(replace(sizes, hidden_size=hidden_size))
        for name, call in calls.items():
            kernels = profiled(call, inputs, device)
            record["profiles"].append({"operation": name, "hidden_size": hidden_size, "kernels": kernels})
            print(f"\n{name}, H = {hidden_size}")
            for row in kernels[:14] + kernels[-1:]:
                print(f"{row['milliseconds']:9.3f} ms {row['launches']:5d}  {row['kernel'][:100]}", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
