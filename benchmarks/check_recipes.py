"""Seconds that `opd check` takes for every shipped recipe, each in a process of its own, without the hub.

python benchmarks/check_recipes.py        # writes benchmarks/results/check_recipes.md
"""

import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

OUT = Path("benchmarks/results/check_recipes.md")


def main() -> None:
    """Run them one after the other."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    rows = []
    for path in sorted(Path("recipes/runs").glob("*_qwen3_*.yaml")) + sorted(Path("recipes/runs").glob("*_expr.yaml")):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "opd", "check", str(path)], env=environment, capture_output=True, text=True, check=False)
        rows.append((time.perf_counter() - started, path.stem, done.returncode))
    rows.sort(reverse=True)
    machine = f"{os.cpu_count()} cores, no GPU, one thread, Python {platform.python_version()}"
    head = [f"`python benchmarks/check_recipes.py`, {date.today()}, {machine}.", ""]
    table = ["| recipe | seconds | exit status |", "|---|---|---|", *(f"| `{name}` | {seconds:.1f} | {code} |" for seconds, name, code in rows)]
    OUT.write_text("\n".join([*head, *table]) + "\n", encoding="utf-8")
    print(f"slowest {rows[0][0]:.1f} s ({rows[0][1]}), {sum(code != 0 for _, _, code in rows)} with errors")


if __name__ == "__main__":
    main()
