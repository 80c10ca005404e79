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


THOROUGH = (
    "compare/test_runner.py",
    "kernels/test_head_",
    "kernels/test_memory.py",
    "kernels/test_triton_",
    "kernels/test_vocab_parallel.py",
    "learner/test_checkpoint.py",
    "learner/test_learners.py",
    "learner/test_no_dense_logits.py",
    "learner/test_ranks.py",
    "run/test_faults.py",
    "run/test_methods.py",
    "run/test_variants.py",
)
"""Many short tests that take two thirds of the time together: every method, learner and interpreted kernel. `make test-fast` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(THOROUGH):
            item.add_marker(pytest.mark.thorough)
