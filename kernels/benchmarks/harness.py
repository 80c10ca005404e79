"""Measuring: interleaved times, extra memory, gradients' errors, and results with date, machine and versions.

Time is the median of rounds in which every system runs once, so that a change of the machine's speed meets all of them. Extra memory is
the peak minus the inputs minus the returned gradients. Errors are relative to fp64 on the first tokens, in the same run.
"""

import argparse
import ctypes
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    tokens: int
    columns: int
    hidden_size: int
    chosen: int = 32
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A student's hidden states and head, a teacher's, chosen ids, and teacher log-probabilities at them."""

    hidden: Tensor
    weight: Tensor
    hidden_t: Tensor
    weight_t: Tensor
    ids: Tensor  # [N, K] distinct
    teacher_logp: Tensor  # [N, K]
    teacher_tail: Tensor  # [N]

    def differentiable(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]


System = Callable[[Inputs], Tensor]
"""Returns a scalar loss to differentiate, or a tensor without gradient where there is nothing to differentiate."""


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    systems: dict[str, System]
    oracle: System | None  # run on fp64 inputs; None where there are no gradients to compare
    baseline: str  # the system that ratios refer to


def make_inputs(sizes: Sizes, seed: int = 0) -> Inputs:
    """randn inputs with a logit standard deviation of 6 and a teacher near the student."""
    generator = torch.Generator(sizes.device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=sizes.device)

    dtype = getattr(torch, sizes.dtype)
    scale = 6.0 / sizes.hidden_size**0.5
    hidden, weight = draw(sizes.tokens, sizes.hidden_size) * scale, draw(sizes.columns, sizes.hidden_size)
    hidden_t = hidden + 0.1 * scale * draw(sizes.tokens, sizes.hidden_size)
    first = torch.randint(0, sizes.columns, (sizes.tokens, 1), generator=generator, device=sizes.device)
    stride = max(1, sizes.columns // sizes.chosen)
    ids = (first + stride * torch.arange(sizes.chosen, device=sizes.device)) % sizes.columns
    mass = draw(sizes.tokens, sizes.chosen + 1).log_softmax(dim=1)
    return Inputs(
        hidden=hidden.to(dtype).requires_grad_(),
        weight=weight.to(dtype).requires_grad_(),
        hidden_t=hidden_t.to(dtype),
        weight_t=weight.to(dtype).detach(),
        ids=ids,
        teacher_logp=mass[:, :-1].contiguous(),
        teacher_tail=mass[:, -1].contiguous(),
    )


def run_once(system: System, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Forward and backward: (loss, gradients of hidden and weight)."""
    loss = system(inputs)
    if not loss.requires_grad:
        return loss, []
    return loss.detach(), list(torch.autograd.grad(loss, inputs.differentiable()))


def seconds_once(system: System, inputs: Inputs) -> float:
    if inputs.hidden.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run_once(system, inputs)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run_once(system, inputs)
    return time.perf_counter() - begin


def interleaved_seconds(
    systems: dict[str, System], inputs: Sequence[Inputs], *, warmup: int, rounds: int, patience: float = float("inf")
) -> dict[str, list[float]]:
    """Times by system; each round runs every system once on the round's input set. A system drops out after 3 rounds and `patience` seconds."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(warmup + rounds):
        for name, system in systems.items():
            if len(times[name]) >= 3 and sum(times[name]) > patience:
                continue
            seconds = seconds_once(system, inputs[turn % len(inputs)])
            if turn >= warmup:
                times[name].append(seconds)
    return times


def gradient_errors(system: System, oracle: System, sizes: Sizes, tokens: int = 128) -> dict[str, float]:
    """Relative errors of the loss and of both gradients against fp64 on the same rounded inputs, on a few tokens."""
    inputs = make_inputs(replace(sizes, tokens=min(tokens, sizes.tokens)))
    exact = Inputs(
        **{
            name: (value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value)
            for name, value in ((name, getattr(inputs, name)) for name in Inputs.__dataclass_fields__)
        }
    )
    wanted_loss, wanted = run_once(oracle, exact)
    loss, actual = run_once(system, inputs)
    errors = {"loss": abs(loss.item() - wanted_loss.item()) / abs(wanted_loss.item())}
    for name, got, want in zip(("d_hidden", "d_weight"), actual, wanted, strict=True):
        errors[name] = ((got.double() - want).norm() / want.norm()).item()
    if actual:
        by_row = (actual[0].double() - wanted[0]).norm(dim=1) / wanted[0].norm(dim=1)
        errors |= {"d_hidden_median_row": by_row.median().item(), "d_hidden_worst_row": by_row.max().item()}
    return errors


def extra_bytes(system: System, inputs: Inputs) -> int:
    """Peak minus inputs minus returned gradients of one run after a warm-up; on the CPU call it in a process of its own."""
    if inputs.hidden.is_cuda:
        run_once(system, inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, grads = run_once(system, inputs)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_bytes("VmRSS")
        _, grads = run_once(system, inputs)
        peak = _status_bytes("VmHWM") - before
    return peak - sum(grad.numel() * grad.element_size() for grad in grads)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def extra_bytes_in_child(script: str, name: str, sizes: Sizes) -> int:
    """extra_bytes on the CPU, in a fresh process with an allocator that gives freed memory back."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, script, "--memory-of", name, "--sizes", json.dumps(asdict(sizes))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    if run.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{run.stderr}")
    return int(run.stdout.split()[-1])


def print_extra_bytes(task: Task, name: str, sizes: Sizes) -> None:
    """What the child of extra_bytes_in_child does."""
    tiny = replace(sizes, tokens=min(8, sizes.tokens), columns=min(512, sizes.columns))
    run_once(task.systems[name], make_inputs(tiny))  # libraries set up their own memory at first use
    print(extra_bytes(task.systems[name], make_inputs(sizes)))


def measure(
    task: Task,
    sizes: Sizes,
    memory_of: Callable[[str, Sizes], int] | None,
    *,
    warmup: int,
    rounds: int,
    patience: float = float("inf"),
    times_only: bool = False,
) -> list[dict[str, Any]]:
    """A row a system: seconds, ratio to the baseline, and unless `times_only` extra memory and errors; or why it did not run.

    `memory_of` measures a system by name; None measures in this process.
    """
    sets = [make_inputs(sizes, seed) for seed in range(3 if sizes.device == "cuda" else 1)]
    usable, rows = {}, []
    for name, system in task.systems.items():
        try:
            errors = {} if times_only else errors_of(task, name, sizes)
            run_once(system, sets[0])
        except Exception as failure:  # another project's code on a shape or device it may not support: the table says so
            rows.append({"system": name, "did_not_run": f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"})
        else:
            usable[name] = errors
    times = interleaved_seconds({name: task.systems[name] for name in usable}, sets, warmup=warmup, rounds=rounds, patience=patience)
    for name, errors in usable.items():
        median, ratios = statistics.median(times[name]), None
        if task.baseline in times:
            ratios = statistics.median(own / base for own, base in zip(times[name], times[task.baseline], strict=False))
        rows.append({"system": name, "seconds": median, "ratio": ratios, "errors": errors, "all_seconds": times[name]})
        if not times_only:
            rows[-1]["extra_bytes"] = memory_of(name, sizes) if memory_of else extra_bytes(task.systems[name], sets[0])
    return with_memory_ratios(rows, task.baseline)


def errors_of(task: Task, name: str, sizes: Sizes) -> dict[str, float]:
    """gradient_errors of a system, {} where there is nothing to compare."""
    return gradient_errors(task.systems[name], task.oracle, sizes) if task.oracle is not None and "alone" not in name else {}


def with_memory_ratios(rows: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """The rows, each that has a memory figure with its ratio to the baseline's."""
    reference = next((row["extra_bytes"] for row in rows if row["system"] == baseline and "extra_bytes" in row), None)
    return [row | ({"memory_ratio": row["extra_bytes"] / reference} if reference and "extra_bytes" in row else {}) for row in rows]


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def stored_tables(path: Path) -> list[dict[str, Any]]:
    """The tables that `path` holds, for a run that measures a part of them. Raises ValueError if another machine measured them."""
    if not path.exists():
        return []
    stored, here = json.loads(path.read_text()), machine()
    if differing := [key for key in here if key != "date" and stored["machine"].get(key) != here[key]]:
        raise ValueError(f"{path} was measured with another {' and '.join(differing)}; give --results FOLDER or remove the file")
    return stored["tables"]


def write(name: str, tables: list[dict[str, Any]], folder: Path) -> Path:
    """Writes tables as JSON; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "tables": tables}, indent=1) + "\n")
    return path


def report(name: str, tables: list[dict[str, Any]], folder: Path) -> Path:
    """Prints the tables and writes them as JSON; returns the file."""
    path = write(name, tables, folder)
    show(tables)
    print(f"\nwritten to {path}")
    return path


def show(tables: Sequence[dict[str, Any]]) -> None:
    """Prints tables; one that was left out says why."""
    for table in tables:
        if "skipped" in table:
            print(f"\n{table['task']}: skipped, {table['skipped']}")
            continue
        print(f"\n{table['task']}  " + "  ".join(f"{key}={value}" for key, value in table["sizes"].items()))
        print(f"{'system':28}{'ms':>10}{'ratio':>8}{'MiB':>10}{'ratio':>8}{'loss':>10}{'d_hidden':>10}{'d_weight':>10}")
        for row in table["rows"]:
            print(_line(row))
        for key, value in table.get("floors", {}).items():
            print(f"{key:28}{value * 1e3:10.2f}")


def _line(row: dict[str, Any]) -> str:
    if "did_not_run" in row:
        return f"{row['system']:28}did not run: {row['did_not_run']}"
    numbers = [row["ratio"], row.get("memory_ratio")]
    time_ratio, memory_ratio = ("" if number is None else f"{number:.2f}" for number in numbers)
    errors = "".join(f"{row['errors'][key]:10.1e}" if key in row["errors"] else " " * 10 for key in ("loss", "d_hidden", "d_weight"))
    memory = f"{row['extra_bytes'] / 2**20:.1f}" if "extra_bytes" in row else ""
    return f"{row['system']:28}{row['seconds'] * 1e3:10.2f}{time_ratio:>8}{memory:>10}{memory_ratio:>8}{errors}"


def add_the_rest(table: dict[str, Any], task: Task, memory_of: Callable[[str, Sizes], int]) -> dict[str, Any]:
    """The table with memory and errors beside the times that it has."""
    sizes = Sizes(**table["sizes"])
    rows = [
        row | ({"extra_bytes": memory_of(row["system"], sizes), "errors": errors_of(task, row["system"], sizes)} if "seconds" in row else {})
        for row in table["rows"]
    ]
    return table | {"rows": with_memory_ratios(rows, task.baseline)}


def main(name: str, task: Task, full: Sequence[Sizes], quick: Sequence[Sizes], script: str) -> None:
    """Command line of a CPU table: what to measure of it, and the child process that measures memory."""
    parser = argparse.ArgumentParser(description=f"CPU table '{name}': {', '.join(task.systems)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: checks that the script runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--columns", type=int, help="only the size with this vocabulary; the others stay as the results have them")
    parser.add_argument("--only", choices=("times", "rest"), help="'times', then 'rest' (memory and errors): the same in two shorter runs")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print_extra_bytes(task, options.memory_of, Sizes(**json.loads(options.sizes)))
        return
    rounds = 1 if options.quick else options.rounds
    name = f"{name}_quick" if options.quick else name
    memory_of = functools.partial(extra_bytes_in_child, script)
    partial = options.columns is not None or options.only == "rest"
    stored = {Sizes(**table["sizes"]): table for table in stored_tables(options.results / f"{name}.json")} if partial else {}
    tables = []
    for sizes in quick if options.quick else full:
        if options.columns not in (None, sizes.columns):
            tables += [stored[sizes]] if sizes in stored else []
        elif options.only == "rest":
            if sizes not in stored:
                parser.error(f"there are no times of {sizes} in {options.results / name}.json yet: run --only times first")
            tables.append(add_the_rest(stored[sizes], task, memory_of))
        else:
            rows = measure(task, sizes, memory_of, warmup=0, rounds=rounds, times_only=options.only == "times")
            tables.append({"task": task.name, "sizes": asdict(sizes), "rows": rows})
    report(name, tables, options.results)
