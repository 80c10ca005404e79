"""Set before any test module is imported.

Triton reads TRITON_INTERPRET when a kernel is decorated, its own library functions included, so it must be there before whoever imports
Triton first (a test of another folder, by way of transformers or deepspeed).
"""

import os

if os.environ.get("OPD_KERNEL_TESTS_ON") != "cuda":  # see tests/kernels/conftest.py
    os.environ["TRITON_INTERPRET"] = "1"
