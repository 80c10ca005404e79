"""Run as a script with positions in `fused_product.SHAPES`: those launches compiled for Hopper and not run, plain and with every option.
With `lean` in the place of a position, those of the leaner pass.

Prints a line of JSON a launch. Needs no GPU: bf16 tensors on the CPU are launched as a GPU's would be, and only the launch is replaced.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import fused_product
import lean_group_sums
import torch
import triton
from compile_launches import compiled_launch
from opd_kernels.row_kernels import TileConstants
from opd_kernels.triton_topk import empty_groups
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HIDDEN_SIZE = 2048
COLUMNS = 151_936
GROUP = 128


def resources(compiled) -> dict[str, int]:
    """Registers, bytes of stack and of local memory a thread, as the machine code declares them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}


def remarks(compiled) -> list[str]:
    """What ptxas says of the kernel's speed: a C75.. note where it makes the tensor core's instructions wait for one another."""
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    return [line for line in listing.splitlines() if "Performance Loss" in line]


def report_launch(kernel, *args, grid, warmup, **keywords) -> None:
    """Stands in for JITFunction.run."""
    compiled = compiled_launch(kernel, args, keywords)
    products = set(re.findall(r"wgmma\.mma_async\.\S+", compiled.asm["ptx"]))
    found = resources(compiled) | {"shared": compiled.metadata.shared, "products": sorted(products), "remarks": remarks(compiled)}
    print(json.dumps(found), flush=True)


def launch_everything(positions: list[str]) -> None:
    rows = 2
    hidden, weight = (torch.zeros(1, HIDDEN_SIZE, dtype=torch.bfloat16).expand(size, -1) for size in (rows, COLUMNS))
    z = torch.zeros(rows, COLUMNS)
    plain = TileConstants(inverse_temperature=torch.ones(rows))
    full = replace(plain, bias=torch.zeros(COLUMNS), softcap=30.0, logit_scale=0.5)
    for position in positions:
        for constants in (plain, full):
            if position == "lean":
                lean_group_sums.lean_group_sums(z, GROUP, constants)
            else:
                shape = fused_product.SHAPES[int(position)]
                fused_product.fused_product(hidden, weight, z, empty_groups(z, GROUP), GROUP, constants, shape)


if __name__ == "__main__":
    JITFunction.run = report_launch
    launch_everything(sys.argv[1:])
