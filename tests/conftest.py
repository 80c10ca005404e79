"""Set before any test module is imported.

Triton reads TRITON_INTERPRET when a kernel is decorated, its own library functions included, so it must be there before whoever imports
Triton first (a test of another folder, by way of transformers or deepspeed).
"""

import os
import shutil
import tempfile

import pytest

FREE_GIB = 1
"""A whole run holds about 0.3 GiB in its temporary folder at a time; without room tests fail one after another, for no reason of theirs."""

if os.environ.get("OPD_KERNEL_TESTS_ON") != "cuda":  # see tests/kernels/conftest.py
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_sessionstart(session: pytest.Session) -> None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 2**30
    if free < FREE_GIB:
        pytest.exit(f"{folder} has {free:.1f} GiB free, and the tests need {FREE_GIB}; make room, or set TMPDIR to another folder", returncode=2)
