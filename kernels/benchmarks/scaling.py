"""Time and extra memory against N and V for the sparse task, and the plot of both.

python kernels/benchmarks/scaling.py            # CPU; --device cuda on a GPU
python kernels/benchmarks/scaling.py --quick    # tiny sizes: checks the script
"""

import argparse
import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker as ticker
import torch
from harness import RESULTS, Sizes, add_the_rest, extra_bytes_in_child, measure, print_extra_bytes, report, stored_tables
from systems import sparse_task

BASE = {
    "cpu": Sizes(tokens=256, columns=32_000, hidden_size=256),
    "cuda": Sizes(tokens=8192, columns=151_936, hidden_size=2048, chosen=64, dtype="bfloat16", device="cuda"),
}
GRID = {
    "cpu": {"tokens": (128, 512, 2048), "columns": (8_000, 32_000, 128_000)},
    "cuda": {"tokens": (1024, 4096, 16_384), "columns": (32_000, 128_256, 256_000)},
}
TINY = {"tokens": (16, 32), "columns": (300, 600)}
SYSTEMS = {
    "eager": "eager",
    "eager_logsumexp": "eager with logsumexp",
    "composable": "selected_logprobs",
    "fused": "fused_sparse_loss",
    "three_products_alone": "three products alone",
    "four_products_alone": "four products alone",
}
LABELS = {"tokens": "tokens N", "columns": "vocabulary V"}


def tables(device: str, quick: bool, rounds: int, times_only: bool) -> list[dict[str, Any]]:
    base, grid = (Sizes(tokens=16, columns=300, hidden_size=16, chosen=4), TINY) if quick else (BASE[device], GRID[device])
    task = sparse_task(gpu=False)
    if device == "cuda":
        task = replace(task, systems={name: system for name, system in task.systems.items() if "alone" not in name})
    memory_of = None if device == "cuda" else functools.partial(extra_bytes_in_child, __file__)
    results = []
    for axis, values in grid.items():
        for value in values:
            sizes = replace(base, **{axis: value})
            rows = measure(task, sizes, memory_of, warmup=1 if device == "cuda" else 0, rounds=rounds, patience=1.5, times_only=times_only)
            results.append({"task": task.name, "axis": axis, "sizes": asdict(sizes), "rows": rows})
    return results


def with_the_rest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tables with memory and errors beside the times."""
    task, memory_of = sparse_task(gpu=False), functools.partial(extra_bytes_in_child, __file__)
    return [add_the_rest(table, task, memory_of) for table in results]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Four panels: seconds and extra memory, against tokens and against vocabulary.

    Products alone return no gradients that could be taken off their memory, so they are shown in time only.
    """
    figure, panels = plt.subplots(2, 2, figsize=(10, 8), sharex="col")
    for column, axis in enumerate(LABELS):
        points = [table for table in results if table["axis"] == axis]
        for name in SYSTEMS:
            rows = [(table["sizes"][axis], row) for table in points for row in table["rows"] if row["system"] == name and "seconds" in row]
            line, color = ("--", "0.5" if "three" in name else "0.75") if "alone" in name else ("-", None)
            for panel, (key, scale) in zip(panels[:, column], (("seconds", 1e3), ("extra_bytes", 1 / 2**20)), strict=True):
                if rows and not ("alone" in name and key == "extra_bytes"):
                    panel.plot([x for x, _ in rows], [row[key] * scale for _, row in rows], line, color=color, marker="o", label=SYSTEMS[name])
        fixed = ", ".join(f"{LABELS[other]} {points[0]['sizes'][other]:,}" for other in LABELS if other != axis)
        panels[1, column].set_xlabel(f"{LABELS[axis]} ({fixed}, H = {points[0]['sizes']['hidden_size']})")
        panels[0, column].set_xscale("log", base=2)
        ticks = [table["sizes"][axis] for table in points]
        panels[0, column].set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panels[0, 0].set_ylabel("forward and backward, ms")
    panels[1, 0].set_ylabel("memory beyond inputs and gradients, MiB")
    for panel in panels.flat:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())
        panel.grid(alpha=0.3)
    figure.suptitle("Sparse forward KL with tail: time and memory against tokens and vocabulary")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("times", "rest"), help="'times', then 'rest' (memory, errors and the plot): the same in two runs; CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print_extra_bytes(sparse_task(gpu=False), options.memory_of, Sizes(**json.loads(options.sizes)))
        return
    name = f"scaling_{options.device}" + ("_quick" if options.quick else "")
    if options.only == "rest":
        results = with_the_rest(stored_tables(options.results / f"{name}.json"))
    else:
        results = tables(options.device, options.quick, 1 if options.quick else options.rounds, options.only == "times")
    path = report(name, results, options.results)
    if options.only == "times":
        return
    plot(results, path.with_suffix(".png"))
    print(f"plot in {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
