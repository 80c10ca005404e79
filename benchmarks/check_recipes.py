"""Seconds that `opd check` takes for every shipped recipe, each in a process of its own, without the hub.

python benchmarks/check_recipes.py [PART/PARTS]     # writes benchmarks/results/check_recipes.json; 1/3, 2/3, 3/3 measure a third each
"""

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

OUT = Path("benchmarks/results/check_recipes.json")
LIMIT = 10.0  # seconds


def check(path: Path) -> tuple[str, dict[str, float]]:
    """One recipe's name, seconds and exit status."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    needs = ["data.path=tests/data/gsm8k_like.jsonl"] if path.stem == "gsm8k_tiny" else []
    started = time.perf_counter()
    words = [sys.executable, "-m", "opd", "check", str(path), *needs]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    return path.stem, {"seconds": round(time.perf_counter() - started, 2), "exit_status": done.returncode}


def main(piece: str = "1/1") -> None:
    """Run them two at a time; rows of other pieces are kept."""
    part, parts = map(int, piece.split("/"))
    recipes = sorted(Path("recipes/runs").glob("*.yaml"))
    rows = json.loads(OUT.read_text(encoding="utf-8"))["recipes"] if parts > 1 and OUT.is_file() else {}
    with ThreadPoolExecutor(2) as pool:
        rows |= dict(pool.map(check, recipes[part - 1 :: parts]))
    rows = {path.stem: rows[path.stem] for path in recipes if path.stem in rows}
    slowest = max(rows, key=lambda name: rows[name]["seconds"])
    found = {
        "command": "python benchmarks/check_recipes.py", "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, no GPU, two at a time, one thread each, no hub, Python {platform.python_version()}",
        "measured": f"{len(rows)} of {len(recipes)}", "slowest": [slowest, rows[slowest]["seconds"]],
        f"above {LIMIT:g} s": [name for name, row in rows.items() if row["seconds"] > LIMIT],
        "with errors": [name for name, row in rows.items() if row["exit_status"]], "recipes": rows,
    }  # fmt: skip
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print({key: value for key, value in found.items() if key != "recipes"})


if __name__ == "__main__":
    main(*sys.argv[1:])
