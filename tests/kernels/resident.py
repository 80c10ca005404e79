"""Prints, as JSON, the peak resident bytes each operation adds to its inputs. Run as a module in a process of its own."""

import json
from pathlib import Path

import torch

from tests.kernels.allocations import status_bytes
from tests.kernels.test_memory import OPERATIONS, work_of


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
