"""The plot of time and extra memory against N and V from what gpu.py wrote: python kernels/benchmarks/gpu_plot.py [gpu.json]"""

import json
import sys
from pathlib import Path

from harness import RESULTS
from scaling import LABELS, plot

SYSTEMS = ("eager", "composable", "fused")
HELD = {"tokens": 8192, "columns": 151_936, "hidden_size": 2048, "chosen": 64}


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "gpu.json"
    tables = [table for table in json.loads(path.read_text())["tables"] if table["task"].startswith("sparse") and "rows" in table]
    points = []
    for axis in LABELS:
        fixed = {name: value for name, value in HELD.items() if name != axis}
        along = [table for table in tables if all(table["sizes"][name] == value for name, value in fixed.items())]
        for table in sorted(along, key=lambda table: table["sizes"][axis]):
            points.append({**table, "axis": axis, "rows": [row for row in table["rows"] if row["system"] in SYSTEMS]})
    plot(points, path.with_suffix(".png"))
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
