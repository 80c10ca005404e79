"""Every kernel compiles to Hopper machine code as it is launched; the interpreter accepts more than the compiler does. Needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SCRIPT = Path(__file__).with_name("compile_launches.py")
KERNELS = {
    "take_kernel", "overwrite_kernel", "row_sums_kernel", "dense_dz_kernel", "scale_kernel", "finalize_kernel", "coefficients_kernel",
    "group_sums_kernel", "top_groups_kernel", "compact_kernel", "top_columns_kernel", "rest_sums_kernel",
    "divergence_value_kernel", "divergence_dz_kernel",
}  # fmt: skip
SHARED_BYTES = 48 << 10  # what a block may use without asking for more


@pytest.mark.parametrize(("columns", "chosen", "k"), [(20_000, 64, 16), (4_099, 1, 1)])
def test_every_launch_compiles_for_hopper(columns, chosen, k, tmp_path):
    paths = [str(Path(triton.__file__).parents[1]), *(path for path in sys.path if path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), str(columns), str(chosen), str(k)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in launches} == KERNELS and all(int(shared) <= SHARED_BYTES for _, shared in launches)
