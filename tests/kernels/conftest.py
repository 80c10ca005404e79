"""Triton kernels are interpreted in these tests. The choice is read when a kernel is decorated, so it is made before that."""

import os

os.environ["TRITON_INTERPRET"] = "1"
