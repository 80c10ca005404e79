"""Prints, as JSON, the peak resident bytes each operation adds to its inputs. Run as a module in a process of its own."""

import json
from pathlib import Path

import torch

from tests.kernels.test_memory import OPERATIONS, work_of


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def main() -> None:
    torch.set_num_threads(1)
    extra = {}
    for operation in OPERATIONS:
        work, _inputs = work_of(operation, chunk_bytes=None)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status_bytes("VmRSS")
        work()
        extra[operation] = status_bytes("VmHWM") - before
        del work, _inputs
    print(json.dumps(extra))


if __name__ == "__main__":
    main()
