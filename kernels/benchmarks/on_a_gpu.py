"""Everything about the kernels that needs a GPU, in one command; results go where each script writes them, a summary comes last.

    python kernels/benchmarks/on_a_gpu.py                   # one H100 or H200, 60 GiB of device memory; has not run whole yet
    python kernels/benchmarks/on_a_gpu.py tests findings    # these steps alone
    python kernels/benchmarks/on_a_gpu.py --check           # the same scripts at tiny sizes on the CPU

A step that fails does not stop the next ones; the exit status is 1 if any failed. The memory checks need compute-sanitizer on PATH
(`pip install nvidia-cuda-sanitizer-api`); without it they are named as left out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILED = {"OPD_KERNEL_TESTS_ON": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
TESTS = [f"tests/kernels/test_triton_{name}.py" for name in ("row_kernels", "selection", "operations", "topk", "fused_product")]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, and what stands for it on a CPU, given a folder for its results; None where only a GPU has anything to check."""

    why: str
    command: list[str]
    minutes: float  # after which it counts as failed
    check: Callable[[Path], list[str]] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    check_environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program on PATH


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), *arguments]


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def sanitized(tool: str) -> list[str]:
    """The row kernels' own tests: small tensors, every kernel, seconds without the sanitizer."""
    return ["compute-sanitizer", f"--tool={tool}", "--target-processes=all", "--error-exitcode=1", *pytest("-x", TESTS[0], TESTS[1])]


def stored_plot(folder: Path) -> list[str]:
    """The plot of the stored tables, elsewhere."""
    return script("gpu_plot", shutil.copy(HERE / "results/gpu.json", folder))


STEPS = {
    "tests": Step(
        why="the Triton tests, compiled",
        command=pytest(*TESTS),
        check=lambda _: pytest(TESTS[0] + "::test_row_offsets_are_64_bit"),
        environment=COMPILED,
        minutes=10,
    ),
    "findings": Step(
        why="values, memory and repeats at full size, tiles of more than 2^31 logits",
        command=script("gpu_smoke", "--json", str(HERE / "results/gpu_smoke.json")),
        check=lambda folder: script("gpu_smoke", "--interpret", "--json", str(folder / "gpu_smoke.json")),
        minutes=10,
    ),
    "memcheck": Step(
        why="accesses out of bounds, each tensor in an allocation of its own",
        command=sanitized("memcheck"),
        environment=COMPILED | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        needs="compute-sanitizer",
        minutes=10,
    ),
    "racecheck": Step(why="races in shared memory", command=sanitized("racecheck"), environment=COMPILED, needs="compute-sanitizer", minutes=10),
    "tables": Step(
        why="every table: times against floors and peers, memory, errors",
        command=script("gpu", "--rounds", "8"),
        check=lambda folder: script("gpu", "--device", "cpu", "--quick", "--results", str(folder)),
        minutes=20,
    ),
    "plot": Step(why="time and memory against N and V", command=script("gpu_plot"), check=stored_plot, minutes=2),
    "parts": Step(
        why="bandwidth of every row kernel, and where an operation's time goes",
        command=script("gpu_parts"),
        check=lambda folder: script("gpu_parts", "--device", "cpu", "--out", str(folder / "gpu_parts.json")),
        check_environment={"TRITON_INTERPRET": "1"},
        minutes=5,
    ),
    "fused": Step(
        why="whether the top-k's statistics belong inside the product",
        command=script("gpu_fused_product"),
        check=lambda folder: script("gpu_fused_product", "--device", "cpu", "--quick", "--results", str(folder)),
        check_environment={"TRITON_INTERPRET": "1"},
        minutes=10,
    ),
}


def run(chosen: Step, folder: Path | None) -> tuple[str, float]:
    """Runs a step (its check where a folder is given), its output going to the terminal; returns how it ended and the seconds it took."""
    if folder is None and chosen.needs and shutil.which(chosen.needs) is None:
        return f"left out: {chosen.needs} is not on PATH", 0.0
    if folder is not None and chosen.check is None:
        return "left out: only a GPU has anything to check here", 0.0
    command = chosen.command if folder is None else chosen.check(folder)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = chosen.environment if folder is None else chosen.check_environment
    began = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path} | more, timeout=60 * chosen.minutes).returncode
    except subprocess.TimeoutExpired:
        return f"failed: longer than {chosen.minutes:g} minutes", time.monotonic() - began
    return "ok" if code == 0 else f"failed: exit status {code}", time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; all of them unless named")
    parser.add_argument("--check", action="store_true", help="tiny sizes on the CPU: checks that every step runs")
    options = parser.parse_args()
    if unknown := sorted(set(options.steps) - set(STEPS)):
        parser.error(f"no step {', '.join(unknown)}: there are {', '.join(STEPS)}")
    if not options.check and subprocess.run([sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]).returncode:
        parser.error("no CUDA device: run this on a GPU, or add --check")
    ended = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.steps or STEPS:
            print(f"\n== {name}: {STEPS[name].why}", flush=True)
            ended.append((name, *run(STEPS[name], Path(folder) if options.check else None)))
    print("\n" + "\n".join(f"{name:12}{seconds:7.0f} s  {how}" for name, how, seconds in ended))
    sys.exit(any(how.startswith("failed") for _, how, _ in ended))


if __name__ == "__main__":
    main()
