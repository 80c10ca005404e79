"""Prints, as JSON, the peak resident bytes of training steps. Run as a module with a dtype and a number of forwards."""

import json
import sys
from pathlib import Path

import opd_kernels
import torch

from tests.kernels.allocations import status_bytes

TOKENS, VOCABULARY, HIDDEN, STEPS = 512, 40_000, 512, 2
BUDGET = 8 << 20


def main(dtype: torch.dtype, forwards: int) -> None:
    torch.set_num_threads(1)
    opd_kernels.types.CPU_TILE_BYTES = (BUDGET, BUDGET)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
    ids = torch.randint(0, VOCABULARY, (TOKENS, 4))

    def step(hidden, weight, ids) -> list[torch.Tensor]:
        loss = sum(opd_kernels.selected_logprobs(hidden, weight, ids, entropy=False, backend="torch").logp.sum() for _ in range(forwards))
        later = [torch.randn(20_000) for _ in range(20)]  # what else is allocated between the passes keeps the heap from shrinking
        loss.backward()
        return later

    step(hidden[:8].detach().requires_grad_(), weight[:70].detach().requires_grad_(), ids[:8] % 70)  # libraries wake up
    before, peaks = status_bytes("VmRSS"), []
    for _ in range(STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        hidden.grad = weight.grad = None
        later = step(hidden, weight, ids)
        peaks.append(status_bytes("VmHWM") - before)
        del later
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), int(sys.argv[2]))
